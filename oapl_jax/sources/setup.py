"""What a process of a run needs to sample: prompts, graders, the sampler, and who the other processes are."""

import contextlib
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np

from oapl_jax.build.assembly import Assembly
from oapl_jax.config.commands import TrainConfig
from oapl_jax.data.prompts import HeldOut, PromptSource, describe, dropped
from oapl_jax.data.tokenizer import Tokenizer
from oapl_jax.distributed.team import Team
from oapl_jax.distributed.transfer import Transfer
from oapl_jax.evaluation.held_out import Counts, by_set, evaluate
from oapl_jax.io.storage import SharedPath, shared_path
from oapl_jax.learner import batch as batches
from oapl_jax.rewards.grader import Grader
from oapl_jax.rollouts.buffer import GroupBuffer
from oapl_jax.rollouts.filters import FEWEST_ROLLOUTS
from oapl_jax.rollouts.grading import Grading, advantages_of
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.sampling import Request, SamplingDistribution, run
from oapl_jax.rollouts.shards import ShardQueue
from oapl_jax.rollouts.stops import Stops
from oapl_jax.sampler.sampler import JaxSampler
from oapl_jax.sources.sampling_loop import SamplingLoop
from oapl_jax.sources.turns import SamplerTurns
from oapl_jax.types import RolloutGroup

PARITY_STREAM = 2**32 - 2
"""Stream of the sampling keys, see ``evaluation.held_out.EVALUATION_STREAM``."""


class Inputs(NamedTuple):
    """What a run reads before it starts; ``run/start.py`` loads it."""

    tokenizer: Tokenizer
    prompts: PromptSource
    held_out: HeldOut
    grader: Grader
    """Which has tried the gold answers of the prompts."""

    def describe(self, config: TrainConfig) -> dict[str, str]:
        """What there is to learn from, and what was left out; where responses end."""
        lines = {f"prompts {name}".strip(): text for name, text in describe(config.data, self.prompts).items()}
        held_out = ", ".join(
            f"{name} {len(mine):,}".strip()
            + (f" ({dropped(number)})" if (number := self.held_out.dropped[name]) else "")
            for name, mine in by_set(self.held_out).items()
        )
        responses = str(Stops(self.tokenizer, SamplingDistribution.of(config.sampler)))
        return {**lines, "held out": held_out or "none: no evaluation", "responses": responses}


class Drawn(NamedTuple):
    """A rollout for the parity gate."""

    prompt_ids: np.ndarray
    token_ids: np.ndarray
    logprobs: np.ndarray


@dataclasses.dataclass(frozen=True)
class SamplingSetup:
    """Made once in a process, by ``make_setup``."""

    config: TrainConfig
    tokenizer: Tokenizer
    prompts: PromptSource
    held_out: HeldOut
    grading: Grading
    turns: SamplerTurns | None
    """None in a process that does not sample."""
    device_lock: AbstractContextManager
    """Held while a program is enqueued on the sampler's devices."""
    trainers: Team
    samplers: Team
    transfer: Transfer | None
    """Takes the weights to the samplers' processes, where these are not the trainers'."""

    @property
    def root(self) -> SharedPath:
        """The folder of policies, rollouts and leases, which all processes of the run see."""
        return shared_path(self.config.run.shared_dir or self.config.run.dir)

    @property
    def distribution(self) -> SamplingDistribution:
        """The distribution that training rollouts are drawn from."""
        return SamplingDistribution.of(self.config.sampler)

    @property
    def groups_per_batch(self) -> int:
        """N: groups of one learner step."""
        return self.config.learner.batch_rollouts // self.config.sampler.group_size

    def warm_up(self, weights: Any) -> None:
        """Compiles the sampler's programs before the first group, for the lengths of the first prompts."""
        assert self.turns is not None
        lengths = {len(self.prompts[i].token_ids) for i in range(self.config.sampler.groups_in_flight)}
        with self.turns.take() as sampler:
            sampler.set_weights(weights)
            sampler.warm_up(lengths, self.config.sampler.group_size)

    def draw(self, weights: Any) -> list[Drawn]:
        """The rollouts of an update, or as many as are decoded at once, with these weights."""
        assert self.turns is not None
        size, seed = self.config.sampler.group_size, self.config.run.seed
        of_update = self.groups_per_batch // self.config.learner.updates_per_batch
        number = min(of_update, self.config.sampler.groups_in_flight)
        prompts = [self.prompts[i].token_ids for i in range(number)]
        requests = [
            Request(ids, ids, size, (seed, PARITY_STREAM, i), self.distribution) for i, ids in enumerate(prompts)
        ]
        with self.turns.take() as sampler:
            sampler.set_weights(weights)
            finished = list(run(sampler, requests))
        return [Drawn(ids, rollout.token_ids, rollout.logprobs) for ids, rollouts in finished for rollout in rollouts]

    def make_loop(self, groups: GroupBuffer | ShardQueue, log: RolloutLog | ShardQueue) -> SamplingLoop:
        """A loop with this process's sampler."""
        assert self.turns is not None
        return SamplingLoop(
            self.turns,
            self.prompts,
            self.grading,
            groups,
            log,
            distribution=self.distribution,
            group_size=self.config.sampler.group_size,
            seed=self.config.run.seed,
            finish_old=self.config.window.unfinished == "finish",
        )

    def count_held_out(self, weights: Any, num_samples: int, part: int = 0, num_parts: int = 1) -> Counts:
        """Samples and grades held-out prompts with these weights; see ``evaluation.held_out.evaluate``."""
        assert self.turns is not None
        with self.turns.take() as sampler:
            sampler.set_weights(weights)
            return evaluate(
                sampler,
                self.held_out,
                self.grading,
                distribution=SamplingDistribution.of(self.config.sampler, self.config.evaluation),
                num_samples=num_samples,
                seed=self.config.run.seed,
                part=part,
                num_parts=num_parts,
            )


def make_setup(assembly: Assembly, inputs: Inputs, say: Callable[[str], None] = lambda message: None) -> SamplingSetup:
    """With the process's sampler, where it samples; ``say`` gets a line for what that compiles."""
    config, turns, lock = assembly.config, None, contextlib.nullcontext()
    if assembly.engines:
        sampler = JaxSampler(assembly.engines, assembly.sampler_mesh, inputs.tokenizer.decode)
        sampler.say = say
        turns, lock = SamplerTurns(sampler), sampler.device_lock
    tokenizer, prompts, held_out, grader = inputs
    grading = make_grading(config, tokenizer, grader)
    grading.check_values(prompts.items)
    teams = assembly.trainers, assembly.samplers
    return SamplingSetup(config, tokenizer, prompts, held_out, grading, turns, lock, *teams, assembly.transfer)


def make_grading(config: TrainConfig, tokenizer: Tokenizer, grader: Grader) -> Grading:
    """Grades rollouts, with the objective's advantages."""
    text = Stops(tokenizer, SamplingDistribution.of(config.sampler)).text
    return Grading(text, grader, advantages_of(config))


def acceptance(config: TrainConfig) -> Callable[[RolloutGroup], bool]:
    """Which groups the learner wants."""
    drop_equal = config.objective.drop_equal_reward_groups

    def is_accepted(group: RolloutGroup) -> bool:
        return len(group.usable) >= FEWEST_ROLLOUTS and not (drop_equal and batches.has_equal_rewards(group))

    return is_accepted

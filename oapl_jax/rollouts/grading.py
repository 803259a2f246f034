"""From rollouts to graded groups. A process has one ``Grading``, which all who sample share."""

import collections
import dataclasses
import functools
import math
import pathlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from oapl_jax.config.commands import TrainConfig
from oapl_jax.rewards.grader import Grader
from oapl_jax.rollouts.buffer import Ticket
from oapl_jax.rollouts.values import read_values
from oapl_jax.types import FinishReason, Grade, GradedRollout, Prompt, Rollout, RolloutGroup, RunError, Verdict

AdvantageFn = Callable[[Float[np.ndarray, "G"], Bool[np.ndarray, "G"]], Float[np.ndarray, "G"]]
"""From the rewards of a group, and whether each response is correct, to the advantages; float64."""


@dataclasses.dataclass(frozen=True)
class Advantages:
    """Advantages and V* of the rollouts of a group; NaN for those whose verdict or log-probabilities cannot be used."""

    of_rewards: AdvantageFn
    value: Callable[[Float[np.ndarray, "G"]], float]
    truncated: str = "wrong"
    """See ``SamplerConfig``."""
    values: Mapping[str, float] | None = None
    """V* of each prompt by its id, which is then subtracted from the advantages; None: ``value`` of the rewards."""

    def __call__(self, prompt_id: str, graded: Sequence[GradedRollout]) -> tuple[list[float], float]:
        """Computed over the usable rollouts.

        Raises:
            RunError: ``values`` lacks the prompt.
        """
        is_usable = np.array([self._is_usable(item) for item in graded])
        advantages, value = np.full(len(graded), np.nan), math.nan
        if is_usable.any():
            rewards = np.array([item.grade.reward for item in graded], np.float64)[is_usable]
            is_correct = np.array([item.grade.verdict is Verdict.CORRECT for item in graded])[is_usable]
            advantages[is_usable] = self.of_rewards(rewards, is_correct)
            if self.values is None:
                value = self.value(rewards)
            elif prompt_id in self.values:
                value = self.values[prompt_id]
                advantages -= value
            else:
                raise RunError(f"prompt {prompt_id}: objective.values has no sample of it; generate more of them")
        return advantages.tolist(), value

    def _is_usable(self, item: GradedRollout) -> bool:
        if self.truncated == "left_out" and item.rollout.finish_reason is FinishReason.LENGTH:
            return False
        is_graded = item.grade.verdict is not Verdict.INVALID and math.isfinite(item.grade.reward)
        return is_graded and bool(np.isfinite(item.rollout.logprobs).all())


def advantages_of(config: TrainConfig) -> Advantages:
    """Those of the run's objective.

    Raises:
        ValueError: as ``read_values``, where the objective takes V* from samples of a reference.
    """
    from oapl_jax.objectives import oapl  # brings JAX
    from oapl_jax.objectives.catalogue import OBJECTIVES

    objective, given = OBJECTIVES[config.objective.name], config.objective.model_extra or {}
    own = given.keys() & objective.options.model_fields.keys()
    options = objective.options.model_validate({name: given[name] for name in own})
    value = functools.partial(oapl.optimal_value, beta1=oapl.options_or_defaults(options).beta1)
    return Advantages(
        lambda rewards, is_correct: objective.advantages(rewards, is_correct, options),
        value,
        config.sampler.truncated,
        read_values(pathlib.Path(given["values"]), value) if objective.needs_values else None,
    )


INVALID_IN_A_ROW = 64
"""Invalid verdicts without a valid one among them after which grading gives up."""


class Grading:
    """Decodes, grades and gives advantages; owns the grader and a thread."""

    def __init__(self, decode: Callable[[list[int]], str], grader: Grader, advantages: Advantages):
        self.decode, self._grader, self.advantages = decode, grader, advantages
        self._is_grading = threading.Lock()
        self._invalid: list[str] = []
        """Reasons of the invalid verdicts since the last valid one."""
        self._thread = ThreadPoolExecutor(1, "grading")

    def check_values(self, prompts: Iterable[Prompt]) -> None:
        """Looks for V* of all prompts before the run, where it is taken from samples of a reference.

        Raises:
            ValueError: some lack it.
        """
        values = self.advantages.values
        missing = [] if values is None else [prompt.id for prompt in prompts if prompt.id not in values]
        if missing:
            raise ValueError(f"objective.values: has no sample of {len(missing):,} prompts, such as {missing[0]}")

    def grade(self, items: Sequence[tuple[Prompt, Sequence[Rollout]]]) -> list[tuple[list[str], list[Grade]]]:
        """Texts and grades of the rollouts of several prompts at once; callers wait for each other.

        Raises:
            RunError: nothing but invalid verdicts, ``INVALID_IN_A_ROW`` of them; with the most frequent reason.
        """
        # Each group has a prompt object of its own: so graders keep two groups of one prompt apart.
        items = [(dataclasses.replace(prompt), rollouts) for prompt, rollouts in items]
        texts = [[self.decode(rollout.token_ids.tolist()) for rollout in rollouts] for _, rollouts in items]
        flat = [
            (prompt, text, FinishReason.STOP if self.advantages.truncated == "graded" else rollout.finish_reason)
            for (prompt, rollouts), group_texts in zip(items, texts, strict=True)
            for text, rollout in zip(group_texts, rollouts, strict=True)
        ]
        with self._is_grading:
            graded = self._grader.grade(flat)
            reasons = [grade.detail for grade in graded if grade.verdict is Verdict.INVALID]
            self._invalid = self._invalid + reasons if len(reasons) == len(graded) else []
            if len(self._invalid) >= INVALID_IN_A_ROW:
                ((reason, times),) = collections.Counter(self._invalid).most_common(1)
                raise RunError(f"the last {len(self._invalid)} verdicts are all invalid, {times} because: {reason}")
        grades = iter(graded)
        return [(group_texts, [next(grades) for _ in group_texts]) for group_texts in texts]

    def groups(self, items: Sequence[tuple[Ticket, Prompt, list[Rollout]]]) -> list[RolloutGroup]:
        """Graded groups with their advantages."""
        graded = self.grade([(prompt, rollouts) for _, prompt, rollouts in items])
        return [
            self.group(ticket, prompt, list(map(GradedRollout, rollouts, texts, grades)))
            for (ticket, prompt, rollouts), (texts, grades) in zip(items, graded, strict=True)
        ]

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future:
        """Runs ``work`` in the grading thread, so that the sampler goes on meanwhile."""
        return self._thread.submit(work, *arguments)

    def close(self) -> None:
        """Ends the thread and the grader."""
        self._thread.shutdown(cancel_futures=True)
        self._grader.close()

    def group(self, ticket: Ticket, prompt: Prompt, graded: Sequence[GradedRollout]) -> RolloutGroup:
        """A group with its value and advantages."""
        advantages, value = self.advantages(prompt.id, graded)
        rollouts = [
            dataclasses.replace(item, advantage=advantage) for item, advantage in zip(graded, advantages, strict=True)
        ]
        return RolloutGroup(ticket.index, ticket.policy_version, prompt, tuple(rollouts), value)

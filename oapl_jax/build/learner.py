"""The learner's programs, from shapes alone: optimizer, state, train step, scorer, rows."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Float

from oapl_jax.build import policy
from oapl_jax.config.commands import SftConfig, TrainConfig
from oapl_jax.config.learner import LearnerConfig
from oapl_jax.config.model import ModelConfig
from oapl_jax.distributed.sharding import TRAINER_RULES, placed, shardings
from oapl_jax.learner import batch as batches
from oapl_jax.learner.state import TrainState, abstract_state, init_state, make_optimizer, make_schedule
from oapl_jax.learner.step import make_scorer, make_train_step
from oapl_jax.model import lora, qwen, row_attention
from oapl_jax.model.flops import forward_flops, update_flops
from oapl_jax.objectives import oapl
from oapl_jax.objectives.objective import Objective, ObjectiveOptions
from oapl_jax.types import RolloutGroup, TrainBatch


@dataclasses.dataclass(frozen=True)
class Learner:
    """What trains a model; the arrays are in a ``TrainState``."""

    mesh: Mesh
    architecture: qwen.QwenConfig
    graphdef: Any
    optimizer: optax.GradientTransformation
    shapes: TrainState
    """With the shardings of the state."""
    rows: batches.RowLayout
    """Of a mini-batch: what one update takes."""
    train_step: Any
    """``(state, batch on devices) -> (state, metrics, scores)``; the state is donated."""
    temperature: float
    vocab_size: int
    beta2: float
    """For the metrics of every objective."""
    updates_per_batch: int
    scores_old: bool
    """Whether the log-probabilities of the policy at the start of a batch are computed: the objective needs them, and a
    batch makes several updates."""
    scores_reference: bool
    """Whether those of the model that the run started from are."""

    @property
    def keeps_reference(self) -> bool:
        """Whether that model is kept as a copy; a policy with adapters has it as its base."""
        return self.scores_reference and not lora.has_adapters(self.shapes.params)

    @functools.cached_property
    def score(self) -> Any:
        """``(params, batch on devices) -> log-probabilities`` of the response tokens."""
        sharding = batches.shardings(self.rows).tokens
        return make_scorer(
            self.graphdef, temperature=self.temperature, vocab_size=self.vocab_size, out_sharding=sharding
        )

    def largest_batch(self) -> TrainBatch:
        """Shapes on the devices, of rows that are full of rollouts of full length."""
        rows, total = self.rows, self.rows.num_rows(self.rows.full.rows)
        num_rows = rows.micro_batch_rows or total
        length = rows.row_length(rows.max_tokens)
        shapes = batches.make_batch(jax.ShapeDtypeStruct, (total // num_rows, num_rows), length, rows)
        largest = placed(shapes, batches.shardings(rows))
        logprobs = largest.sampler_logprobs
        return largest._replace(
            old_logprobs=logprobs if self.scores_old else None,
            reference_logprobs=logprobs if self.scores_reference else None,
        )

    def mini_batches(self, groups: Sequence[RolloutGroup]) -> list[TrainBatch]:
        """The rows of each update on a batch of groups; a group stays whole."""
        return [batches.from_groups(part, self.rows) for part in self._parts(groups)]

    def of_groups(
        self, groups: Sequence[RolloutGroup], parts: Sequence[TrainBatch], values: Sequence[Float[np.ndarray, "A B T"]]
    ) -> list[list[Float[np.ndarray, "_R"]]]:
        """Values at the tokens of each mini-batch, as those of the usable rollouts of each group."""
        found = []
        for of_part, part, of_tokens in zip(self._parts(groups), parts, values, strict=True):
            found += batches.of_groups(of_tokens.reshape(part.tokens.shape), part, of_part, self.rows)
        return found

    def _parts(self, groups: Sequence[RolloutGroup]) -> list[Sequence[RolloutGroup]]:
        size = len(groups) // self.updates_per_batch
        return [groups[start : start + size] for start in range(0, len(groups), size)]

    def place(self, batch: TrainBatch) -> TrainBatch:
        """A batch on the devices."""
        return batches.place(batch, self.rows)

    def prepare(self, batch: TrainBatch, params: Any, reference: Any = None) -> TrainBatch:
        """A mini-batch on the devices, with the log-probabilities by other policies that the objective needs.

        ``params`` are those at the start of the batch, ``reference`` the copy of ``keeps_reference``.
        """
        placed = self.place(batch)
        if self.scores_old:
            placed = placed._replace(old_logprobs=self.score(params, placed))
        if self.scores_reference:
            base = reference if self.keeps_reference else lora.base_policy(params)
            placed = placed._replace(reference_logprobs=self.score(base, placed))
        return placed

    def flops(self, parts: Sequence[TrainBatch]) -> float:
        """Of the model's mathematics: the updates on mini-batches, and the scores that ``prepare`` adds."""
        total, num_scores = 0.0, self.scores_old + self.scores_reference
        for part in parts:
            work = self.architecture, *batches.work(part)
            total += update_flops(*work, has_frozen_weights=lora.has_adapters(self.shapes.params))
            total += num_scores * forward_flops(*work)[0]
        return total

    def init(self, params: Any) -> TrainState:
        """The state at step 0 with these parameters, which it takes over."""
        return init_state(params, self.optimizer, self.mesh)[0]


def make_learner(
    config: TrainConfig | SftConfig,
    architecture: qwen.QwenConfig,
    mesh: Mesh,
    *,
    max_response_tokens: int,
    group_size: int,
    objective: Objective,
    options: ObjectiveOptions,
    temperature: float,
    vocab_size: int,
    updates_per_batch: int = 1,
    kl_weight: float = 0.0,
) -> Learner:
    """The programs that a config describes; the further arguments are what ``train`` and ``sft`` configure differently.

    ``group_size`` are the rollouts of a prompt; ``vocab_size`` is the tokenizer's length; ``updates_per_batch`` divides
    ``learner.batch_rollouts``; ``kl_weight`` is ``objective.kl_weight``.

    Raises:
        ValueError: the rows do not divide over the mesh, the model has no matrix that an adapter is for, or it has too
            few positions.
    """
    model, learner = config.model, config.learner
    max_tokens = config.data.max_prompt_tokens + max_response_tokens
    architecture.check_positions(max_tokens)
    rows = batches.RowLayout(
        learner.batch_rollouts // updates_per_batch,
        max_tokens,
        learner.row_tokens,
        learner.micro_batch_rows,
        mesh,
        shares_prompts=_shares_prompts(model, learner, architecture, mesh),
        group_size=group_size,
        max_response_tokens=max_response_tokens,
    )
    graphdef, params = policy.abstract(model, architecture, mesh, config.lora)
    schedule = make_schedule(learner, config.run.steps, updates_per_batch)
    optimizer = make_optimizer(learner, schedule)
    shapes = abstract_state(params, optimizer)
    state_shardings = shardings(shapes, mesh, TRAINER_RULES)
    train_step = make_train_step(
        graphdef,
        optimizer,
        schedule,
        objective,
        options,
        temperature=temperature,
        vocab_size=vocab_size,
        mesh=mesh,
        shardings=state_shardings,
        kl_weight=kl_weight,
    )
    state, beta2 = placed(shapes, state_shardings), oapl.options_or_defaults(options).beta2
    return Learner(
        mesh,
        architecture,
        graphdef,
        optimizer,
        state,
        rows,
        train_step,
        temperature,
        vocab_size,
        beta2,
        updates_per_batch,
        scores_old=objective.needs_old and updates_per_batch > 1,
        scores_reference=objective.needs_reference or kl_weight > 0,
    )


def _shares_prompts(model: ModelConfig, learner: LearnerConfig, architecture: qwen.QwenConfig, mesh: Mesh) -> bool:
    """Whether the attention that the model will choose for packed rows lets rollouts share their prompt."""
    if learner.row_tokens is None:
        return False
    num_queries = learner.row_tokens // mesh.shape["context"]
    kind = model.attention or row_attention.choose(
        mesh.devices.flat[0],
        model.compute_dtype,
        num_queries,
        learner.row_tokens,
        architecture.head_dim,
        is_packed=True,
    )
    return row_attention.shares_prompts(kind)

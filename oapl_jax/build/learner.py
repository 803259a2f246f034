"""The learner's programs, from shapes alone: optimizer, state, train step, scorer, rows."""

import dataclasses
import functools
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from oapl_jax.build import policy
from oapl_jax.config.learner import LearnerConfig
from oapl_jax.config.model import LoraConfig, ModelConfig
from oapl_jax.distributed.sharding import TRAINER_RULES, placed, shardings
from oapl_jax.learner import batch as batches
from oapl_jax.learner.state import TrainState, abstract_state, init_state, make_optimizer, make_schedule
from oapl_jax.learner.step import make_scorer, make_train_step
from oapl_jax.model import qwen, row_attention
from oapl_jax.objectives import oapl
from oapl_jax.objectives.objective import Objective, ObjectiveOptions
from oapl_jax.types import TrainBatch


@dataclasses.dataclass(frozen=True)
class Learner:
    """What trains a model; the arrays are in a ``TrainState``."""

    mesh: Mesh
    graphdef: Any
    optimizer: optax.GradientTransformation
    shapes: TrainState
    """With the shardings of the state."""
    rows: batches.RowLayout
    train_step: Any
    """``(state, batch on devices) -> (state, metrics, scores)``; the state is donated."""
    temperature: float
    vocab_size: int
    beta2: float
    """For the metrics of every objective."""

    @functools.cached_property
    def score(self) -> Any:
        """``(params, batch on devices) -> log-probabilities`` of the response tokens."""
        return make_scorer(self.graphdef, temperature=self.temperature, vocab_size=self.vocab_size)

    def largest_batch(self) -> TrainBatch:
        """Shapes on the devices, of rows that are full of rollouts of full length."""
        rows, total = self.rows, self.rows.num_rows(self.rows.full.rows)
        num_rows = rows.micro_batch_rows or total
        length = rows.row_length(rows.max_tokens)
        shapes = batches.make_batch(jax.ShapeDtypeStruct, (total // num_rows, num_rows), length, rows)
        return placed(shapes, batches.shardings(rows))

    def place(self, batch: TrainBatch) -> TrainBatch:
        """A batch on the devices."""
        return batches.place(batch, self.rows)

    def init(self, params: Any) -> TrainState:
        """The state at step 0 with these parameters, which it takes over."""
        return init_state(params, self.optimizer, self.mesh)[0]


def make_learner(
    model: ModelConfig,
    lora: LoraConfig,
    learner: LearnerConfig,
    architecture: qwen.QwenConfig,
    mesh: Mesh,
    *,
    num_steps: int,
    max_prompt_tokens: int,
    max_response_tokens: int,
    group_size: int,
    objective: Objective,
    options: ObjectiveOptions,
    temperature: float,
    vocab_size: int,
) -> Learner:
    """The programs that these sections of a config describe.

    ``num_steps`` are those of the whole run, for the learning rate; ``group_size`` are the rollouts of a prompt;
    ``vocab_size`` is the tokenizer's length.

    Raises:
        ValueError: the rows do not divide over the mesh, the model has no matrix that an adapter is for, or it has too
            few positions.
    """
    max_tokens = max_prompt_tokens + max_response_tokens
    architecture.check_positions(max_tokens)
    if objective.needs_old or objective.needs_reference:
        raise ValueError(f"objective.name={objective.name}: it needs an old or a reference policy, which no run keeps")
    rows = batches.RowLayout(
        learner.batch_rollouts,
        max_tokens,
        learner.row_tokens,
        learner.micro_batch_rows,
        mesh,
        shares_prompts=_shares_prompts(model, learner, architecture, mesh),
        group_size=group_size,
        max_response_tokens=max_response_tokens,
    )
    graphdef, params = policy.abstract(model, architecture, mesh, lora)
    schedule = make_schedule(learner, num_steps)
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
    )
    state, beta2 = placed(shapes, state_shardings), oapl.options_or_defaults(options).beta2
    return Learner(mesh, graphdef, optimizer, state, rows, train_step, temperature, vocab_size, beta2)


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

"""The optimizer and the batch."""

from typing import Annotated, Literal

from pydantic import Field

from oapl_jax.config.section import Count, CountOrZero, Positive, PositiveOrZero, Section


class LearnerConfig(Section):
    """The optimizer (AdamW) and the batch."""

    batch_rollouts: Count = 128
    """Rollouts per learner step; a multiple of the group size."""
    row_tokens: Count | None = None
    """Tokens of a row into which rollouts are packed, those of one prompt behind one copy of it (docs/architecture.md
    says with which attention); null: a row has one rollout and padding. The gradient is the same."""
    micro_batch_rows: Count | None = None
    """Rows per forward and backward pass; null: the whole batch. The gradient is the same."""
    learning_rate: PositiveOrZero = 1e-6
    """Peak learning rate; 0: nothing is learned, to check a set-up by ``learner/log_ratio_abs``."""
    warmup_steps: CountOrZero = 0
    """Steps of linear warm-up."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or a cosine down to a tenth at the last step."""
    adam_b1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of Adam's first moment."""
    adam_b2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of Adam's second moment."""
    weight_decay: PositiveOrZero = 1e-2
    """AdamW's decoupled weight decay."""
    clip_norm: Positive = 1e-3
    """Limit of the gradient's global norm."""
    moment_dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of Adam's first moment; null: that of the weights. The second has the weights' always."""


class TrainLearnerConfig(LearnerConfig):
    """The same, and how a batch of groups is used."""

    updates_per_batch: Count = 1
    """Optimizer steps on a batch: its groups are split, in their order, into this number of mini-batches, and each makes
    one. An objective that needs the old policy takes that of the batch's start."""

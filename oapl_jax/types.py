"""The data that passes between the rooms, and the shape legend.

Shape legend, used in annotations, in suffixes of local names and in einsum strings:

    N prompts            G rollouts per prompt     B rows (sequences)     T tokens of a row
    V vocabulary         D model width             F ffn width            L layers
    H query heads        K key/value heads         C head width           S cache length
    E experts            P tokens of a prompt      R tokens of a response
    M rollouts packed in a row                     A micro-batches

Alignment, everywhere: ``logprobs[:, t]`` scores ``tokens[:, t]`` given the tokens before it.
"""

import dataclasses
import enum
import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int


class Verdict(enum.StrEnum):
    """What a grader says of a response. ``INVALID``: the grader failed, not the response."""

    CORRECT = "correct"
    WRONG = "wrong"
    INVALID = "invalid"


class FinishReason(enum.StrEnum):
    """Why a rollout ended: at a stop token or a stop string (whose tokens it has), or cut at the limit."""

    STOP = "stop"
    LENGTH = "length"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One question, tokenised once. Token ids are the truth; ``text`` is for people."""

    id: str
    """Stable name of the row it came from, e.g. ``gsm8k/train/17`` or ``chain/train/3``."""
    token_ids: Int[np.ndarray, "P"]
    text: str
    answer: str
    """What the grader compares with: a gold answer, or '' where the prompt alone suffices."""
    columns: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further cells of its row for reward functions, by ``data.columns``, as JSON values; the log does not have them."""


@dataclasses.dataclass(frozen=True)
class Grade:
    """A verdict with its reward. The reward of an invalid verdict is NaN and must not be used."""

    verdict: Verdict
    reward: float
    detail: str = ""
    level: str = ""
    """How strongly a program was shut off when it was graded (rewards/code/sandbox/isolation.py); '' where none ran."""
    cpu_ms: float = 0.0
    """CPU time that the verdict took, that of the program included."""


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One sampled response with the log-probabilities of the distribution it was drawn from."""

    token_ids: Int[np.ndarray, "R"]
    """Response tokens, up to the stop token or the one that completes a stop string, where one was drawn."""
    logprobs: Float[np.ndarray, "R"]
    """Log-probability of each token in nats, float32, after temperature, top-k, top-p and masking."""
    finish_reason: FinishReason


@dataclasses.dataclass(frozen=True)
class GradedRollout:
    """A rollout with its text, its grade and, where these are usable, its advantage."""

    rollout: Rollout
    text: str
    grade: Grade
    advantage: float = math.nan
    """A* = r - V*(x), float64 (objectives/oapl.py); NaN where the rollout is not usable."""
    extra: str = "{}"
    """A JSON object of what else is known of the rollout; the log keeps it as it is."""

    @property
    def is_usable(self) -> bool:
        """False for an invalid verdict or a log-probability that is not finite: never learned from."""
        return not np.isnan(self.advantage)


@dataclasses.dataclass(frozen=True)
class RolloutGroup:
    """All rollouts of one prompt by one policy version: the currency between sampling and learning."""

    index: int
    """Place of the group in its window, 0, 1, ...; the learner takes groups in this order."""
    policy_version: int
    prompt: Prompt
    rollouts: tuple[GradedRollout, ...]
    value: float
    """V*(x) of paper Eq. 2 over the usable rollouts, float64; NaN where none is usable."""

    @property
    def id(self) -> str:
        """Unique within a run: ``VERSION-INDEX``, zero-padded so that names sort."""
        return f"{self.policy_version:06d}-{self.index:08d}"

    @property
    def usable(self) -> tuple[GradedRollout, ...]:
        """The rollouts that the learner may train on."""
        return tuple(rollout for rollout in self.rollouts if rollout.is_usable)


class RunError(RuntimeError):
    """A command cannot go on; the message says why and what to do."""


class PreemptedError(Exception):
    """SIGTERM or Ctrl-C came, its argument, and the state is saved."""


class TrainBatch(NamedTuple):
    """Rows of rollouts, packed one after the other, as the train step takes them.

    A rollout lies whole in one row: prompt, then response. Where rollouts share their prompt, a row holds all but the
    prompt's last token once, and then for each rollout that last token and its response. NumPy ``[B, ...]`` on the
    host; on the devices with a leading axis of micro-batches (``learner/batch.py``).
    """

    tokens: Int[Any, "B T"]
    positions: Int[Any, "B T"]
    """Of each token in its own rollout, from 0."""
    segment_ids: Int[Any, "B T"]
    """Which rollout of the row a token belongs to, from 1; 0: a shared prompt, or padding at the end of the row."""
    response_mask: Bool[Any, "B T"]
    """True at response tokens, the stop token included."""
    sampler_logprobs: Float[Any, "B T"]
    """0 outside the responses."""
    advantages: Float[Any, "B M"]
    """Of rollout m, whose tokens have the segment id m + 1."""
    segment_mask: Bool[Any, "B M"]
    """False where the row has no such rollout."""
    prompt_ids: Int[Any, "B T"] | None = None
    """Which prompt of the row a token belongs to or answers, from 1; 0: padding. None: no prompt is shared."""
    old_logprobs: Float[Any, "B T"] | None = None
    """By the policy at the start of the batch. None: the objective needs none, or the batch makes one update only, where
    that is the policy itself."""
    reference_logprobs: Float[Any, "B T"] | None = None
    """By the model that the run started from. None: neither the objective nor ``objective.kl_weight`` needs them."""

    @property
    def response_ids(self) -> Any:
        """``segment_ids`` at response tokens, 0 elsewhere: what the objectives sum by."""
        return self.segment_ids * self.response_mask


Metrics = dict[str, Any]
"""Flat ``area/name`` -> number; every name is described in docs/metrics.md."""

"""What an objective is: a record of its advantages, its loss, what it needs, and its options."""

import dataclasses
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Array, Bool, Float

from oapl_jax.config.section import Section
from oapl_jax.types import TrainBatch


class ObjectiveOptions(Section):
    """Options of an objective that has none; the options of others derive from it."""


AnyOptions = TypeVar("AnyOptions", bound=ObjectiveOptions)


@dataclasses.dataclass(frozen=True)
class Objective(Generic[AnyOptions]):
    """One file of this room, and one line in ``catalogue.py``."""

    name: str
    """As ``objective.name`` gives it."""
    advantages: Callable[[Float[np.ndarray, "G"], Bool[np.ndarray, "G"], AnyOptions], Float[np.ndarray, "G"]]
    """Rewards of a group, whether each response is correct, and options, to the advantages; on the host, float64."""
    losses: Callable[[Float[Array, "B T"], TrainBatch, AnyOptions, Float[Array, ""]], Float[Array, "B M"]]
    """The loss of each rollout; the loss of a batch is their mean over rollouts.

    Its arguments are the learner's log-probabilities (``[:, t]`` scores token t; values outside the responses are
    ignored, even NaN), the rows, the options, and the mean number of response tokens of a rollout of the whole batch.
    """
    options: type[AnyOptions]
    """Declares the keys of the section ``objective`` that belong to it, with their defaults."""
    clipped: Callable[[Float[Array, "B T"], TrainBatch, AnyOptions], Bool[Array, "B T"]] | None = None
    """Response tokens whose gradient its clip or mask removes or bounds, for ``learner/clipped``; None: it has neither.

    Its arguments are the first three of ``losses``; values outside the responses are ignored.
    """
    needs_sampler_logprobs: bool = True
    """Data without the sampler's log-probabilities have to be scored first."""
    needs_old: bool = False
    """Needs log-probabilities of the learner before the update."""
    needs_reference: bool = False
    """Needs log-probabilities of the model that the run started from."""

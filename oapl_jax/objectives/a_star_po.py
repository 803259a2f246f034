"""A*-PO (arXiv 2505.20686): the squared regression onto r - V*, with a fixed reference in the place of the sampler.

V* comes from samples of the reference, which ``oapl-jax generate`` draws once before the run.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from oapl_jax.config.section import Positive
from oapl_jax.objectives import oapl
from oapl_jax.objectives.objective import Objective
from oapl_jax.types import TrainBatch


class AStarPoOptions(oapl.OaplOptions):
    """The temperatures, by default those of TRL's trainer, and where V* comes from."""

    beta1: Positive = 0.5
    """Temperature of V*."""
    beta2: Positive = 1e-3
    """Weight of the log-ratio to the reference."""
    values: str
    """``run.dir`` of an ``oapl-jax generate`` that drew, from the model that the run starts from, responses to all prompts of
    the run: 8 of each in that paper (``sampler.group_size``)."""


def losses(
    logprobs: Float[Array, "B T"], rows: TrainBatch, options: AStarPoOptions, tokens_per_rollout: Float[Array, ""]
) -> Float[Array, "B M"]:
    """(beta2 * log(pi / pi_reference) - (r - V*))^2 of each rollout, that paper's second stage."""
    with jax.named_scope("a_star_po"):
        num_rollouts = rows.advantages.shape[1]
        assert rows.reference_logprobs is not None
        ratios = oapl.log_ratios(logprobs, rows.reference_logprobs, rows.response_ids, num_rollouts)
        return jnp.square(options.beta2 * ratios - rows.advantages)


OBJECTIVE = Objective(
    name="a_star_po",
    advantages=lambda rewards, is_correct, options: np.asarray(rewards, np.float64),
    losses=losses,
    options=AStarPoOptions,
    needs_sampler_logprobs=False,
    needs_reference=True,
    needs_values=True,
)

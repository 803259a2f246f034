"""From the tokens of a row to the rollouts that are packed in it, and back."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def segment_sums(values: Float[Array, "B T"], segment_ids: Int[Array, "B T"], num_segments: int) -> Float[Array, "B M"]:
    """The sum of each segment's values, float32; ids from 1, values at id 0 are left out, even NaN.

    A masked sum and not a scatter: it is exact to float32 in any order of tokens, and a mesh may split T.
    """
    is_member = segment_ids[..., None] == jnp.arange(1, num_segments + 1)
    return jnp.sum(jnp.where(is_member, values.astype(jnp.float32)[..., None], 0.0), axis=-2)


def tokens_of(is_chosen: Bool[Array, "B M"], segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Whether a token belongs to a chosen segment; ids from 1."""
    is_member = segment_ids[..., None] == jnp.arange(1, is_chosen.shape[-1] + 1)
    return jnp.any(is_member & is_chosen[..., None, :], axis=-1)

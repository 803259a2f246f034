"""Sums over the rollouts that are packed in a row, and values of a rollout at its tokens."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def segment_sums(values: Float[Array, "B T"], segment_ids: Int[Array, "B T"], num_segments: int) -> Float[Array, "B M"]:
    """The sum of each segment's values, float32; ids from 1, values at id 0 are left out, even NaN.

    A masked sum and not a scatter: it is exact to float32 in any order of tokens, and a mesh may split T.
    """
    is_member = segment_ids[..., None] == jnp.arange(1, num_segments + 1)
    return jnp.sum(jnp.where(is_member, values.astype(jnp.float32)[..., None], 0.0), axis=-2)


def at_tokens(values: Float[Array, "B M"], segment_ids: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """At each token the value of its segment; ids from 1, at id 0 the first segment's."""
    return jnp.take_along_axis(values, jnp.maximum(segment_ids - 1, 0), axis=-1)

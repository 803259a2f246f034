"""Grouped-query attention in plain XLA, under any mask."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Finite, so that a row that may see nothing gives numbers (which nobody reads) and not NaN.
MASKED = jnp.finfo(jnp.float32).min


def attend(
    query: Float[Array, "B T H C"],
    key: Float[Array, "B S K C"],
    value: Float[Array, "B S K C"],
    mask: Bool[Array, "#B T S"],
) -> Float[Array, "B T H C"]:
    """Softmax attention; each group of H/K query heads shares one key/value head.

    Queries are folded to ``[B, T, K, H/K, C]`` instead of repeating keys and values. Scores and softmax are float32;
    the result has the query's dtype. Queries and keys come after norm and rope; the mask is True where query t may see
    slot s.
    """
    B, T, H, C = query.shape
    K = key.shape[2]
    with jax.named_scope("attention"):
        # g: the H/K query heads of a kv head.
        query_BTKgC = query.reshape(B, T, K, H // K, C)
        scores = jnp.einsum("BTKgC,BSKC->BKgTS", query_BTKgC, key, preferred_element_type=jnp.float32) * C**-0.5
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], scores, MASKED), axis=-1)
        output = jnp.einsum("BKgTS,BSKC->BTKgC", weights.astype(value.dtype), value)
        return output.reshape(B, T, H, C).astype(query.dtype)

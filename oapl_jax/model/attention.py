"""Grouped-query attention in plain XLA: for whole rows, and for one query over a cache."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Finite, so that a row that may see nothing gives numbers (which nobody reads) and not NaN.
MASKED = jnp.finfo(jnp.float32).min


def attend(
    query: Float[Array, "B T H C"],
    key: Float[Array, "B S K C"],
    value: Float[Array, "B S K C"],
    mask: Bool[Array, "#B T S"],
) -> Float[Array, "B T H C"]:
    """Softmax attention; each group of H/K query heads shares one key/value head.

    Queries are folded to ``[B, T, K, H/K, C]`` instead of repeating keys and values H/K times in memory.
    Scores and softmax are float32; the result has the query's dtype.

    Args:
        query: after norm and rope.
        key: of the row itself (S = T), or of what it follows too.
        value: like ``key``.
        mask: True where query t may see slot s.
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


def causal_mask(length: int) -> Bool[Array, "1 T T"]:
    """Of rows that are padded on the right, where causality alone hides the padding from every real token."""
    return jnp.tril(jnp.ones((1, length, length), dtype=bool))


def attend_two(
    query: Float[Array, "B 1 H C"],
    old_key: Float[Array, "B K C S"],
    old_value: Float[Array, "B K S C"],
    num_old: Int[Array, "B"],
    new_key: Float[Array, "B K C T"],
    new_value: Float[Array, "B K T C"],
    num_new: Int[Array, ""],
) -> Float[Array, "B 1 H C"]:
    """Attention of one query a sequence over two caches, together one: what a chunk began with, and what it added.

    The layouts are those that a decode step reads fastest on a CPU. Scores and softmax are float32.

    Args:
        query: after norm and rope.
        old_key: the first ``num_old[b]`` slots of sequence b are visible.
        old_value: like ``old_key``.
        num_old: may be 0.
        new_key: the first ``num_new`` slots are visible, at least one.
        new_value: like ``new_key``.
        num_new: the same for every sequence.
    """
    B, _, H, C = query.shape
    K, S, T = old_key.shape[1], old_key.shape[3], new_key.shape[3]
    with jax.named_scope("attention"):
        query_BKgC = query.reshape(B, K, H // K, C)

        def score(key: Array, is_visible: Array) -> Array:
            scores = jnp.einsum(
                "BKgC,BKCS->BKgS", query_BKgC, key.astype(query.dtype), preferred_element_type=jnp.float32
            )
            return jnp.where(is_visible, scores * C**-0.5, MASKED)

        old = score(old_key, jnp.arange(S) < num_old[:, None, None, None])
        new = score(new_key, jnp.arange(T) < num_new)
        largest = jnp.maximum(jnp.max(old, axis=-1), jnp.max(new, axis=-1))[..., None]
        old, new = jnp.exp(old - largest), jnp.exp(new - largest)
        total = jnp.sum(old, axis=-1) + jnp.sum(new, axis=-1)
        output = jnp.einsum("BKgS,BKSC->BKgC", old.astype(query.dtype), old_value.astype(query.dtype))
        output += jnp.einsum("BKgS,BKSC->BKgC", new.astype(query.dtype), new_value.astype(query.dtype))
        return (output / total[..., None]).reshape(B, 1, H, C).astype(query.dtype)

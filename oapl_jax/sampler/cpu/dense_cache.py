"""A cache of keys and values for decoding a chunk on a CPU: one array a layer instead of pages.

Plain XLA reads an array faster than it gathers pages in every step. So the pages are gathered once a chunk, as far as
the longest live sequence reaches. What the steps add goes to short arrays, which are written back when the chunk ends.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from oapl_jax.model.attention import MASKED
from oapl_jax.model.quantized import Int8, dequantize
from oapl_jax.model.qwen import Attend
from oapl_jax.sampler.kv_cache import KVPages, MaybeInt8, encode, in_layers


class DenseKV(NamedTuple):
    """Keys and values of the sequences of one chunk, by layer, in the layouts that a CPU reads fastest."""

    k: tuple[Float[Array, "B K C S"] | Int8, ...]
    v: tuple[Float[Array, "B K S C"] | Int8, ...]


def gather(pages: KVPages, table: Int[Array, "B M"], num_layers: int, dtype: DTypeLike) -> DenseKV:
    """The pages of each sequence side by side, as floats: S is M pages long."""
    ids = in_layers(table, num_layers, pages.k)
    B, M = table.shape
    K, _, page_size, C = pages.k.shape

    def layer_of(from_: MaybeInt8, layer: int) -> Array:
        pages_of = lambda array: array.at[:, ids[layer]].get(mode="clip", wrap_negative_indices=False)  # noqa: E731
        return dequantize(jax.tree.map(pages_of, from_), dtype)

    with jax.named_scope("gather_pages"):
        # [K, B, M, page, C] -> [B, K, C, M, page] and [B, K, M, page, C]
        k = [jnp.transpose(layer_of(pages.k, i), (1, 0, 4, 2, 3)) for i in range(num_layers)]
        v = [jnp.transpose(layer_of(pages.v, i), (1, 0, 2, 3, 4)) for i in range(num_layers)]
        return DenseKV(
            tuple(layer.reshape(B, K, C, M * page_size) for layer in k),
            tuple(layer.reshape(B, K, M * page_size, C) for layer in v),
        )


def make_empty(like: KVPages, num_layers: int, num_sequences: int, length: int) -> DenseKV:
    """Zeros for ``length`` further tokens of each sequence, in the precision of the pages."""
    K = like.k.shape[0]
    k = jax.tree.map(lambda array: jnp.zeros((num_sequences, K, array.shape[3], length), array.dtype), like.k)
    v = jax.tree.map(lambda array: jnp.zeros((num_sequences, K, length, array.shape[3]), array.dtype), like.v)
    return DenseKV((k,) * num_layers, (v,) * num_layers)


def attend_chunk(old: DenseKV, num_old: Int[Array, "B"], step: Int[Array, ""]) -> Attend:
    """An ``Attend`` for step ``step`` of a chunk.

    Sequence b sees ``num_old[b]`` tokens of ``old``, and its cache, the ``DenseKV`` of what the chunk has added.
    """

    def attend(layer: Any, query: Array, key: Array, value: Array, cache: DenseKV) -> tuple[Array, DenseKV]:
        def put(to: MaybeInt8, new: Array, axis: int) -> MaybeInt8:
            start = [step if i == axis else jnp.zeros_like(step) for i in range(4)]
            return jax.tree.map(
                lambda to, new: jax.lax.dynamic_update_slice(to, jnp.moveaxis(new, 1, axis), start),
                to,
                encode(new, to),
            )

        new_k, new_v = put(cache.k[layer], key, 3), put(cache.v[layer], value, 2)
        added = dequantize(new_k, query.dtype), dequantize(new_v, query.dtype)
        output = attend_two(query, old.k[layer], old.v[layer], num_old, *added, step + 1)
        k = (*cache.k[:layer], new_k, *cache.k[layer + 1 :])
        return output, DenseKV(k, (*cache.v[:layer], new_v, *cache.v[layer + 1 :]))

    return attend


def scatter(
    pages: KVPages, new: DenseKV, table: Int[Array, "B M"], start: Int[Array, "B"], end: Int[Array, "B"]
) -> KVPages:
    """Writes what a chunk has added, positions ``start`` up to ``end`` of each sequence, to the pages."""
    page_size, num_layers = pages.k.shape[2], len(new.k)
    positions = start[:, None] + jnp.arange(new.v[0].shape[2])
    column = jnp.minimum(positions // page_size, table.shape[1] - 1)
    page = jnp.where(positions < end[:, None], jnp.take_along_axis(table, column, axis=1), pages.k.shape[1])
    ids = in_layers(page, num_layers, pages.k)

    def write(to: Array, *layers: Array, axes: tuple[int, ...]) -> Array:
        """All layers at once, ``axes`` in the order ``[K, L, B, T, C]``: a scatter a layer is slow to compile."""
        new = jnp.transpose(jnp.stack(layers), axes)
        return to.at[:, ids, positions % page_size].set(new, mode="drop")

    with jax.named_scope("scatter_pages"):
        return KVPages(
            jax.tree.map(functools.partial(write, axes=(2, 0, 1, 4, 3)), pages.k, *new.k),
            jax.tree.map(functools.partial(write, axes=(2, 0, 1, 3, 4)), pages.v, *new.v),
        )


def attend_two(
    query: Float[Array, "B 1 H C"],
    old_key: Float[Array, "B K C S"],
    old_value: Float[Array, "B K S C"],
    num_old: Int[Array, "B"],
    new_key: Float[Array, "B K C T"],
    new_value: Float[Array, "B K T C"],
    num_new: Int[Array, ""],
) -> Float[Array, "B 1 H C"]:
    """Attention of one query a sequence over two caches: what a chunk began with, and what it added.

    Sequence b sees ``num_old[b]`` slots of the first (maybe none), and ``num_new`` of the second (at least one).
    Scores and softmax are float32.
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

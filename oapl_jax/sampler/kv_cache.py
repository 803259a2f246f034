"""The paged cache of keys and values: its arrays, and writing prompts and tokens to it.

A page holds the keys and values of ``page_size`` consecutive tokens of one sequence in one layer. A sequence has one
table of page ids for all layers: page ``p`` of layer ``l`` is row ``l * P + p`` of the arrays, so that the layers can
be scanned with the arrays as the carry. Which page belongs to which sequence is decided on the host
(``sampler/page_pool.py``).

Decode steps read the pages where they lie (``sampler/paged_attention.py``), or from one array for each layer to which
a chunk copies them (``sampler/cpu/dense_cache.py``).

Where the cache is int8, each "Array" here is an ``Int8`` whose scale is that of one token and head. Keys and values
are quantised before anything sees them, so where a chunk ends does not matter.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from oapl_jax.model import row_attention
from oapl_jax.model.quantized import Int8, dequantize, quantize
from oapl_jax.model.qwen import QwenConfig

MaybeInt8 = Array | Int8


class KVPages(NamedTuple):
    """Keys (after norm and rope) and values of all layers; "N" is layers x pages, "S" tokens of a page.

    Head K of width C is head J of width W, where several are joined (``paged_attention.joined_heads``).
    """

    k: Float[Array, "J N S W"] | Int8
    v: Float[Array, "J N S W"] | Int8


class PromptKV(NamedTuple):
    """Keys and values of a right-padded prompt, before they are in pages."""

    k: Float[Array, "L 1 P K C"] | Int8
    v: Float[Array, "L 1 P K C"] | Int8


def make_pages(config: QwenConfig, num_pages: int, page_size: int, dtype: DTypeLike, joined: int = 1) -> KVPages:
    """Empty pages, ``num_pages`` for each layer, with ``joined`` kv heads side by side."""
    num_heads, width = config.num_key_value_heads // joined, config.head_dim * joined
    shape = (num_heads, config.num_hidden_layers * num_pages, page_size, width)
    return KVPages(_zeros(shape, dtype), _zeros(shape, dtype))


def page_bytes(config: QwenConfig, page_size: int, dtype: DTypeLike) -> int:
    """Bytes of one page id, over all layers, keys and values."""
    one = jax.eval_shape(lambda: _zeros((config.head_dim,), dtype))
    num_heads = 2 * config.num_hidden_layers * config.num_key_value_heads
    return num_heads * page_size * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(one))


def make_prompt_kv(config: QwenConfig, length: int, dtype: DTypeLike) -> PromptKV:
    """Zeros, for ``attend_prompt`` to fill."""
    shape = (config.num_hidden_layers, 1, length, config.num_key_value_heads, config.head_dim)
    return PromptKV(_zeros(shape, dtype), _zeros(shape, dtype))


def _zeros(shape: tuple[int, ...], dtype: DTypeLike) -> MaybeInt8:
    zeros = jnp.zeros(shape, dtype)
    return Int8(zeros, jnp.zeros((*shape[:-1], 1), jnp.float32)) if zeros.dtype == jnp.int8 else zeros


def encode(new: Array, like: MaybeInt8) -> MaybeInt8:
    """Keys or values in the precision of the cache; the last axis shares a scale."""
    return quantize(new, (-1,)) if isinstance(like, Int8) else new.astype(like.dtype)


def attend_prompt(
    layer: Any, query: Array, key: Array, value: Array, cache: PromptKV, *, start: Any, mesh: Mesh
) -> tuple[Array, PromptKV]:
    """Causal attention of a part of the prompt, from ``start`` on; keeps its keys and values. See ``qwen.Attend``.

    The number 0 in place of an array says that the part is the whole prompt.
    """
    new = PromptKV(encode(key, cache.k), encode(value, cache.v))
    place = (layer, 0, start, 0, 0)
    cache = jax.tree.map(lambda to, new: jax.lax.dynamic_update_slice(to, new[None], place), cache, new)
    seen = new if isinstance(start, int) else jax.tree.map(lambda of_all: of_all[layer], cache)
    key, value = dequantize(seen.k, query.dtype), dequantize(seen.v, query.dtype)
    kind = row_attention.choose(
        mesh.devices.flat[0], query.dtype, query.shape[1], key.shape[1], query.shape[3], is_packed=False
    )
    return row_attention.attend_rows(query, key, value, kind=kind, mesh=mesh, start=start), cache


def write_prompt(
    pages: KVPages,
    prompt: PromptKV,
    full_pages: Int[Array, "M"],
    length: Int[Array, ""],
    tail_pages: Int[Array, "B"],
) -> KVPages:
    """Writes the full pages of a prompt once, and its last, partial page once for each sequence.

    Args:
        pages: is updated in place where the caller donates it.
        prompt: P is a multiple of the page size.
        full_pages: page id of each page; out of range: not written.
        length: of the prompt.
        tail_pages: page ids of the sequences' own copies of the partial page; out of range: not written.
    """
    page_size, num_layers = pages.k.shape[2], prompt.k.shape[0]
    # The start is inside the array wherever the page is written at all.
    tail_start = jnp.minimum(length // page_size * page_size, prompt.k.shape[2] - page_size)

    def write(to: Array, new: Array) -> Array:
        new = new.reshape(*new.shape[:3], to.shape[0], -1)
        whole = new.reshape(num_layers, -1, page_size, *new.shape[3:])
        to = to.at[:, in_layers(full_pages, num_layers, to)].set(jnp.moveaxis(whole, 3, 0), mode="drop")
        tail = jnp.moveaxis(jax.lax.dynamic_slice_in_dim(new[:, 0], tail_start, page_size, axis=1), 2, 0)
        return to.at[:, in_layers(tail_pages, num_layers, to)].set(tail[:, :, None], mode="drop")

    with jax.named_scope("write_prompt"):
        return jax.tree.map(write, pages, KVPages(*prompt))


def put_tokens(
    pages: Float[Array, "J N S W"] | Int8,
    layer: Any,
    num_layers: int,
    table: Int[Array, "B M"],
    positions: Int[Array, "B"],
    is_live: Array,
    new: Float[Array, "B 1 K C"],
) -> MaybeInt8:
    """Writes one token of each live sequence to its page of one layer; for paged decoding."""
    page_size, num_pages = pages.shape[2], pages.shape[1] // num_layers
    column = jnp.minimum(positions // page_size, table.shape[1] - 1)
    page = jnp.take_along_axis(table, column[:, None], axis=1)[:, 0] + layer * num_pages
    page = jnp.where(is_live, page, pages.shape[1])
    # The heads are named one by one: with a slice in their place XLA copies the whole array on a TPU
    # wherever a device holds more than one head.
    heads = jnp.arange(pages.shape[0])[:, None]

    def put(to: Array, new: Array) -> Array:
        new = jnp.moveaxis(new.reshape(len(new), to.shape[0], -1), 1, 0)
        return to.at[heads, page[None], (positions % page_size)[None]].set(new, mode="drop")

    return jax.tree.map(put, pages, encode(new[:, 0], pages))


def in_layers(ids: Array, num_layers: int, array: MaybeInt8) -> Array:
    """Page ids in each layer ``[L, ...]``; an id out of range stays out of range in every layer."""
    num_pages = array.shape[1] // num_layers
    layers = jnp.arange(num_layers).reshape(-1, *[1] * ids.ndim)
    return jnp.where(ids < num_pages, ids + layers * num_pages, array.shape[1])

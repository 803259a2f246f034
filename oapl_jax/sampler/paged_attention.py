"""Attention of one new token a sequence over keys and values that lie in pages.

All layers share one pool of pages (``kv_cache.py``). A layer writes its new tokens in place and passes the whole pool
with ``table + l * (pages per layer)``: a kernel that took one layer's slice would get a copy of it in every step.

Dimension letters beyond the legend: "P" pages of the pool, "S" tokens of a page, "M" entries of a row's page table,
"W" width of a page: that of a head, or of the heads that it joins.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import paged_attention as tpu_kernel
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from oapl_jax.model.attention import MASKED
from oapl_jax.model.quantized import Int8, dequantize
from oapl_jax.model.row_attention import has_triton

Implementation = Literal["tpu", "gpu", "xla"]

TPU_BLOCK_TOKENS = 128, 512
"""Fewest and most tokens that the TPU kernel loads at a time; 512 are 0.5 MiB of its fast memory at head width 128 in bf16."""

TPU_TABLE_ENTRIES = 128 * 1024
"""Entries of a page table in one call of the TPU kernel, which holds the table in 1 MiB of scalar memory."""

TPU_LANES = 128
"""The TPU kernel takes head widths that are a multiple of this; narrower heads are joined (``joined_heads``)."""

GPU_BLOCK_TOKENS, GPU_MAX_SPLITS = 128, 16
"""Tokens of one product in the GPU kernel, and parts of a sequence that it computes side by side; its defaults."""


def choose_implementation(
    device: Any, dtype: DTypeLike, num_kv_heads: int, head_dim: int, tensor: int
) -> Implementation:
    """The implementation for a device (``jax.Device``), the dtype of the pages, the kv heads, and the axis ``tensor``.

    A GPU has a kernel for 16 bits and widths that are a power of two; float32 it would round to TF32. It was compiled
    for GPUs and has run interpreted, on no GPU; the parity gate compares what it gives with the learner.
    """
    if jnp.dtype(dtype) == jnp.int8:
        return "xla"
    if device.platform == "tpu" and joined_heads(num_kv_heads, head_dim, tensor):
        return "tpu"
    if has_triton(device) and jnp.dtype(dtype).itemsize == 2 and head_dim >= 16 and head_dim.bit_count() == 1:
        return "gpu"
    return "xla"


def joined_heads(num_kv_heads: int, head_dim: int, tensor: int) -> int:
    """How many kv heads lie side by side in a page for the TPU kernel, which then sees fewer and wider heads.

    1 for a width of 128, 2 for 64. 0 where that number does not divide the heads, or where joined heads could not be
    split over ``tensor`` as the heads themselves can.
    """
    joined = math.lcm(head_dim, TPU_LANES) // head_dim
    if num_kv_heads % joined or (num_kv_heads % tensor == 0 and num_kv_heads // joined % tensor):
        return 0
    return joined


def paged_attend(
    query: Float[Array, "B H C"],
    k_pages: Float[Array, "J P S W"] | Int8,
    v_pages: Float[Array, "J P S W"] | Int8,
    page_table: Int[Array, "B M"],
    lengths: Int[Array, "B"],
    *,
    mesh: Mesh,
    implementation: Implementation,
    interpret: bool = False,
) -> Float[Array, "B H C"]:
    """Softmax attention of one query a row over the first ``lengths[b]`` tokens of the row's pages.

    The kernels run under ``shard_map``: query heads are split over mesh axis ``tensor``, kv heads too where it divides
    them (otherwise every device holds all, as in ``sharding.shardings``). Scores and softmax are float32; ``"tpu"``
    rounds keys and values to bfloat16 whatever the pages' dtype, ``"gpu"`` rounds queries to the pages' dtype.

    The query comes after norm and rope, not scaled. Page ``page_table[b, i]`` holds tokens ``i * S`` to ``i * S + S - 1``
    of row b; entries beyond the row's length may be any number. Every number in the pages is finite, unused ones as
    well: hidden tokens get weight 0, and 0 * NaN is NaN. The result of a row of length 0 is finite and means nothing.
    ``interpret`` runs the kernel in Pallas's interpreter, for tests on a CPU.

    Pages for ``"tpu"`` may hold several kv heads side by side (``joined_heads``): their width C is then a multiple of
    the query's. A query is 0 where it meets the other heads, so its scores are those of its own, and of the output its
    own head's part is kept.

    Raises:
        ValueError: heads that the mesh cannot split, or int8 pages for a kernel.
    """
    (_, H, C), (K, P, S, width) = query.shape, k_pages.shape
    # Of the heads that are joined, the one that each query head belongs to.
    is_own = jax.nn.one_hot(jnp.arange(H) * K * (width // C) // H % (width // C), width // C)[:, :, None]
    with jax.named_scope("paged_attention"):
        # The kernels load whole blocks of the table, used or not.
        page_table = jnp.clip(page_table, 0, P - 1).astype(jnp.int32)
        lengths = jnp.clip(lengths, 0, page_table.shape[1] * S).astype(jnp.int32)
        if implementation == "xla":
            output = _attend_xla(query, k_pages, v_pages, page_table, lengths)
        elif isinstance(k_pages, Int8) or isinstance(v_pages, Int8):
            # The TPU kernel would take int8, but lays out a float32 scale for each number: five bytes a number.
            raise ValueError(f"int8 pages: kernel {implementation!r} takes floats only; choose implementation 'xla'")
        else:
            attend = functools.partial({"tpu": _attend_tpu, "gpu": _attend_gpu}[implementation], interpret=interpret)
            # The kernels do not scale. In float32: for most widths C**-0.5 is no power of two, and
            # bfloat16 would round again.
            scaled = query.astype(jnp.float32) * C**-0.5
            wide = (scaled[:, :, None] * is_own).reshape(-1, H, width)
            output = _over_mesh(attend, mesh, wide, k_pages, v_pages, page_table, lengths)
            output = (output.reshape(-1, H, width // C, C) * is_own).sum(2)
        return output.astype(query.dtype)


def _attend_xla(query: Array, k_pages: Any, v_pages: Any, page_table: Array, lengths: Array) -> Array:
    """Gathers the pages of each row; rounds where ``attention.attend`` does. Runs on any platform."""
    B, H, C = query.shape
    K, _, S, _ = k_pages.shape
    M = page_table.shape[1]
    query_BKgC = query.reshape(B, K, H // K, C)
    keys, values = (jax.tree.map(lambda array: array[:, page_table], pages) for pages in (k_pages, v_pages))
    if isinstance(keys, Int8):
        keys, values = dequantize(keys, query.dtype), dequantize(values, query.dtype)
    scores = jnp.einsum("BKgC,KBMSC->BKgMS", query_BKgC, keys, preferred_element_type=jnp.float32) * C**-0.5
    is_visible = jnp.arange(M * S).reshape(M, S) < lengths[:, None, None]
    weights = jax.nn.softmax(jnp.where(is_visible[:, None, None], scores, MASKED), axis=(-2, -1))
    output = jnp.einsum("BKgMS,KBMSC->BKgC", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return output.reshape(B, H, C)


def _attend_tpu(
    query: Array, k_pages: Array, v_pages: Array, page_table: Array, lengths: Array, *, interpret: bool
) -> Array:
    pages_per_block = tpu_block_pages(page_table.shape[1], k_pages.shape[2])
    page_table = _pad_table(page_table, pages_per_block)
    num_rows = max(1, TPU_TABLE_ENTRIES // page_table.shape[1])
    with pltpu.force_tpu_interpret_mode() if interpret else contextlib.nullcontext():
        outputs = [
            # A float32 query: the kernel keeps its running sum in the query's dtype.
            tpu_kernel.paged_attention(
                query[start : start + num_rows],
                k_pages,
                v_pages,
                lengths[start : start + num_rows],
                page_table[start : start + num_rows],
                pages_per_compute_block=pages_per_block,
            )
            for start in range(0, query.shape[0], num_rows)
        ]
    return jnp.concatenate(outputs)


def tpu_block_pages(num_entries: int, page_size: int) -> int:
    """Pages of a block. The kernel loads whole blocks, so that short tables have four small ones or more."""
    fewest, most = TPU_BLOCK_TOKENS
    quarter = 2 ** (num_entries * page_size // 4 - 1).bit_length()
    return max(1, min(num_entries, max(fewest, min(most, quarter)) // page_size))


def _attend_gpu(
    query: Array, k_pages: Array, v_pages: Array, page_table: Array, lengths: Array, *, interpret: bool
) -> Array:
    from jax.experimental.pallas.ops.gpu import paged_attention as gpu_kernel  # as in row_attention.py

    pages_per_block = max(1, GPU_BLOCK_TOKENS // k_pages.shape[2])
    num_splits = min(GPU_MAX_SPLITS, -(-page_table.shape[1] // pages_per_block))
    return gpu_kernel.paged_attention(
        query.astype(k_pages.dtype),
        k_pages,
        v_pages,
        _pad_table(page_table, num_splits * pages_per_block),
        lengths,
        pages_per_compute_block=pages_per_block,
        k_splits=num_splits,
        interpret=interpret,
    )


def _pad_table(page_table: Array, multiple: int) -> Array:
    """Appends pages that no length reaches, so that the kernel's blocks come out even."""
    return jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % multiple)))


def _over_mesh(
    attend: Callable[..., Array],
    mesh: Mesh,
    query: Array,
    k_pages: Array,
    v_pages: Array,
    page_table: Array,
    lengths: Array,
) -> Array:
    """A kernel on every device of the mesh; XLA cannot partition kernels by itself."""
    H, (K, P, _, _) = query.shape[1], k_pages.shape
    tensor = mesh.shape["tensor"]
    is_split = K % tensor == 0
    if not is_split and (tensor % K or H % tensor):
        raise ValueError(
            f"{H} query heads and {K} kv heads over tensor={tensor}: the kernel needs each device's query heads to"
            f" share one kv head or to have their own; choose a tensor that divides {K}, or a multiple of {K} that"
            f" divides {H}, or implementation 'xla'"
        )
    heads = PartitionSpec(None, "tensor")
    pages = PartitionSpec("tensor") if is_split else PartitionSpec()

    def on_device(query: Array, k_pages: Array, v_pages: Array, page_table: Array, lengths: Array) -> Array:
        if not is_split:
            # All kv heads are here and one is needed. Slicing it out would copy the pool, so the heads
            # are laid end to end instead, which moves nothing, and the table points into the one.
            head = jax.lax.axis_index("tensor") * K // tensor
            page_table = page_table + head * P
            k_pages, v_pages = (array.reshape(1, K * P, *array.shape[2:]) for array in (k_pages, v_pages))
        return attend(query, k_pages, v_pages, page_table, lengths)

    specs = heads, pages, pages, PartitionSpec(), PartitionSpec()
    mapped = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return mapped(query, k_pages, v_pages, page_table, lengths)

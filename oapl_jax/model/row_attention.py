"""Causal attention within the rollouts of packed rows, and within prompts: XLA, the TPU's splash kernel, cuDNN's, Triton's.

Rollouts of one prompt may share its tokens in a row (``Segments``): all but Triton's attention know that.

Each is linear in memory: scores exist for a block of queries at a time, in the forward and in the backward pass.
(But for cuDNN's where rollouts share a row or devices share its queries: it takes a mask then.)
On a mesh, rows are split over ``data`` and ``fsdp``, heads over ``tensor``, and queries over ``context``: each
device has its own queries, and gathers the keys and values of the whole row, which are few.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from oapl_jax.distributed.sharding import BATCH_AXES, on_devices
from oapl_jax.model import splash
from oapl_jax.model.attention import attend
from oapl_jax.model.segments import Segments, may_see

RowAttentionKind = Literal["xla", "splash", "cudnn", "triton"]


MOST_BLOCKS = 8
"""XLA: blocks of queries of a row. A block sees the keys up to its end only, so more blocks save up to half of the work."""

SHORTEST_BLOCK = 128
"""XLA: queries of a block at least, so that its products are large."""

TRITON_BLOCKS = (128, 64, 64, 64, 64, 64)
"""Queries and keys of a block in the forward pass, and twice in the backward pass: the most that all GPUs have room for."""

TRITON_CAPABILITY = 8
"""Triton compiles for NVIDIA's GPUs of this compute capability and later (Ampere), and cuDNN has its attention there."""


def choose(
    device: Any, dtype: Any, num_queries: int, num_keys: int, head_dim: int, *, is_packed: bool
) -> RowAttentionKind:
    """The fastest kind that a device (``jax.Device``) has for rows of T keys and T / ``context`` queries.

    cuDNN's is the fastest on a GPU, but it would take packed rows by a mask, with a gradient of the mask: T x T
    numbers each. And its gradients are known to be NaN where a masked row's length is an odd multiple of 64 (PyTorch's
    issue 196678).
    """
    if device.platform == "tpu" and num_queries % splash.LANES == 0 and head_dim % 64 == 0:
        return "splash"
    if has_triton(device) and jnp.dtype(dtype).itemsize == 2 and head_dim % 8 == 0:
        is_whole = num_queries == num_keys
        if is_whole and not is_packed:
            return "cudnn"
        if num_keys % TRITON_BLOCKS[0] == 0:
            return "triton" if is_whole else "cudnn"
    return "xla"


def shares_prompts(kind: RowAttentionKind) -> bool:
    """Whether rollouts may share their prompt: Triton's kernel knows one id of a token only."""
    return kind != "triton"


def has_triton(device: Any) -> bool:
    """Whether a device (``jax.Device``) is a GPU that Triton's kernels are compiled for."""
    # AMD's capabilities are words.
    major = device.compute_capability.split(".")[0] if device.platform == "gpu" else ""
    return major.isdigit() and int(major) >= TRITON_CAPABILITY


def attend_rows(
    query: Float[Array, "B T H C"],
    key: Float[Array, "B S K C"],
    value: Float[Array, "B S K C"],
    segments: Segments | None = None,
    *,
    kind: RowAttentionKind,
    mesh: Mesh | None = None,
    start: Any = 0,
    interpret: bool = False,
) -> Float[Array, "B T H C"]:
    """Softmax attention of each token over the tokens of its own rollout up to itself.

    Queries and keys come after norm and rope; each key serves H/K query heads. Without segments a row is one rollout,
    and padding comes only after it; then the queries may be a part of the row, from ``start`` on (an array). Without a
    mesh the arrays are on one device. ``interpret`` runs the TPU's or Triton's kernel on any platform, slowly. Scores
    and softmax are float32; the result has the query's dtype.
    """
    mesh = None if mesh is None or mesh.size == 1 else mesh
    is_packed = segments is not None
    if segments is not None and segments.prompts is not None and not shares_prompts(kind):
        raise ValueError(f"model.attention={kind} has no rows whose rollouts share a prompt; use model.attention=xla")
    with jax.named_scope("attention"):
        queries = keys = segments
        if segments is None and (kind in ("splash", "triton") or mesh is not None):
            queries, keys = (Segments(jnp.ones(x.shape[:2], jnp.int32)) for x in (query, key))
        key, value = (_divisible_heads(x, query.shape[2], mesh) for x in (key, value))
        fns = {
            "xla": _xla,
            "splash": functools.partial(splash.attend, interpret=interpret),
            "cudnn": functools.partial(_cudnn, is_packed=is_packed),
            "triton": functools.partial(_triton, interpret=interpret),
        }
        return _on_devices(fns[kind], mesh, query, key, value, queries, keys, start)


def _divisible_heads(x: Float[Array, "B T K C"], num_query_heads: int, mesh: Mesh | None) -> Float[Array, "B T J C"]:
    """Keys or values with their heads repeated, where there are too few for the axis ``tensor`` to split them."""
    num_heads, tensor = x.shape[2], 1 if mesh is None else mesh.shape["tensor"]
    if num_heads % tensor == 0:
        return x
    return jnp.repeat(x, (tensor if tensor % num_heads == 0 else num_query_heads) // num_heads, axis=2)


def _on_devices(
    attend_fn: Any,
    mesh: Mesh | None,
    query: Array,
    key: Array,
    value: Array,
    queries: Segments | None,
    keys: Segments | None,
    start: Any,
) -> Array:
    """Runs ``attend_fn`` on each device's queries, with the keys and values of its rows and heads.

    It gets the segments of queries and of keys, and the place of the first query in the row (the number 0 where the
    queries are the whole row).
    """
    if mesh is None:
        return attend_fn(query, key, value, queries, keys, start)
    is_whole = mesh.shape["context"] == 1 and isinstance(start, int)

    def on_device(query: Array, key: Array, value: Array, query_ids: Any, key_ids: Any, start: Any) -> Array:
        first = 0 if is_whole else start + jax.lax.axis_index("context") * query.shape[1]
        return attend_fn(query, key, value, query_ids, key_ids, first)

    of_queries, of_keys = P(BATCH_AXES, "context", "tensor"), P(BATCH_AXES, None, "tensor")
    in_specs = of_queries, of_keys, of_keys, P(BATCH_AXES, "context"), P(BATCH_AXES), P()
    mapped = on_devices(on_device, mesh, in_specs, of_queries)
    return mapped(query, key, value, queries, keys, jnp.asarray(start, jnp.int32))


def _xla(query: Array, key: Array, value: Array, query_ids: Any, key_ids: Any, start: Any) -> Array:
    T = query.shape[1]
    size = max(SHORTEST_BLOCK, -(-T // MOST_BLOCKS))
    outputs = []
    for first in range(0, T, size):
        last = min(first + size, T)
        seen = slice(last if isinstance(start, int) else None)  # keys after the block's end are in its future
        ids = _part(query_ids, slice(first, last)), _part(key_ids, seen)
        outputs.append(_attend_block(query[:, first:last], key[:, seen], value[:, seen], *ids, start + first))
    return jnp.concatenate(outputs, axis=1)


def _part(segments: Segments | None, tokens: slice) -> Segments | None:
    return jax.tree.map(lambda ids: ids[:, tokens], segments)


@functools.partial(jax.checkpoint, prevent_cse=False)
def _attend_block(query: Array, key: Array, value: Array, query_ids: Any, key_ids: Any, start: Any) -> Array:
    """Attention of consecutive queries from ``start`` on; the backward pass recomputes the scores."""
    return attend(query, key, value, _mask(query.shape[1], key.shape[1], query_ids, key_ids, start))


def _mask(num_queries: int, num_keys: int, query_ids: Any, key_ids: Any, start: Any) -> Array:
    """True where a query sees a key, ``[B, T, S]`` or ``[1, T, S]``."""
    mask = (start + jnp.arange(num_queries))[None, :, None] >= jnp.arange(num_keys)
    return mask if query_ids is None else mask & may_see(query_ids, key_ids)


def _cudnn(
    query: Array, key: Array, value: Array, query_ids: Any, key_ids: Any, start: Any, *, is_packed: bool
) -> Array:
    is_whole, mask = isinstance(start, int), None
    if is_packed or not is_whole:
        mask = _mask(query.shape[1], key.shape[1], query_ids, key_ids, start)[:, None]
    return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=is_whole, implementation="cudnn")


def _triton(
    query: Array, key: Array, value: Array, query_ids: Any, key_ids: Any, start: Any, *, interpret: bool
) -> Array:
    T, S, size = query.shape[1], key.shape[1], TRITON_BLOCKS[0]
    if T != S or T % size:
        raise ValueError(
            f"model.attention=triton needs rows of a multiple of {size} tokens that no axis context splits, not {T} of"
            f" {S} tokens a device; set learner.row_tokens, or model.attention=null"
        )
    from jax.experimental.pallas.ops.gpu import attention as triton  # JAX 0.12 warns of it, which concerns GPUs only

    del key_ids, start
    # It has one key and value head for each query head.
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    scale = query.shape[-1] ** -0.5
    return triton.mha(
        query,
        key,
        value,
        query_ids.rollouts,
        sm_scale=scale,
        causal=True,
        block_sizes=triton.BlockSizes(*TRITON_BLOCKS),
        interpret=interpret,
    )

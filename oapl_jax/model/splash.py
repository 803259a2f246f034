"""The TPU's splash attention for packed rows: it computes only those blocks of a row in which a query sees a key."""

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jaxtyping import Array, Bool, Float, Int

from oapl_jax.model.segments import Segments, may_see

LONGEST_BLOCK = 512
"""Queries and keys of a block at most; a block must divide the row, and be a multiple of ``LANES``."""

LANES = 128

MOST_SHARED_BLOCKS = 64
"""Blocks of a row at most, where prompts are shared and a block is not yet ``LONGEST_BLOCK``. Short blocks compute little
beside what is seen, but each of the row's blocks squared costs the kernel a step, even if it is skipped."""


def attend(
    query: Float[Array, "B T H C"],
    key: Float[Array, "B S K C"],
    value: Float[Array, "B S K C"],
    queries: Segments,
    keys: Segments,
    start: Any,
    *,
    interpret: bool,
) -> Float[Array, "B T H C"]:
    """Attention of the queries of a device, the first of which is at ``start`` of its row, row by row.

    Raises:
        ValueError: the queries do not divide into blocks.
    """
    T, S = query.shape[1], key.shape[1]
    size = block_size(T, S, shares_prompts=keys.prompts is not None)
    if size % LANES:
        raise ValueError(
            f"model.attention=splash needs rows of a multiple of {LANES * S // T} tokens (context={S // T}), not {S};"
            " set learner.row_tokens, or model.attention=null"
        )
    # One kernel for both gradients would need a copy of the query's gradient for each block of keys.
    sizes = splash.BlockSizes(size, size, size, size, size, size, size, size, use_fused_bwd_kernel=False)

    def one_row(row: tuple[Array, Array, Array, Segments, Segments]) -> Array:
        query, key, value, queries, keys = row
        by_query, by_key = find_blocks(queries, keys, start, size)
        kernel = splash.SplashAttentionKernel(
            by_query,
            by_query,
            by_key,
            block_sizes=sizes,
            is_mqa=False,
            save_residuals=False,
            mask_value=splash.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=None,
            residual_checkpoint_name=None,
            mask_function=operator.ge if keys.prompts is None else None,
            interpret=interpret,
        )
        ids = splash.SegmentIds(_prompts(queries), _prompts(keys))
        output: Any = kernel(*(x.swapaxes(0, 1) for x in (query, key, value)), segment_ids=ids)
        return output.swapaxes(0, 1)

    return jax.lax.map(one_row, (query * query.shape[-1] ** -0.5, key, value, queries, keys))


def block_size(num_queries: int, row_tokens: int, *, shares_prompts: bool) -> int:
    """Tokens of a block, where a device has these queries of a row; below ``LANES`` it is none."""
    return math.gcd(num_queries, shared_block(row_tokens) if shares_prompts else LONGEST_BLOCK)


def shared_block(row_tokens: int) -> int:
    """Tokens of a block of rows that share prompts."""
    size = LANES
    while size < LONGEST_BLOCK and size * MOST_SHARED_BLOCKS < row_tokens:
        size *= 2
    return size


def find_blocks(queries: Segments, keys: Segments, start: Any, size: int) -> tuple[MaskInfo, MaskInfo]:
    """What the kernel computes of a row, block of queries by block, and block of keys by block.

    The kernel itself compares the ids of prompts (of rollouts, where no prompt is shared), and without shared prompts
    also the places. Else it is given the masks of the blocks that some of its queries do not see whole. Among those
    of a block of queries there are few different ones. Let q be its first query; if that is a token of a prompt, its
    rollout begins with the prompt. Then the masks are those of the diagonal, of the block where q's prompt ends, of the
    block where q's rollout begins, and of all blocks between this and the diagonal, which differ in nothing. The other
    blocks lie in q's prompt, and each query of this prompt sees them whole. What the other queries see is on the
    diagonal.

    Args:
        queries: ids ``[T]``.
        keys: ids ``[S]`` of the whole row.
        start: place of the first query in the row; a multiple of ``size``.
        size: queries and keys of a block.
    """
    of_prompt = _prompts(keys)
    begins_prompt = _changes(of_prompt)
    begins_rollout = begins_prompt | _changes(keys.rollouts)
    ends_prompt = begins_rollout & (keys.rollouts != 0) & (begins_prompt | (jnp.roll(keys.rollouts, 1) == 0))

    # Of each block of queries: its number, and of its first query the starts of prompt and rollout, the prompt's end.
    diagonal = start // size + jnp.arange(len(queries.rollouts) // size)
    first = diagonal * size
    prompt, rollout, end = (
        jax.lax.cummax(jnp.where(here, jnp.arange(len(of_prompt)), 0))[first]
        for here in (begins_prompt, begins_rollout, ends_prompt)
    )
    is_padding = of_prompt[first] == 0
    prompt, rollout = jnp.where(is_padding, first, prompt), jnp.where(is_padding, first, rollout)

    blocks = jnp.arange(len(of_prompt) // size)
    low, high = blocks * size, (blocks + 1) * size
    is_of_prompt = (high > prompt[:, None]) & (low < end[:, None])
    is_seen = (low <= first[:, None]) & (is_of_prompt | (high > rollout[:, None]))
    if keys.prompts is None:
        places = start + jnp.arange(len(queries.rollouts))
        return _mask_info(is_seen, places=places), _mask_info(is_seen, places=places, by_key=True)

    masked = jnp.stack([diagonal, jnp.maximum(end - 1, 0) // size, rollout // size, rollout // size + 1], axis=1)
    masked = jnp.minimum(masked, diagonal[:, None])
    masks = _masks(queries, keys, first, masked, size)
    # The last one is that of all blocks which are none of the others.
    matches = (blocks == masked[:, :, None]).at[:, -1].set(True)
    numbers = jnp.argmax(matches, axis=1) + jnp.arange(len(first))[:, None] * masked.shape[1]
    is_whole = is_of_prompt & (high <= end[:, None])
    by_query = _mask_info(is_seen, is_whole, numbers, masks)
    return by_query, _mask_info(is_seen, is_whole, numbers, masks, by_key=True)


def _masks(
    queries: Segments, keys: Segments, first: Int[Array, "I"], blocks: Int[Array, "I K"], size: int
) -> Bool[Array, "I*K N N"]:
    """For each of the blocks of queries, whose first queries are given, the masks of some blocks of keys."""
    within = jnp.arange(size)
    of_queries = jax.tree.map(lambda ids: ids.reshape(-1, 1, size), queries)
    of_keys = jax.tree.map(lambda ids: ids.reshape(-1, size)[blocks], keys)
    is_past = (first[:, None] + within)[:, None, :, None] >= (blocks[:, :, None] * size + within)[:, :, None]
    return (is_past & may_see(of_queries, of_keys)).reshape(-1, size, size)


def _mask_info(
    is_seen: Bool[Array, "I J"],
    is_whole: Bool[Array, "I J"] | None = None,
    numbers: Int[Array, "I J"] | None = None,
    masks: Bool[Array, "M N N"] | None = None,
    places: Any = None,
    *,
    by_key: bool = False,
) -> MaskInfo:
    """The tables of the kernel, which goes through the blocks of keys for each block of queries, or the other way round.

    Where a block is not computed, the tables name what the next one needs, so that it is fetched meanwhile.

    Args:
        is_seen: blocks of queries and keys that are computed.
        is_whole: of these, the ones that need no mask.
        numbers: the masks of the others.
        masks: all masks.
        places: of the queries, for the kernel's own causal mask.
        by_key: the outer loop is over the blocks of keys.
    """
    turn = (lambda x: x.swapaxes(-1, -2)) if by_key else (lambda x: x)
    inner = jnp.broadcast_to(jnp.arange(turn(is_seen).shape[1]), turn(is_seen).shape)
    block_mask = is_seen.astype(jnp.int8)
    mask_next = None
    if is_whole is not None and numbers is not None:
        block_mask = jnp.where(is_whole, 2, block_mask)
        mask_next = turn(_next(turn(numbers), turn(is_seen & ~is_whole)))[None]
    return MaskInfo(
        data_next=turn(_next(inner, turn(is_seen)))[None],
        mask_next=mask_next,
        block_mask=block_mask[None],
        partial_mask_blocks=None if masks is None else turn(masks),
        q_sequence=places,
    )


def _next(values: Int[Array, "R C"], is_used: Bool[Array, "R C"]) -> Int[Array, "R C"]:
    """Of each place the value of the next one that is used, itself included."""
    count = values.size
    used = jnp.where(is_used.ravel(), jnp.arange(count), count - 1)
    return values.ravel()[jax.lax.cummin(used, reverse=True)].reshape(values.shape).astype(jnp.int16)


def _prompts(segments: Segments) -> Int[Array, "T"]:
    return segments.rollouts if segments.prompts is None else segments.prompts


def _changes(ids: Int[Array, "T"]) -> Bool[Array, "T"]:
    return (ids != jnp.roll(ids, 1)).at[0].set(True)

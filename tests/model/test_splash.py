"""Which blocks of a packed row the TPU's attention computes, and what it masks in them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oapl_jax.learner.batch import RowLayout, from_pairs
from oapl_jax.model import splash
from oapl_jax.model.segments import Segments, may_see

SIZE = 8


def random_row(rng, num_tokens, *, shares):
    """Groups of random lengths; a prompt has no shared token where it has one token only."""
    prompts, rollouts, number = [], [], 0
    for group in range(1, 30):
        shared = int(rng.choice([0, 1, 3, 20])) if shares else 0
        prompts += [group] * shared
        rollouts += [0] * shared
        for _ in range(rng.integers(1, 4) if shares else 1):
            number, length = number + 1, int(rng.choice([1, 2, 9, 30]))
            prompts += [group] * length
            rollouts += [number] * length
    num_used = num_tokens - int(rng.integers(0, 3 * SIZE))
    rows = [np.array(ids[:num_used] + [0] * (num_tokens - num_used), np.int32) for ids in (rollouts, prompts)]
    return Segments(*(jnp.asarray(row) for row in rows[: 1 + shares]))


def computed(info, queries, keys, start, *, by_key):
    """The mask that the kernel applies by these tables, and the blocks that it fetches, in its order."""
    ids = [np.asarray(x.rollouts if x.prompts is None else x.prompts) for x in (queries, keys)]
    same = ids[0][:, None] == ids[1]
    data_next, block_mask = np.asarray(info.data_next[0]), np.asarray(info.block_mask[0])
    visible, fetched = np.zeros(same.shape, bool), []
    places = [(i, j) for i in range(block_mask.shape[0]) for j in range(block_mask.shape[1])]
    for i, j in sorted(places, key=lambda place: place[::-1]) if by_key else places:
        fetched.append((j if by_key else i, int(data_next[i, j])))
        if not block_mask[i, j]:
            continue
        assert fetched[-1][1] == (i if by_key else j)
        block = np.s_[i * SIZE : (i + 1) * SIZE, j * SIZE : (j + 1) * SIZE]
        if info.mask_next is None:
            mask = np.asarray(info.q_sequence)[block[0], None] >= np.arange(len(ids[1]))[block[1]]
        else:
            mask = np.asarray(info.partial_mask_blocks)[int(info.mask_next[0, i, j])]
            mask = (mask.T if by_key else mask) | (block_mask[i, j] == 2)
        visible[block] = mask & same[block]
    return visible, fetched


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("num_parts", [1, 2])
def test_the_tables_say_what_a_query_sees(shares, num_parts):
    rng = np.random.default_rng(0)
    find = jax.jit(splash.find_blocks, static_argnums=3)
    for _ in range(60):
        keys = random_row(rng, 12 * SIZE, shares=shares)
        wanted = np.asarray(may_see(keys, keys)) & np.tri(12 * SIZE, dtype=bool)
        is_token = np.asarray(keys.rollouts if keys.prompts is None else keys.prompts) > 0
        for start in range(0, 12 * SIZE, 12 * SIZE // num_parts):
            part = np.s_[start : start + 12 * SIZE // num_parts]
            queries = jax.tree.map(lambda ids: ids[part], keys)  # noqa: B023
            for info, by_key in zip(find(queries, keys, start, SIZE), (False, True), strict=True):
                found, fetched = computed(info, queries, keys, start, by_key=by_key)
                np.testing.assert_array_equal(found[is_token[part]], wanted[part][is_token[part]])
                assert found.any(axis=1).all()  # no query without a key: it would be 0 / 0
                assert len(set(fetched)) <= np.count_nonzero(info.block_mask) + info.block_mask[0].shape[by_key]


def test_little_is_computed_beside_what_is_seen():
    """A group of 8 with a prompt and responses of 512 tokens: at most 1.3 times the visible pairs."""
    rng = np.random.default_rng(0)
    prompt, T = rng.integers(0, 9, 512), 37 * 128
    pairs = [(prompt, rng.integers(0, 9, 512)) for _ in range(8)]
    layout = RowLayout(8, 1024, T, shares_prompts=True, group_size=8, max_response_tokens=512)
    batch = from_pairs(pairs, layout)
    row = Segments(jnp.asarray(batch.segment_ids[0]), jnp.asarray(batch.prompt_ids[0]))
    num_seen = layout.full.pairs
    size = math.gcd(splash.shared_block(T), T)
    info, _ = splash.find_blocks(row, row, 0, size)
    assert num_seen == 511 * 512 / 2 + 8 * (513 * 514 / 2 + 511 * 513)
    assert (info.block_mask > 0).sum() * size**2 < 1.3 * num_seen


@pytest.mark.parametrize(("row_tokens", "size"), [(4736, 128), (8192, 128), (8320, 256), (20_000, 512), (65_536, 512)])
def test_blocks_of_shared_rows_are_short_where_rows_are(row_tokens, size):
    assert splash.shared_block(row_tokens) == size


def test_rollouts_of_a_row_cost_what_they_cost_alone():
    """A row of 16 rollouts of 512 tokens: one block each, not the 136 below the diagonal."""
    ids = jnp.repeat(jnp.arange(1, 17), 512)
    info, _ = splash.find_blocks(Segments(ids), Segments(ids), 0, 512)
    assert (info.block_mask > 0).sum() == 16

"""Rollouts that share rows: who shares, and that it changes no number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.test_step import CONFIG, VOCAB, assert_close, gradient, norm, run
from model import tiny
from oapl_jax.config.mesh import MeshConfig
from oapl_jax.distributed.sharding import make_meshes
from oapl_jax.learner.batch import RowLayout, from_pairs, pack, padding, place

ROW = 32


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(20, 50))
def test_every_rollout_is_in_one_row_that_has_room_for_it(lengths, row_tokens):
    rows = pack(lengths, row_tokens)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in row) for row in rows]
    assert max(used) <= row_tokens
    # First fit leaves no row that the next one's smallest rollout would have fitted into.
    for row, tokens in enumerate(used[:-1]):
        assert tokens + min(lengths[i] for i in rows[row + 1]) > row_tokens
    assert len(rows) <= 11 / 9 * np.ceil(sum(lengths) / row_tokens * 2) + 1


def test_the_longest_come_first():
    assert pack([2, 5, 4, 3, 6], 8) == [[4, 0], [1, 3], [2]]


def make_pairs(num_pairs=8, seed=3):
    rng = np.random.default_rng(seed)
    sizes = [(int(rng.integers(1, 5)), int(rng.integers(1, 11))) for _ in range(num_pairs)]
    pairs = [tuple(rng.integers(0, VOCAB, n).astype(np.int32) for n in size) for size in sizes]
    logprobs = [-rng.exponential(3.0, n).astype(np.float32) for _, n in sizes]
    return pairs, {"sampler_logprobs": logprobs, "advantages": rng.normal(size=num_pairs).tolist()}


def make_batch(layout, **options):
    pairs, values = make_pairs(**options)
    return from_pairs(pairs, layout, **values)


PACKED = RowLayout(8, 16, ROW)


def test_a_row_holds_rollouts_one_after_the_other():
    pairs, values = make_pairs()
    batch = from_pairs(pairs, PACKED, **values)
    num_used = int(batch.segment_mask.any(axis=1).sum())
    assert num_used < 8 / 2
    assert batch.segment_mask.sum() == 8
    found = []
    for row in range(num_used):
        assert (np.diff(batch.segment_ids[row][batch.segment_ids[row] > 0]) >= 0).all()
        for segment in np.flatnonzero(batch.segment_mask[row]):
            here = batch.segment_ids[row] == segment + 1
            assert batch.positions[row, here].tolist() == list(range(here.sum()))
            is_response = batch.response_mask[row, here]
            ids, logprobs = batch.tokens[row, here], batch.sampler_logprobs[row, here]
            assert not logprobs[~is_response].any()
            found.append((ids[~is_response].tolist(), ids[is_response].tolist(), logprobs[is_response].tolist()))
            found[-1] += (float(batch.advantages[row, segment]),)
    expected = [
        (prompt.tolist(), response.tolist(), logprobs.tolist(), float(np.float32(advantage)))
        for (prompt, response), logprobs, advantage in zip(pairs, *values.values(), strict=True)
    ]
    assert sorted(found) == sorted(expected)


def test_padding_is_the_share_of_computed_positions_without_a_token():
    pairs = [(np.ones(4, np.int32), np.ones(12, np.int32))] * 3
    assert padding(from_pairs(pairs, layout := RowLayout(4, 16)), layout) == pytest.approx(1 / 4)
    layout = RowLayout(4, 16, ROW, micro_batch_rows=1)
    assert padding(from_pairs(pairs, layout), layout) == pytest.approx(1 / 4)  # 2 rows of 32
    assert from_pairs(pairs, layout).tokens.shape == (4, ROW), "rows for the worst case, of which two are computed"


def test_the_number_of_rows_takes_few_values():
    layout = RowLayout(128, 64, 64, mesh=make_meshes(MeshConfig(trainer="fsdp=8"))[0])
    counts = {layout.num_rows(used) for used in range(1, 129)}
    assert len(counts) <= 8
    assert all(count % 8 == 0 for count in counts)
    assert all(used <= layout.num_rows(used) < used + 16 for used in range(1, 129))


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["oapl", "grpo", "supervised"])
def test_packed_equals_unpacked(objective):
    unpacked, metrics = run(make_batch(RowLayout(8, 16)), objective=objective)
    packed, packed_metrics = run(make_batch(PACKED), objective=objective)
    assert norm(gradient(unpacked)) > 0.1
    assert_close(gradient(packed), gradient(unpacked), atol=1e-5 * norm(gradient(unpacked)))
    assert packed_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_a_group_may_be_split_over_rows_and_micro_batches():
    whole, metrics = run(make_batch(PACKED))
    batch = make_batch(RowLayout(8, 16, ROW, micro_batch_rows=2))
    split, split_metrics = run(batch, num_micro_batches=4)
    assert_close(gradient(split), gradient(whole), atol=1e-5 * norm(gradient(whole)))
    assert split_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)


def score(batch):
    graphdef, params = tiny.split(CONFIG)
    return np.asarray(
        tiny.sequence_logprobs(
            *(graphdef, params, jnp.asarray(batch.tokens), jnp.asarray(batch.response_mask)),
            positions=jnp.asarray(batch.positions),
            segment_ids=jnp.asarray(batch.segment_ids),
            temperature=1.0,
            vocab_size=VOCAB,
        )[0]
    )


def test_no_token_changes_the_logprobs_of_another_rollout_or_of_earlier_tokens():
    batch = make_batch(PACKED)
    before = score(batch)
    row = int(batch.segment_mask.sum(axis=1).argmax())
    at = int(np.flatnonzero(batch.response_mask[row] & (batch.segment_ids[row] == 2))[0])
    tokens = batch.tokens.copy()
    tokens[row, at] = (tokens[row, at] + 1) % VOCAB
    after = score(batch._replace(tokens=tokens))
    changed = before != after
    allowed = (batch.segment_ids[row] == 2) & (np.arange(ROW) >= at)
    assert changed[row, at]
    assert not changed[row, ~allowed].any()
    assert not np.delete(changed, row, axis=0).any()


def test_a_packed_rollout_scores_as_alone():
    pairs, _ = make_pairs()
    packed = make_batch(PACKED)
    together = score(packed)
    alone = score(make_batch(RowLayout(8, 16)))
    for i, (prompt, response) in enumerate(pairs):
        expected = alone[i, len(prompt) : len(prompt) + len(response)]
        rows = [
            together[row, (packed.segment_ids[row] == s + 1) & packed.response_mask[row]]
            for row, s in zip(*np.nonzero(packed.segment_mask), strict=True)
            if packed.tokens[row, packed.segment_ids[row] == s + 1].tolist() == [*prompt, *response]
        ]
        np.testing.assert_allclose(rows[0], expected, atol=1e-5)


def test_rows_that_cannot_be_are_refused():
    mesh = make_meshes(MeshConfig(trainer="fsdp=2,context=4"))[0]
    with pytest.raises(ValueError, match=r"learner\.row_tokens=24 is less than the longest rollout, 40 tokens"):
        RowLayout(8, 40, 24)
    with pytest.raises(ValueError, match=r"learner\.row_tokens=42 does not divide over context=4"):
        RowLayout(8, 40, 42, mesh=mesh)
    with pytest.raises(ValueError, match=r"learner\.micro_batch_rows=3 does not divide over the 2 row shards"):
        RowLayout(8, 40, 64, 3, mesh)


def test_micro_batches_lie_one_after_the_other_with_their_rows_split_over_the_mesh():
    mesh = make_meshes(MeshConfig(trainer="data=2,context=4"))[0]
    layout = RowLayout(8, 32, 32, micro_batch_rows=2, mesh=mesh)
    batch = make_batch(RowLayout(8, 32, 32, 2), num_pairs=8)
    placed = place(batch, layout)
    assert placed.tokens.shape == (4, 2, 32)
    assert placed.tokens.addressable_shards[0].data.shape == (4, 1, 8)
    assert placed.advantages.addressable_shards[0].data.shape == (4, 1, 8)
    np.testing.assert_array_equal(jax.device_get(placed.tokens).reshape(8, 32), batch.tokens)

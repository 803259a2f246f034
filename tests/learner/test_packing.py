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
from oapl_jax.learner.batch import RowLayout, from_pairs, of_pairs, pack, padding, place
from oapl_jax.learner.step import make_scorer
from oapl_jax.model.segments import Segments, may_see

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
    layout = RowLayout(1024, 64, 64, mesh=make_meshes(MeshConfig(trainer="fsdp=8"))[0])
    counts = {layout.num_rows(used) for used in range(1, 1025)}
    assert len(counts) <= 24
    assert all(count % 8 == 0 for count in counts)
    assert all(used <= layout.num_rows(used) <= max(used + 8, used * 1.25) for used in range(1, 1025))
    assert RowLayout(6, 64, 64).num_rows(6) == 6


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
            segments=jax.tree.map(jnp.asarray, Segments(batch.segment_ids, batch.prompt_ids)),
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


SHARED = RowLayout(12, 16, ROW, shares_prompts=True)


def make_groups(sizes=(5, 1, 3, 3), seed=4):
    """Groups of these numbers of rollouts; two groups of three have one prompt."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, VOCAB, n).astype(np.int32) for n in (6, 1, 4)]
    pairs = [
        (prompt, rng.integers(0, VOCAB, int(rng.integers(1, 9))).astype(np.int32))
        for prompt, size in zip([*prompts, prompts[-1]], sizes, strict=True)
        for _ in range(size)
    ]
    logprobs = [-rng.exponential(3.0, len(response)).astype(np.float32) for _, response in pairs]
    return pairs, {"sampler_logprobs": logprobs, "advantages": rng.normal(size=len(pairs)).tolist()}


def rollouts_of(batch):
    """Each rollout as a row has it: prompt, response, their positions, its log-probabilities and advantage."""
    found = []
    for row, segment in zip(*np.nonzero(batch.segment_mask), strict=True):
        own = batch.segment_ids[row] == segment + 1
        (prompt,) = set(batch.prompt_ids[row, own])
        shared = (batch.prompt_ids[row] == prompt) & (batch.segment_ids[row] == 0)
        tokens, positions = (np.concatenate([x[row, shared], x[row, own]]) for x in (batch.tokens, batch.positions))
        assert positions.tolist() == list(range(len(tokens)))
        is_response = np.concatenate([np.zeros(shared.sum(), bool), batch.response_mask[row, own]])
        logprobs = batch.sampler_logprobs[row, own & batch.response_mask[row]]
        values = (logprobs.tolist(), float(batch.advantages[row, segment]))
        found.append((tokens[~is_response].tolist(), tokens[is_response].tolist(), *values))
    return found


@given(
    st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(0, 9), min_size=1, max_size=9)), max_size=6, min_size=1),
    st.integers(18, 60),
)
def test_rollouts_of_a_prompt_share_it_and_none_is_lost(groups, row_tokens):
    rng = np.random.default_rng(0)
    pairs = [
        (prompt, rng.integers(0, VOCAB, length).astype(np.int32))
        for prompt, lengths in [(rng.integers(0, VOCAB, p).astype(np.int32), lengths) for p, lengths in groups]
        for length in lengths
    ]
    logprobs = [rng.normal(size=len(response)).astype(np.float32) for _, response in pairs]
    advantages = rng.normal(size=len(pairs)).astype(np.float32).tolist()
    layout = RowLayout(len(pairs), 18, row_tokens, shares_prompts=True)
    batch = from_pairs(pairs, layout, sampler_logprobs=logprobs, advantages=advantages)
    expected = [
        (prompt.tolist(), response.tolist(), own.tolist(), advantage)
        for (prompt, response), own, advantage in zip(pairs, logprobs, advantages, strict=True)
    ]
    assert sorted(rollouts_of(batch)) == sorted(expected)
    for own, found in zip(logprobs, of_pairs(batch.sampler_logprobs, batch, pairs, layout), strict=True):
        assert found.tolist() == own.tolist()


def test_a_group_that_fits_into_a_row_has_its_prompt_once():
    prompt, responses = np.arange(10, dtype=np.int32), [np.ones(5, np.int32)] * 4
    layout = RowLayout(4, 16, 40, shares_prompts=True)
    batch = from_pairs([(prompt, response) for response in responses], layout)
    assert batch.segment_mask.sum(axis=1).tolist() == [4]
    assert (batch.prompt_ids > 0).sum() == 9 + 4 * 6, "9 tokens once; the last one and the response for each"
    assert padding(batch, layout) == pytest.approx(1 - 33 / 40)


@pytest.mark.parametrize(
    ("row_tokens", "shares"), [(None, False), (16, False), (40, False), (16, True), (24, True), (28, True), (60, True)]
)
def test_a_batch_of_full_rollouts_is_as_large_as_its_layout_says(row_tokens, shares):
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, VOCAB, (3, 11)).astype(np.int32)
    pairs = [(prompt, np.ones(5, np.int32)) for prompt in prompts for _ in range(4)]
    layout = RowLayout(12, 16, row_tokens, shares_prompts=shares, group_size=4, max_response_tokens=5)
    batch = from_pairs(pairs, layout)
    segments = Segments(*(jnp.asarray(ids) for ids in (batch.segment_ids, batch.prompt_ids) if ids is not None))
    is_token = batch.segment_ids + (batch.prompt_ids if shares else 0) > 0
    is_visible = np.asarray(may_see(segments, segments)) & np.tri(batch.tokens.shape[1], dtype=bool)
    assert layout.full == (
        batch.segment_mask.any(axis=1).sum(),
        is_token.sum(),
        batch.response_mask.sum(),
        is_visible[is_token].sum(),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "mesh"),
    [("oapl", "fsdp=1"), ("grpo", "fsdp=1"), ("supervised", "fsdp=1"), ("oapl", "data=2,context=4")],
)
def test_shared_prompts_change_no_gradient_and_no_metric(objective, mesh):
    pairs, values = make_groups()
    unshared, metrics = run(from_pairs(pairs, RowLayout(12, 16), **values), objective=objective)
    layout = RowLayout(12, 16, ROW, 4, shares_prompts=True)
    shared, shared_metrics = run(
        from_pairs(pairs, layout, **values), num_micro_batches=3, objective=objective, mesh=mesh
    )
    assert norm(gradient(unshared)) > 0.1
    assert_close(gradient(shared), gradient(unshared), atol=1e-5 * norm(gradient(unshared)))
    assert shared_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6)


def test_a_rollout_that_shares_its_prompt_scores_as_alone():
    pairs, values = make_groups()
    batch = from_pairs(pairs, SHARED, **values)
    alone_batch = from_pairs(pairs, layout := RowLayout(12, 16))
    alone = of_pairs(score(alone_batch), alone_batch, pairs, layout)
    for found, expected in zip(of_pairs(score(batch), batch, pairs, SHARED), alone, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_micro_batches_score_as_one():
    pairs, values = make_groups()
    graphdef, params = tiny.split(CONFIG)
    scorer = make_scorer(graphdef, temperature=1.0, vocab_size=VOCAB)
    layout = RowLayout(12, 16, ROW, micro_batch_rows=1, shares_prompts=True)
    batch = from_pairs(pairs, layout, **values)
    placed = place(batch, layout)
    num_used = int(batch.segment_mask.any(axis=1).sum())
    assert len(placed.tokens) == 12
    assert 1 < num_used < 12
    found = np.asarray(scorer(params, placed)).reshape(batch.tokens.shape)
    assert not found[num_used:].any()
    np.testing.assert_allclose(found, score(batch), atol=1e-5)


def test_no_token_of_a_response_changes_another_that_shares_its_prompt():
    pairs, _ = make_groups()
    batch = from_pairs(pairs, SHARED)
    before = score(batch)
    row = int(batch.segment_mask.sum(axis=1).argmax())
    at = int(np.flatnonzero(batch.response_mask[row] & (batch.segment_ids[row] == 2))[0])
    tokens = batch.tokens.copy()
    tokens[row, at] = (tokens[row, at] + 1) % VOCAB
    changed = before != score(batch._replace(tokens=tokens))
    allowed = (batch.segment_ids[row] == 2) & (np.arange(ROW) >= at)
    assert changed[row, at]
    assert not changed[row, ~allowed].any()
    assert not np.delete(changed, row, axis=0).any()


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

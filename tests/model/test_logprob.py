import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from oapl_jax.config.mesh import MeshConfig
from oapl_jax.distributed.sharding import make_meshes
from oapl_jax.model import logprob

B, T, D, V = 3, 7, 16, 40


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    hidden, unembedding = rng.normal(size=(B, T, D)), rng.normal(size=(D, V))
    return jnp.float32(hidden), jnp.float32(unembedding), jnp.asarray(rng.integers(0, 30, (B, T)))


@functools.partial(jax.jit, static_argnames=("letters", "temperature", "vocab_size", "chunk", "mesh"))
def score(hidden, unembedding, targets, mask=None, letters="DV", **options):
    mask = jnp.ones(targets.shape, bool) if mask is None else mask
    return logprob.token_logprobs(hidden, unembedding, letters, targets, mask, **options)


def naive(hidden, unembedding, targets, temperature, vocab_size):
    """NumPy, float64, whole logits."""
    logits = np.float64(hidden) @ np.float64(unembedding)[:, :vocab_size] / temperature
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return np.take_along_axis(log_p, np.asarray(targets)[..., None], -1)[..., 0], -(np.exp(log_p) * log_p).sum(-1)


# 21 tokens: no loop; 4 chunks of 2 x 3 rows with one token of padding; 7 of one token; more rows than the chunk.
@pytest.mark.parametrize(
    ("chunk", "temperature", "vocab_size"), [(21, 0.7, 30), (21, 1.0, V), (6, 0.7, 30), (5, 1.0, V), (2, 0.7, 30)]
)
def test_chunked_equals_naive(chunk, temperature, vocab_size):
    hidden, unembedding, targets = inputs()
    scored = score(hidden, unembedding, targets, temperature=temperature, vocab_size=vocab_size, chunk=chunk)
    for actual, expected in zip(scored, naive(hidden, unembedding, targets, temperature, vocab_size), strict=True):
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@functools.partial(jax.jit, static_argnames="chunk")
def gradients(hidden, unembedding, targets, chunk):
    weights = jnp.arange(B * T, dtype=jnp.float32).reshape(B, T) / 10 - 1

    def loss(hidden, unembedding):
        scored = score(hidden, unembedding, targets, temperature=0.7, vocab_size=30, chunk=chunk)
        return (weights * scored[0]).sum()

    return jax.grad(loss, argnums=(0, 1))(hidden, unembedding)


def test_gradients_of_chunks_are_those_of_the_whole_and_of_finite_differences():
    hidden, unembedding, targets = inputs()
    whole, chunked = gradients(hidden, unembedding, targets, 21), gradients(hidden, unembedding, targets, 6)
    for a, b in zip(whole, chunked, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    weights = np.arange(B * T).reshape(B, T) / 10 - 1
    step = np.zeros((D, V))
    step[3, 5] = 1e-5

    def loss(unembedding):
        return (weights * naive(hidden, unembedding, targets, 0.7, 30)[0]).sum()

    difference = (loss(np.float64(unembedding) + step) - loss(np.float64(unembedding) - step)) / 2e-5
    assert whole[1][3, 5] == pytest.approx(difference, rel=1e-3)
    # Ids that cannot be drawn get no gradient.
    assert np.all(np.asarray(whole[1])[:, 30:] == 0)


@pytest.mark.slow
def test_gradient_of_a_bfloat16_unembedding_is_summed_in_float32():
    """512 chunks: sums in bf16 would be off by several per cent."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(1, 512, D)) + 1, jnp.bfloat16)
    unembedding = jnp.asarray(rng.normal(size=(D, V)) / 8, jnp.bfloat16)
    targets = jnp.asarray(rng.integers(0, 4, (1, 512)))

    def loss(unembedding, chunk):
        scored = score(hidden, unembedding, targets, temperature=1.0, vocab_size=V, chunk=chunk)
        return scored[0].sum()

    exact = jax.grad(loss)(unembedding.astype(jnp.float32), 1024)
    chunked = jax.grad(loss)(unembedding, 1).astype(jnp.float32)
    error = jnp.abs(chunked - exact) / (jnp.abs(exact) + 1)
    # The result itself is bf16 (2**-8), each product of the sum too.
    assert error.max() < 2**-7


def test_an_id_beyond_the_vocabulary_has_probability_zero():
    hidden, unembedding, targets = inputs()
    logprobs, entropy = score(hidden, unembedding, targets.at[1, 2].set(35), temperature=1.0, vocab_size=30)
    assert logprobs[1, 2] == -jnp.inf
    assert np.isfinite(np.delete(logprobs.ravel(), T + 2)).all()
    assert np.isfinite(entropy).all()


def test_sequence_logprobs_score_each_token_given_those_before_it():
    graphdef, params = tiny.split(tiny.config("qwen3_wide_heads"))
    tokens = tiny.rows(2, 9)
    mask = jnp.ones((2, 9), bool).at[0, 6:].set(False).at[1, :3].set(False)
    logprobs, entropy = tiny.sequence_logprobs(graphdef, params, tokens, mask, temperature=0.8, vocab_size=45)
    logits = np.float64(tiny.logits(graphdef, params, tokens))[..., :45] / 0.8
    distribution = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert np.all(np.asarray(logprobs)[~mask] == 0)
    assert np.all(np.asarray(entropy)[~mask] == 0)
    assert np.all(logprobs[:, 0] == 0)
    for row, place in [(0, 1), (0, 5), (1, 3), (1, 8)]:
        if tokens[row, place] < 45:
            assert logprobs[row, place] == pytest.approx(
                np.log(distribution[row, place - 1, tokens[row, place]]), abs=1e-5
            )
        expected = -(distribution[row, place - 1] * np.log(distribution[row, place - 1])).sum()
        assert entropy[row, place] == pytest.approx(expected, abs=1e-5)


def test_padding_on_the_right_changes_nothing():
    graphdef, params = tiny.split(tiny.config("qwen3_wide_heads"))
    tokens, mask = tiny.rows(2, 9), jnp.arange(9) < jnp.array([[6], [9]])
    options = {"temperature": 1.0, "vocab_size": 48}
    expected = tiny.sequence_logprobs(graphdef, params, tokens[:1, :6], mask[:1, :6], **options)
    actual = tiny.sequence_logprobs(graphdef, params, jnp.where(mask, tokens, 0), mask, **options)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a[:1, :6], b, atol=1e-5)


def test_a_later_token_changes_no_earlier_logprob():
    graphdef, params = tiny.split(tiny.config("qwen3_wide_heads"))
    tokens, mask = tiny.rows(2, 9), jnp.ones((2, 9), bool)
    changed = tokens.at[0, 5].set((tokens[0, 5] + 1) % 48)
    before, after = (
        tiny.sequence_logprobs(graphdef, params, rows, mask, temperature=1.0, vocab_size=48)[0]
        for rows in (tokens, changed)
    )
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert before[0, 5] != after[0, 5]


def test_tokens_outside_the_mask_are_not_scored_and_a_tied_unembedding_scores_the_same():
    hidden, unembedding, targets = inputs()
    mask = jnp.asarray(np.random.default_rng(1).random((B, T)) < 0.4)
    options = {"temperature": 0.7, "vocab_size": 30, "chunk": 4}
    whole = score(hidden, unembedding, targets, **options)
    tied = score(hidden, unembedding.T, targets, mask, letters="VD", **options)
    assert 2 < mask.sum() < B * T
    for found, expected in zip(tied, whole, strict=True):
        np.testing.assert_allclose(found, jnp.where(mask, expected, 0.0), atol=1e-5)


@pytest.mark.parametrize(
    ("words", "letters"),
    [("fsdp=2,context=2,tensor=2", "DV"), ("fsdp=2,context=2,tensor=2", "VD"), ("data=4,tensor=2", "DV")],
)
def test_logprobs_and_gradients_do_not_depend_on_the_mesh(words, letters):
    rng = np.random.default_rng(2)
    mesh, _ = make_meshes(MeshConfig(trainer=words))
    hidden, weight = jnp.float32(rng.normal(size=(4, 6, D))), jnp.float32(rng.normal(size=(D, V)))
    targets, mask = jnp.asarray(rng.integers(0, 30, (4, 6))), jnp.asarray(rng.random((4, 6)) < 0.6)
    weight = weight if letters == "DV" else weight.T
    weights = jnp.float32(rng.normal(size=(4, 6)))

    def loss(hidden, weight, mesh):
        options = {"temperature": 0.7, "vocab_size": 30, "chunk": 2, "mesh": mesh}
        scored = score(hidden, weight, targets, mask, letters, **options)
        return (weights * scored[0]).sum(), scored

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    for found, expected in zip(*(jax.tree.leaves(step(hidden, weight, m)) for m in (mesh, None)), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)

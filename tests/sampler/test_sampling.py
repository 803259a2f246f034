"""The processed law against a naive transcription, and the draws against the law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from oapl_jax.sampler.sampling import SamplingParams, draw, log_law

LOGITS = np.random.default_rng(0).normal(0, 2, 16).astype(np.float32)


def naive_law(params):
    logits = LOGITS[: params.vocab_size].astype(np.float64) / params.temperature
    probs = np.exp(logits) / np.exp(logits).sum()
    kept = np.argsort(-probs)[: params.top_k or None]
    probs = probs / probs[kept].sum()
    cut = int(np.searchsorted(np.cumsum(probs[kept]), params.top_p)) + 1
    kept = kept[:cut] if params.top_p < 1 else kept
    law = np.zeros(len(LOGITS))
    law[kept] = probs[kept] / probs[kept].sum()
    return law


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(16),
        SamplingParams(13),
        SamplingParams(16, temperature=0.6),
        SamplingParams(16, top_k=3),
        SamplingParams(13, top_k=100),
        SamplingParams(16, top_p=0.8),
        SamplingParams(16, top_p=1e-6),
        SamplingParams(13, temperature=1.3, top_k=7, top_p=0.9),
    ],
)
def test_law_equals_the_transcription_and_draws_follow_it(params):
    law = naive_law(params)
    logprobs = np.asarray(log_law(jnp.asarray(LOGITS)[None], params))[0]
    np.testing.assert_allclose(np.exp(logprobs), law, atol=1e-6)

    num_draws = 20_000
    keys = jnp.broadcast_to(jax.random.key(3), (num_draws,))
    logits = jnp.broadcast_to(jnp.asarray(LOGITS), (num_draws, 16))
    tokens, token_logprobs = jax.jit(draw, static_argnums=3)(keys, jnp.arange(num_draws), logits, params)
    np.testing.assert_allclose(token_logprobs, logprobs[tokens], atol=1e-6)
    counts = np.bincount(tokens, minlength=16)
    assert counts[law == 0].sum() == 0
    possible = law > 0
    if possible.sum() > 1:
        assert scipy.stats.chisquare(counts[possible], num_draws * law[possible] / law[possible].sum()).pvalue > 1e-4

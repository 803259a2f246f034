"""The divergence from the reference against a transcription with loops, value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np

from oapl_jax.objectives import reference
from objectives.rows import make_rows

IDS = np.array([[0, 1, 1, 0, 2, 2, 2], [0, 0, 1, 0, 0, 2, 0]])


def test_value_and_gradient_equal_the_transcription():
    rng = np.random.default_rng(8)
    logprobs, base = -rng.exponential(1.0, (2, *IDS.shape))
    outside = np.where(IDS > 0, 0, np.nan)
    rows = make_rows(np.zeros(IDS.shape), IDS, np.zeros((2, 2), np.float32))
    rows = rows._replace(reference_logprobs=jnp.asarray(base + outside))
    found, pull = jax.vjp(lambda lp: reference.divergences(lp, rows), jnp.asarray(logprobs + outside))

    expected, gradient = np.zeros((2, 2)), np.zeros(IDS.shape)
    for row, rollout in np.ndindex(2, 2):
        tokens = [t for t in range(IDS.shape[1]) if IDS[row, t] == rollout + 1]
        for t in tokens:
            ratio = np.exp(base[row, t] - logprobs[row, t])
            expected[row, rollout] += (ratio - np.log(ratio) - 1) / len(tokens)
            gradient[row, t] = (1 - ratio) / len(tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(pull(jnp.ones((2, 2)))[0], gradient, rtol=1e-5, atol=1e-7)

"""The parity gate: a freshly synced sampler and the learner must give tokens the same log-probabilities."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from oapl_jax.build.learner import Learner
from oapl_jax.config.commands import TrainConfig
from oapl_jax.distributed.sharding import to_host
from oapl_jax.learner.batch import from_pairs
from oapl_jax.sources.setup import Drawn
from oapl_jax.types import RunError


def check_parity(config: TrainConfig, learner: Learner, params: Any, drawn: Sequence[Drawn]) -> float:
    """Scores the sampler's rollouts with the learner; returns the mean absolute difference in nats a token.

    With a truncated distribution (top-k, top-p) the sampler's log-probabilities are higher by right, and the tolerance
    has to allow for it.

    Raises:
        RunError: the difference exceeds ``window.parity_tolerance``.
    """
    batch = from_pairs(
        [(rollout.prompt_ids, rollout.token_ids) for rollout in drawn],
        learner.rows,
        sampler_logprobs=[rollout.logprobs for rollout in drawn],
    )
    logprobs = to_host(learner.score(params, learner.place(batch))).reshape(batch.tokens.shape)
    difference = np.abs(logprobs - batch.sampler_logprobs)[batch.response_mask]
    mean = float(difference.mean())
    if not mean <= config.window.parity_tolerance:
        raise RunError(
            f"parity gate: with the same weights, sampler and learner differ by {mean:.3g} nats a token on average"
            f" (largest {difference.max():.3g}, {difference.size} tokens); window.parity_tolerance is"
            f" {config.window.parity_tolerance:g}. The learner would regress onto that error. Likely causes: a sampler"
            f" precision below the learner's (sampler.dtype={config.sampler.dtype}, kv_dtype={config.sampler.kv_dtype},"
            f" model.compute_dtype={config.model.compute_dtype}), a truncated distribution (top_k={config.sampler.top_k},"
            f" top_p={config.sampler.top_p}), or float32 products that a GPU or TPU rounds (set"
            " JAX_DEFAULT_MATMUL_PRECISION=float32 in the environment). Raise the tolerance only if the difference is explained"
        )
    return mean

"""The parity gate: a freshly synced sampler and the learner must give tokens the same log-probabilities."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from oapl_jax.build.job import Job, SamplerJob
from oapl_jax.distributed.sharding import to_host
from oapl_jax.learner.batch import from_pairs, place
from oapl_jax.learner.step import make_scorer
from oapl_jax.rollouts.sampling import Request
from oapl_jax.sampler.replicas import Replicas
from oapl_jax.types import RunError

PARITY_STREAM = 2**32 - 2
"""Stream of the sampling keys, see ``evaluation.held_out.EVALUATION_STREAM``."""


class ParityError(RunError):
    """Sampler and learner disagree about the policy."""


class Drawn(NamedTuple):
    """A rollout of the sampler."""

    prompt_ids: np.ndarray
    token_ids: np.ndarray
    logprobs: np.ndarray


def draw(job: SamplerJob, sampler_params: Any) -> list[Drawn]:
    """Samples a batch of rollouts, or as many as are decoded at once."""
    config = job.config
    replicas: Replicas[np.ndarray] = Replicas(job.engines, job.sampler_lock, fixed_shapes=True)
    prompts = [job.prompts[i] for i in range(min(job.groups_per_batch, config.sampler.groups_in_flight))]
    requests = [
        Request(
            prompt.token_ids,
            prompt.token_ids,
            config.sampler.group_size,
            (config.run.seed, PARITY_STREAM, i),
            job.sampling,
        )
        for i, prompt in enumerate(prompts)
    ]
    finished = replicas.run(sampler_params, requests)
    return [Drawn(ids, rollout.token_ids, rollout.logprobs) for ids, rollouts in finished for rollout in rollouts]


def check_parity(job: Job, learner_params: Any, drawn: Sequence[Drawn]) -> float:
    """Scores the sampler's rollouts with the learner, and compares.

    With a truncated distribution (top-k, top-p) the sampler's log-probabilities are higher by right; the
    comparison then measures that too, and the tolerance has to allow for it.

    Returns:
        Mean absolute difference in nats a token.

    Raises:
        ParityError: it exceeds ``window.parity_tolerance``.
    """
    config = job.config
    batch = from_pairs(
        [(rollout.prompt_ids, rollout.token_ids) for rollout in drawn],
        job.rows,
        sampler_logprobs=[rollout.logprobs for rollout in drawn],
    )
    score = make_scorer(job.graphdef, temperature=config.sampler.temperature, vocab_size=job.tokenizer.vocab_size)
    with job.trainer_lock:
        logprobs = to_host(score(learner_params, place(batch, job.rows))).reshape(batch.tokens.shape)
    difference = np.abs(logprobs - batch.sampler_logprobs)[batch.response_mask]
    mean = float(difference.mean())
    if not mean <= config.window.parity_tolerance:
        raise ParityError(
            f"parity gate: with the same weights, sampler and learner differ by {mean:.3g} nats a token on average"
            f" (largest {difference.max():.3g}, {difference.size} tokens); window.parity_tolerance is"
            f" {config.window.parity_tolerance:g}. The learner would regress onto that error. Likely causes: a sampler"
            f" precision below the learner's (sampler.dtype={config.sampler.dtype}, kv_dtype={config.sampler.kv_dtype},"
            f" model.compute_dtype={config.model.compute_dtype}), a truncated distribution (top_k={config.sampler.top_k},"
            f" top_p={config.sampler.top_p}), or float32 products that a GPU or TPU rounds (set"
            " JAX_DEFAULT_MATMUL_PRECISION=float32 in the environment). Raise the tolerance only if the difference is explained"
        )
    return mean

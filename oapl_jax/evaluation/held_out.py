"""pass@k of a policy on held-out prompts, in the course of training."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np

from oapl_jax.evaluation import passk
from oapl_jax.rewards.grader import Grader
from oapl_jax.rollouts.sampling import Request, SamplingDistribution
from oapl_jax.sampler.engine import Engine
from oapl_jax.sampler.replicas import Replicas
from oapl_jax.types import Metrics, Prompt, Verdict

EVALUATION_STREAM = 2**32 - 1
"""Stream of the sampling keys; policy versions, which number the training streams, never get there."""


class Counts(NamedTuple):
    """What was sampled, by problem ``[N]``."""

    sampled: np.ndarray
    graded: np.ndarray
    """Samples with a verdict."""
    correct: np.ndarray
    tokens: np.ndarray
    """Of the responses together."""


def evaluate(
    engines: Sequence[Engine],
    params: Any,
    prompts: Sequence[Prompt],
    decode: Callable[[list[int]], str],
    grader: Grader,
    *,
    sampling: SamplingDistribution,
    num_samples: int,
    seed: int,
    device_lock: AbstractContextManager,
    part: int = 0,
    num_parts: int = 1,
) -> Counts:
    """Samples prompts ``num_samples`` times each and grades the responses.

    The same seed draws the same random numbers for every policy, so that two evaluations of one run
    differ by the policy alone. Of several processes that share the prompts, each counts zeros for those of the others.

    Args:
        engines: of this process.
        params: the policy.
        prompts: all of them.
        decode: token ids to text.
        grader: of the responses.
        sampling: distribution of the samples.
        num_samples: of each prompt.
        seed: of the run.
        device_lock: see ``Scheduler``.
        part: of the prompts, that is sampled here: each ``num_parts``-th, from this one on.
        num_parts: processes that share them.
    """
    replicas: Replicas[tuple[int, Prompt]] = Replicas(engines, device_lock, fixed_shapes=True)
    requests = [
        Request(
            (i, prompt),
            prompt.token_ids,
            num_samples,
            (seed, EVALUATION_STREAM, i),
            sampling,
            needs_logprobs=False,
        )
        for i, prompt in list(enumerate(prompts))[part::num_parts]
    ]
    counts = Counts(*(np.zeros(len(prompts), int) for _ in Counts._fields))
    for (index, prompt), rollouts in replicas.run(params, requests):
        grades = grader.grade([(prompt, decode(r.token_ids.tolist()), r.finish_reason) for r in rollouts])
        counts.sampled[index] = len(rollouts)
        counts.graded[index] = sum(grade.verdict is not Verdict.INVALID for grade in grades)
        counts.correct[index] = sum(grade.verdict is Verdict.CORRECT for grade in grades)
        counts.tokens[index] = sum(len(rollout.token_ids) for rollout in rollouts)
    return counts


def summarize(counts: Counts, prompts: Sequence[Prompt]) -> Metrics:
    """``evaluation/pass@k`` for powers of two up to the samples of the least-sampled problem, and the mean length.

    Samples whose verdict is invalid are left out.

    Raises:
        ValueError: every sample of a problem is invalid.
    """
    fewest = int(counts.graded.min())
    if fewest == 0:
        raise ValueError(f"evaluation: every sample of prompt {prompts[int(counts.graded.argmin())].id} was invalid")
    ks = [2**i for i in range(fewest.bit_length())]
    metrics = {
        f"evaluation/{name}": value for name, value in passk.summarize(counts.graded, counts.correct, ks).items()
    }
    return {**metrics, "evaluation/response_tokens": float(counts.tokens.sum() / counts.sampled.sum())}

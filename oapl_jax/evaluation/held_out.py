"""pass@k of a policy on held-out prompts, in the course of training."""

import collections
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from oapl_jax.config.evaluation import HELD_OUT
from oapl_jax.evaluation import passk
from oapl_jax.rollouts.grading import Grading
from oapl_jax.rollouts.sampling import Request, Sampler, SamplingDistribution, run
from oapl_jax.types import Metrics, Prompt, Verdict

EVALUATION_STREAM = 2**32 - 1
"""Stream of the sampling keys; policy versions, which number the training streams, never get there."""


class Counts(NamedTuple):
    """What became of the samples, by problem ``[N]``."""

    sampled: np.ndarray
    graded: np.ndarray
    """Samples with a verdict."""
    correct: np.ndarray
    tokens: np.ndarray
    """Tokens of all responses to the problem."""


def make_request(
    index: int, prompt: Prompt, num_samples: int, seed: int, distribution: SamplingDistribution
) -> Request[int]:
    """The samples of an evaluation's prompt. The same seed draws the same random numbers for every policy."""
    key = (seed, EVALUATION_STREAM, index)
    return Request(index, prompt.token_ids, num_samples, key, distribution, needs_logprobs=False)


def evaluate(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    grading: Grading,
    *,
    distribution: SamplingDistribution,
    num_samples: int,
    seed: int,
    part: int = 0,
    num_parts: int = 1,
) -> Counts:
    """Samples each prompt ``num_samples`` times with the sampler's weights, and grades responses while it samples.

    Two evaluations with one seed differ by the policy alone. Processes can share the prompts: each takes every
    ``num_parts``-th from ``part`` on, and counts zeros for the others. The sampler is idle, with the weights of the policy.
    """
    requests = [
        make_request(i, prompts[i], num_samples, seed, distribution) for i in range(part, len(prompts), num_parts)
    ]
    counts = Counts(*(np.zeros(len(prompts), int) for _ in Counts._fields))
    waiting: list[tuple[int, Future]] = []
    for index, rollouts in run(sampler, requests):
        counts.sampled[index] = len(rollouts)
        counts.tokens[index] = sum(len(rollout.token_ids) for rollout in rollouts)
        waiting.append((index, grading.submit(grading.grade, [(prompts[index], rollouts)])))
    for index, future in waiting:
        ((_, grades),) = future.result()
        verdicts = [grade.verdict for grade in grades]
        counts.graded[index] = len(verdicts) - verdicts.count(Verdict.INVALID)
        counts.correct[index] = verdicts.count(Verdict.CORRECT)
        if not counts.graded[index]:
            reason = collections.Counter(grade.detail for grade in grades).most_common(1)[0][0]
            raise ValueError(
                f"evaluation: all samples of prompt {prompts[index].id} are invalid, mostly because: {reason}"
            )
    return counts


def summarize(counts: Counts, prompts: Sequence[Prompt]) -> Metrics:
    """``evaluation/pass@k`` for powers of two up to the samples of the least-sampled problem, and the mean length.

    The same of each of several data sets as ``evaluation/NAME/pass@k``. Samples whose verdict is invalid are left out.
    """
    metrics: Metrics = {}
    for name, mine in {"": list(range(len(prompts))), **by_set(prompts)}.items():
        _, graded, correct, _ = part = Counts(*(column[mine] for column in counts))
        area = f"evaluation/{name}/" if name else "evaluation/"
        for k in (2**i for i in range(int(graded.min()).bit_length())):
            metrics[f"{area}pass@{k}"] = float(passk.pass_at_k(graded, correct, k).mean())
        metrics[f"{area}response_tokens"] = float(part.tokens.sum() / part.sampled.sum())
    return metrics


def by_set(prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    """Indices of held-out prompts by the name of their data set, where there are several, else under ''."""
    found = collections.defaultdict(list)
    for i, prompt in enumerate(prompts):
        first = prompt.id.partition("/")[0]
        found[first.removeprefix(HELD_OUT) if first.startswith(HELD_OUT) else ""].append(i)
    return dict(found)

"""Samples of benchmark problems, graded and written to a rollout log as they come: a killed evaluation goes on."""

import math
import pathlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

from oapl_jax.evaluation import tally
from oapl_jax.evaluation.held_out import EVALUATION_STREAM
from oapl_jax.io.progress_bar import ProgressBar
from oapl_jax.rewards.grader import Grader
from oapl_jax.rollouts.buffer import Ticket
from oapl_jax.rollouts.grading import Grading
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.sampling import Request, Sampler, SamplingDistribution, run
from oapl_jax.types import Prompt, Rollout, Verdict

MAX_UNWRITTEN = 64
"""Problems whose samples may wait for the grader before the sampler waits too."""


def make_grading(grader: Grader, decode: Callable[[list[int]], str], truncated: str) -> Grading:
    """Grades samples without advantages: nothing is trained on them."""
    return Grading(
        decode, grader, lambda rewards, _: np.full(len(rewards), math.nan), lambda rewards: math.nan, truncated
    )


def sample(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    grading: Grading,
    log: RolloutLog,
    version: int,
    *,
    distribution: SamplingDistribution,
    num_samples: int,
    seed: int,
    progress: ProgressBar,
) -> None:
    """Samples the prompts that the log lacks under this version; a prompt's samples are logged when all are graded.

    The sampler is idle and has the weights of the policy. The seed is the same for every policy.
    """
    done = tally.prompt_ids(pathlib.Path(str(log.directory)), version)
    requests = [
        Request(i, prompt.token_ids, num_samples, (seed, EVALUATION_STREAM, i), distribution, needs_logprobs=False)
        for i, prompt in enumerate(prompts)
        if prompt.id not in done
    ]
    finished, correct, total = len(prompts) - len(requests), 0, 0
    if finished:
        progress.note(f"{finished} of {len(prompts)} problems are in {log.directory} already")

    def write(index: int, rollouts: list[Rollout]) -> tuple[int, int]:
        (group,) = grading.groups([(Ticket(version, index, index), prompts[index], rollouts)])
        log.append([group])
        return sum(item.grade.verdict is Verdict.CORRECT for item in group.rollouts), len(rollouts)

    def settle(future: Future) -> None:
        nonlocal finished, correct, total
        right, drawn = future.result()
        finished, correct, total = finished + 1, correct + right, total + drawn
        progress.update(finished, {"rollouts/pass_rate": correct / total})

    waiting: list[Future] = []
    for index, rollouts in run(sampler, requests):
        waiting.append(grading.submit(write, index, rollouts))
        while waiting and (waiting[0].done() or len(waiting) > MAX_UNWRITTEN):
            settle(waiting.pop(0))
    for future in waiting:
        settle(future)

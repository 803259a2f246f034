"""Samples of benchmark problems, graded and written to a rollout log as they come: a killed evaluation goes on."""

import math
import pathlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

from oapl_jax.evaluation import tally
from oapl_jax.evaluation.benchmarks import Graded
from oapl_jax.evaluation.held_out import EVALUATION_STREAM
from oapl_jax.io.progress_bar import ProgressBar
from oapl_jax.rewards.grader import Item
from oapl_jax.rollouts.buffer import Ticket
from oapl_jax.rollouts.grading import Grading
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.sampling import Request, Sampler, SamplingDistribution, run
from oapl_jax.types import Grade, Prompt, Rollout, Verdict

MAX_UNWRITTEN = 64
"""Problems whose samples may wait for the grader before the sampler waits too."""


class ProblemGrader:
    """A grader that gives each response to the grader of its problem."""

    def __init__(self, problems: Sequence[Graded]):
        self._graders = {problem.prompt.id: problem.grader for problem in problems}

    def check_golds(self, prompts: Sequence[Prompt]) -> None:
        """Nothing to check: ``benchmarks.load`` has done so."""

    def grade(self, items: Sequence[Item]) -> list[Grade]:
        """Grades in the order of the items."""
        grades: dict[int, Grade] = {}
        for grader in set(self._graders.values()):
            mine = [i for i, (prompt, _, _) in enumerate(items) if self._graders[prompt.id] is grader]
            grades |= dict(zip(mine, grader.grade([items[i] for i in mine]), strict=True))
        return [grades[i] for i in range(len(items))]

    def close(self) -> None:
        """Nothing to end: who loaded the problems ends their graders."""


def make_grading(problems: Sequence[Graded], decode: Callable[[list[int]], str]) -> Grading:
    """Grades samples without advantages: nothing is trained on them."""
    return Grading(
        decode, ProblemGrader(problems), lambda rewards, _: np.full(len(rewards), math.nan), lambda rewards: math.nan
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

    Args:
        sampler: idle, with the weights of the policy.
        prompts: of all problems.
        grading: of this process.
        log: of the evaluation.
        version: under which the samples are logged.
        distribution: of the samples.
        num_samples: of each prompt.
        seed: root of the draws; the same for every policy.
        progress: shows the finished problems.
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


def longest(problems: Sequence[Graded]) -> int:
    """Tokens of the longest prompt."""
    return max(len(problem.prompt.token_ids) for problem in problems)

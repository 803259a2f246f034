"""The grader of a run: what turns responses into rewards, chosen by the config."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from oapl_jax.config import TrainConfig
from oapl_jax.rewards import math, toy
from oapl_jax.rewards.pool import GraderPool
from oapl_jax.types import FinishReason, Grade, Prompt, Verdict

TOY_GRADERS: dict[str, Callable[[str, str], bool]] = {"chain": toy.grade_chain, "countdown": toy.grade_countdown}

Item = tuple[Prompt, str, FinishReason]
"""Prompt, decoded response, and why the response ended."""


@runtime_checkable
class Grader(Protocol):
    """What the worker loop knows of a grader."""

    def check_golds(self, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError, naming the rows, where a gold answer cannot be compared with."""
        ...

    def grade(self, items: Sequence[Item]) -> list[Grade]:
        """Grades in the order of the items. A response that was cut at the limit is wrong."""
        ...

    def close(self) -> None:
        """Ends what the grader started; may be called twice."""
        ...


def make_grader(config: TrainConfig) -> Grader:
    """The built-in task's own reward, or the math grader for the answers of a dataset."""
    if config.data.task is not None:
        return ToyGrader(config.data.task)
    reward = config.reward
    return MathGrader(GraderPool(reward.workers, reward.timeout, reward.retries), reward.gold)


class ToyGrader:
    """Grades a built-in task in this process."""

    def __init__(self, task: str) -> None:
        self._is_correct = TOY_GRADERS[task]

    def check_golds(self, prompts: Sequence[Prompt]) -> None:
        """Nothing to check: the question is all that these rewards need."""

    def grade(self, items: Sequence[Item]) -> list[Grade]:
        """Grades in the order of the items."""
        return [self._grade(*item) for item in items]

    def close(self) -> None:
        """Nothing to end."""

    def _grade(self, prompt: Prompt, text: str, finish_reason: FinishReason) -> Grade:
        if finish_reason == FinishReason.LENGTH:
            return TRUNCATED
        is_correct = self._is_correct(prompt.text, text)
        return Grade(Verdict.CORRECT if is_correct else Verdict.WRONG, float(is_correct))


class MathGrader:
    """Compares final answers with gold ones in a pool of processes, which it owns."""

    def __init__(self, pool: GraderPool, gold_rule: str) -> None:
        self._pool, self._gold_rule = pool, gold_rule

    def check_golds(self, prompts: Sequence[Prompt]) -> None:
        """Raises ValueError, naming the rows, where a gold answer is missing or does not parse."""
        names = [prompt.id for prompt in prompts]
        self._pool.check_golds([self._gold(prompt) for prompt in prompts], names)

    def grade(self, items: Sequence[Item]) -> list[Grade]:
        """Grades in the order of the items; only finished responses reach the pool."""
        finished = [item for item in items if item[2] != FinishReason.LENGTH]
        graded = iter(self._pool.grade_many([(self._gold(prompt), text) for prompt, text, _ in finished]))
        return [TRUNCATED if item[2] == FinishReason.LENGTH else next(graded) for item in items]

    def close(self) -> None:
        """Ends the processes."""
        self._pool.close()

    def _gold(self, prompt: Prompt) -> str:
        try:
            return math.extract_gold(prompt.answer, self._gold_rule)
        except ValueError as error:
            raise ValueError(f"row {prompt.id}: {error} (reward.gold={self._gold_rule})") from error


TRUNCATED = Grade(Verdict.WRONG, 0.0, "cut at the limit")
"""A half answer is not graded."""

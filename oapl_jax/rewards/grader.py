"""The grader of a run: what turns responses into rewards, chosen by the config."""

import dataclasses
import math as numbers
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from oapl_jax.config.commands import GenerateConfig, TrainConfig
from oapl_jax.config.reward import RewardConfig
from oapl_jax.rewards import tasks, toy
from oapl_jax.rewards.code import layouts, programs
from oapl_jax.rewards.math import answers
from oapl_jax.rewards.pool import GraderPool
from oapl_jax.types import FinishReason, Grade, Prompt, Verdict

TOY_GRADERS: dict[str, Callable[[str, str], bool]] = {"chain": toy.grade_chain, "countdown": toy.grade_countdown}
CHARACTERS_OF_PENALTY = 1000
MAX_NAMED = 10
"""Rows that an error names."""

Item = tuple[Prompt, str, FinishReason]
"""Prompt, decoded response, and why the response ended."""


class WeakIsolationWarning(UserWarning):
    """Programs are graded at a level below ``namespaces``."""


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


def make_grader(config: TrainConfig | GenerateConfig) -> Grader:
    """The built-in task's own reward, or the reward functions of the config."""
    return grader_of(config.data.task, config.reward)


def grader_of(task: str | None, reward: RewardConfig) -> Grader:
    """The same of a built-in task's name, or None, and the section ``reward``."""
    if task is not None:
        return ToyGrader(task)
    kinds = tuple(kind for kind in ("math", "code") if kind in reward.functions)
    return RewardGrader(GraderPool(reward.workers, reward.retries, tasks.make_setup(reward, kinds)), reward)


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


class RewardGrader:
    """Grades by the reward functions of a config, in a pool of processes, which it owns."""

    def __init__(self, pool: GraderPool, reward: RewardConfig) -> None:
        self._pool, self._reward = pool, reward
        self._num_tests: dict[str, int] = {}

    def check_golds(self, prompts: Sequence[Prompt]) -> None:
        """Checks that every row can be graded, and that the graders work: known answers get their known verdicts.

        Raises:
            ValueError: naming the rows whose gold answers or tests do not parse, the function that cannot be
                imported, or what the graders got wrong.
        """
        self._check_canaries()
        for name in self._reward.functions:
            if name == "math":
                self._check_answers(prompts)
            elif name == "code":
                for prompt in prompts:
                    self._count_tests(prompt)
            else:
                (grade,) = self._pool.grade([tasks.function_task(self._reward, name, None, None)])
                if grade.verdict is not Verdict.CORRECT:
                    raise ValueError(f"reward.functions: {name!r} cannot be used: {grade.detail}")

    def grade(self, items: Sequence[Item]) -> list[Grade]:
        """Grades in the order of the items; only finished responses reach the pool."""
        finished = [item for item in items if item[2] != FinishReason.LENGTH]
        names = list(self._reward.functions)
        graded = iter(self._pool.grade([self._task(name, *item[:2]) for item in finished for name in names]))
        grades = []
        for _, text, finish_reason in items:
            is_cut = finish_reason == FinishReason.LENGTH
            parts = [TRUNCATED if is_cut else next(graded) for _ in names]
            grade = compose(self._reward, list(self._reward.functions.values()), parts, text, is_cut=is_cut)
            level = f" [{grade.level}]" if grade.level else ""  # the rollout log has no column for it
            grades.append(dataclasses.replace(grade, detail=grade.detail + level))
        return grades

    def close(self) -> None:
        """Ends the processes."""
        self._pool.close()

    def _task(self, name: str, prompt: Prompt, text: str) -> dict[str, Any]:
        if name == "math":
            return tasks.math_task(self._reward, self._gold(prompt), text)
        if name == "code":
            return tasks.code_task(self._reward, prompt.answer, self._count_tests(prompt), response=text)
        return tasks.function_task(self._reward, name, prompt, text)

    def _check_canaries(self) -> None:
        canaries = tasks.canaries(self._reward)
        grades = self._pool.grade([task for task, _ in canaries])
        for (task, is_correct), grade in zip(canaries, grades, strict=True):
            if grade.verdict != (Verdict.CORRECT if is_correct else Verdict.WRONG):
                raise ValueError(
                    f"the {task['kind']} grader fails its test: {task.get('program', task.get('response'))!r} should be"
                    f" {'correct' if is_correct else 'wrong'} and is {grade.verdict}: {grade.detail}"
                )
        levels = sorted({grade.level for grade in grades} - {"", "namespaces"})
        if levels:
            warnings.warn(
                f"programs of the model are run at isolation level {', '.join(levels)}, below namespaces;"
                f" python -m oapl_jax check-sandbox says why and what that leaves open",
                WeakIsolationWarning,
                stacklevel=2,
            )

    def _check_answers(self, prompts: Sequence[Prompt]) -> None:
        golds = [self._gold(prompt) for prompt in prompts]
        grades = self._pool.grade([tasks.gold_task(self._reward, gold) for gold in golds])
        broken = [
            f"row {prompt.id}: {gold!r}"
            for prompt, gold, grade in zip(prompts, golds, grades, strict=True)
            if grade.verdict is not Verdict.CORRECT
        ]
        if broken:
            listed = "\n  ".join(broken[:MAX_NAMED])
            raise ValueError(f"{len(broken)} gold answers do not parse as mathematics:\n  {listed}")

    def _gold(self, prompt: Prompt) -> str:
        try:
            return answers.extract_gold(prompt.answer, self._reward.gold)
        except ValueError as error:
            raise ValueError(f"row {prompt.id}: {error} (reward.gold={self._reward.gold})") from error

    def _count_tests(self, prompt: Prompt) -> int:
        if prompt.id not in self._num_tests:
            try:
                self._num_tests[prompt.id] = len(programs.parse_tests(layouts.read_tests(prompt.answer)))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"row {prompt.id}: its tests cannot be used: {error}") from error
        return self._num_tests[prompt.id]


TRUNCATED = Grade(Verdict.WRONG, 0.0, "cut at the limit")
"""A half answer is not graded."""


def compose(
    reward: RewardConfig, weights: Sequence[float], parts: Sequence[Grade], text: str, *, is_cut: bool = False
) -> Grade:
    """One grade of several: the verdict of the first, the weighted sum, the bonus, less the penalty.

    Invalid where one of them is: half a reward would be as wrong as none.
    """
    for part in parts:
        if part.verdict is Verdict.INVALID:
            return part
    total = sum(weight * part.reward for weight, part in zip(weights, parts, strict=True))
    if reward.format_pattern is not None and not is_cut and re.search(reward.format_pattern, text):
        total += reward.format_bonus
    total -= reward.length_penalty * max(0, len(text) - reward.length_free) / CHARACTERS_OF_PENALTY
    if not numbers.isfinite(total):
        return Grade(Verdict.INVALID, numbers.nan, f"the reward is {total}")
    details = "; ".join(part.detail for part in parts if part.detail)
    level, cpu_ms = max(part.level for part in parts), sum(part.cpu_ms for part in parts)
    return dataclasses.replace(parts[0], reward=total, detail=details, level=level, cpu_ms=cpu_ms)

"""Graders turn responses into verdicts and rewards; the config chooses the grader of a run."""

import dataclasses
import itertools
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from oapl_jax.config.commands import GenerateConfig, TrainConfig
from oapl_jax.config.data import GradedSets
from oapl_jax.config.reward import RewardConfig
from oapl_jax.rewards import functions, tasks
from oapl_jax.rewards.code import layouts, programs
from oapl_jax.rewards.math import answers
from oapl_jax.rewards.pool import GraderPool
from oapl_jax.rewards.toy import TOY_GRADERS
from oapl_jax.types import FinishReason, Grade, Prompt, Verdict

CHARACTERS_OF_PENALTY = 1000
"""``reward.length_penalty`` is subtracted once for this many characters."""
MAX_NAMED = 10
"""Number of bad rows that an error lists."""
TRUNCATED = Grade(Verdict.WRONG, 0.0, "truncated at the limit")
"""A truncated response is wrong without being graded."""

Item = tuple[Prompt, str, FinishReason]
"""A prompt, its decoded response, and why the response ended."""


class WeakIsolationWarning(UserWarning):
    """Programs are graded at an isolation level below ``namespaces``."""


@runtime_checkable
class Grader(Protocol):
    """Grades responses to prompts. By default there is nothing to check or to close."""

    def check_golds(self, prompts: Sequence[Prompt]) -> None:
        """Raises a ValueError that names the rows whose gold answers or tests cannot be used."""

    def grade(self, items: Sequence[Item]) -> list[Grade]:
        """Returns grades in the order of the items. A truncated response is wrong (``sampler.truncated`` may say otherwise)."""
        ...

    def close(self) -> None:
        """Ends the processes that the grader started. It may be called twice."""


def make_grader(config: TrainConfig | GenerateConfig) -> Grader:
    """The grader of the config's data sets, for a training run of the held-out ones too."""
    return grader_of_sets(config.graded_sets())


def grader_of_sets(sets: GradedSets) -> Grader:
    """The grader of data sets by their names; those that are graded alike share one."""
    graders: dict[str, Grader] = {}
    for source, reward in sets.values():
        if (source.task or str(reward)) not in graders:
            graders[source.task or str(reward)] = grader_of(source.task, reward)
    if len(graders) == 1:
        return next(iter(graders.values()))
    return SetGrader({name: graders[source.task or str(reward)] for name, (source, reward) in sets.items()})


def grader_of(task: str | None, reward: RewardConfig) -> Grader:
    """The grader of a built-in task by its name; without one, that of the section ``reward``."""
    if task is not None:
        return ToyGrader(task)
    setup = tasks.make_setup(reward, tuple(reward.functions))
    return RewardGrader(GraderPool(reward.workers, reward.retries, setup), reward)


class SetGrader:
    """Gives each response to the grader of its data set, which it owns: the name that its prompt's id begins with, or ''."""

    def __init__(self, graders: Mapping[str, Grader]):
        self._graders = graders

    def check_golds(self, prompts: Sequence[Prompt]) -> None:
        """Each grader checks those of its data sets."""
        for grader in dict.fromkeys(self._graders.values()):
            grader.check_golds([prompt for prompt in prompts if self._grader(prompt) is grader])

    def grade(self, items: Sequence[Item]) -> list[Grade]:
        """Grades in the order of the items."""
        grades: dict[int, Grade] = {}
        for grader in dict.fromkeys(self._graders.values()):
            mine = [i for i, (prompt, _, _) in enumerate(items) if self._grader(prompt) is grader]
            grades |= dict(zip(mine, grader.grade([items[i] for i in mine]), strict=True))
        return [grades[i] for i in range(len(items))]

    def close(self) -> None:
        """Closes the graders."""
        for grader in dict.fromkeys(self._graders.values()):
            grader.close()

    def _grader(self, prompt: Prompt) -> Grader:
        grader = self._graders.get(prompt.id.partition("/")[0]) or self._graders.get("")
        if grader is None:
            raise ValueError(f"prompt {prompt.id!r:.80} is of none of the data sets {', '.join(self._graders)}")
        return grader


class ToyGrader(Grader):
    """Grades a built-in task in this process, from the question alone."""

    def __init__(self, task: str) -> None:
        self._is_correct = TOY_GRADERS[task]

    def grade(self, items: Sequence[Item]) -> list[Grade]:
        """Returns grades in the order of the items."""
        return [
            TRUNCATED if reason == FinishReason.LENGTH else self._grade(prompt, text) for prompt, text, reason in items
        ]

    def _grade(self, prompt: Prompt, text: str) -> Grade:
        try:
            is_correct = self._is_correct(prompt.text, text)
        except (ValueError, IndexError):
            raise ValueError(f"prompt {prompt.id!r:.80}: {prompt.text!r:.80} is no question of the task") from None
        return Grade(Verdict.CORRECT, 1.0) if is_correct else Grade(Verdict.WRONG, 0.0)


class RewardGrader:
    """Grades by the reward functions of a config, in a pool of processes that it owns."""

    def __init__(self, pool: GraderPool, reward: RewardConfig) -> None:
        self._pool, self._reward = pool, reward
        self._num_tests: dict[str, int] = {}
        self._details: dict[str, str] = {}

    def check_golds(self, prompts: Sequence[Prompt]) -> None:
        """Checks that every row can be graded, and that the graders work: known answers get their known verdicts.

        A function of the user is called once, with the first prompt and its answer as the response. A ValueError names
        the gold answers or tests that do not parse, the function that fails, or the canary with the wrong verdict.
        """
        self._check_canaries()
        for name in self._reward.functions:
            if name == "math":
                self._check_answers(prompts)
            elif name == "code":
                for prompt in prompts:
                    self._count_tests(prompt)
            else:
                self._try(name, prompts)

    def grade(self, items: Sequence[Item]) -> list[Grade]:
        """Returns grades in the order of the items; only finished responses reach the pool."""
        finished = [item for item in items if item[2] != FinishReason.LENGTH]
        names, weights = zip(*self._reward.functions.items(), strict=True)
        graded = iter(self._pool.grade([task for name in names for task in self._tasks(name, finished)]))
        by_item = zip(*([next(graded) for _ in finished] for _ in names), strict=True)
        grades = []
        for _, text, finish_reason in items:
            is_truncated = finish_reason == FinishReason.LENGTH
            parts = [TRUNCATED for _ in names] if is_truncated else next(by_item)
            grade = compose(self._reward, weights, parts, text, is_truncated=is_truncated)
            level = f" [{grade.level}]" if grade.level else ""  # the rollout log has no column for the level
            grades.append(dataclasses.replace(grade, detail=grade.detail + level))
        return grades

    def close(self) -> None:
        """Ends the processes."""
        self._pool.close()

    def _tasks(self, name: str, items: Sequence[Item]) -> Iterator[dict[str, Any]]:
        """Tasks whose grades are those of the items: one for each, or for all of a group."""
        if name == "math":
            for prompt, text, _ in items:
                yield tasks.math_task(self._reward, self._gold(prompt), text, prompt.text)
        elif name == "code":
            for prompt, text, _ in items:
                yield tasks.code_task(self._reward, prompt.answer, self._count_tests(prompt), response=text)
        else:
            groups = [[item] for item in items]
            if self._takes_group(name):
                groups = [list(members) for _, members in itertools.groupby(items, key=lambda item: id(item[0]))]
            for group in groups:
                yield tasks.function_task(self._reward, name, group[0][0], [text for _, text, _ in group])

    def _takes_group(self, name: str) -> bool:
        """Whether a function of the user wants the responses of a group together."""
        if name not in self._details:
            (grade,) = self._pool.grade([tasks.function_task(self._reward, name)])
            if grade.verdict is not Verdict.CORRECT:
                raise ValueError(f"reward.functions: {name!r} cannot be used: {grade.detail}")
            self._details[name] = grade.detail
        return self._details[name] == functions.TAKES_GROUP

    def _try(self, name: str, prompts: Sequence[Prompt]) -> None:
        """Calls a function of the user, with two responses if it takes several."""
        times = 2 if self._takes_group(name) else 1
        trials = [tasks.function_task(self._reward, name, prompt, [prompt.answer] * times) for prompt in prompts[:1]]
        for grade in self._pool.grade(trials):
            if grade.verdict is Verdict.INVALID:
                raise ValueError(
                    f"reward.functions: {name!r} fails on the first prompt, {prompts[0].id}, with its answer as the"
                    f" response: {grade.detail}"
                )

    def _check_canaries(self) -> None:
        canaries = tasks.canaries(self._reward)
        grades = self._pool.grade([task for task, _ in canaries])
        for (task, is_correct), grade in zip(canaries, grades, strict=True):
            wanted = Verdict.CORRECT if is_correct else Verdict.WRONG
            if grade.verdict != wanted:
                raise ValueError(
                    f"the {task['kind']} grader fails its test: {task.get('program', task.get('response'))!r} should be"
                    f" {wanted}, but is {grade.verdict}: {grade.detail}"
                )
        for level in {grade.level for grade in grades} - {"", "namespaces"}:
            warnings.warn(
                f"programs of the model run at isolation level {level}, which is below namespaces;"
                f" python -m oapl_jax check-sandbox says why, and what a program could do",
                WeakIsolationWarning,
                stacklevel=2,
            )

    def _check_answers(self, prompts: Sequence[Prompt]) -> None:
        golds = [(prompt.id, self._gold(prompt)) for prompt in prompts]  # two files of one name have the same ids
        broken = [f"row {row}: {gold!r}" for row, gold in golds if not answers.is_usable_gold(gold)]
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


def compose(
    reward: RewardConfig, weights: Sequence[float], parts: Sequence[Grade], text: str, *, is_truncated: bool = False
) -> Grade:
    """Combines the grades of several functions: the verdict of the first, the weighted sum of rewards, bonus, penalty.

    If one part is invalid, so is the whole, because a sum over some of the parts would be a wrong reward.
    """
    for part in parts:
        if part.verdict is Verdict.INVALID:
            return part
    total = sum(weight * part.reward for weight, part in zip(weights, parts, strict=True))
    if reward.format_pattern is not None and not is_truncated and re.search(reward.format_pattern, text):
        total += reward.format_bonus
    total -= reward.length_penalty * max(0, len(text) - reward.length_free) / CHARACTERS_OF_PENALTY
    if not math.isfinite(total):
        return Grade(Verdict.INVALID, math.nan, f"the reward is {total}")
    details = "; ".join(part.detail for part in parts if part.detail)
    level, cpu_ms = max(part.level for part in parts), sum(part.cpu_ms for part in parts)
    return dataclasses.replace(parts[0], reward=total, detail=details, level=level, cpu_ms=cpu_ms)

"""The problems of an evaluation and their graders."""

import pathlib
from collections.abc import Iterator, Sequence

from oapl_jax.config.commands import EvaluateConfig
from oapl_jax.config.data import DataConfig
from oapl_jax.config.reward import RewardConfig
from oapl_jax.data.catalogue import DATASETS
from oapl_jax.data.prompts import first_prompts
from oapl_jax.data.tokenizer import Tokenizer
from oapl_jax.rewards.grader import Grader, Item, grader_of
from oapl_jax.types import Grade, Prompt

_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".parquet", "")


class ProblemGrader:
    """A ``Grader`` that gives each response to the grader of its problem, which it owns."""

    def __init__(self, graders: dict[str, Grader]):
        self._graders = graders

    def check_golds(self, prompts: Sequence[Prompt]) -> None:
        """Each grader checks those of its problems."""
        for grader in dict.fromkeys(self._graders.values()):
            grader.check_golds([prompt for prompt in prompts if self._graders[prompt.id] is grader])

    def grade(self, items: Sequence[Item]) -> list[Grade]:
        """Grades in the order of the items."""
        grades: dict[int, Grade] = {}
        for grader in set(self._graders.values()):
            mine = [i for i, (prompt, _, _) in enumerate(items) if self._graders[prompt.id] is grader]
            grades |= dict(zip(mine, grader.grade([items[i] for i in mine]), strict=True))
        return [grades[i] for i in range(len(items))]

    def close(self) -> None:
        """Closes the graders."""
        for grader in set(self._graders.values()):
            grader.close()


def load(config: EvaluateConfig, tokenizer: Tokenizer) -> tuple[list[Prompt], ProblemGrader]:
    """All problems in the order of the config, and what grades them; equal options share a grader.

    Raises:
        ValueError: a data set cannot be read, a gold answer does not parse, or a grader does not work.
    """
    by_options: dict[str, Grader] = {}
    graders: dict[str, Grader] = {}
    prompts: list[Prompt] = []
    for data, reward in _sources(config):
        found = first_prompts(data, tokenizer, config.benchmarks.problems)
        if str(reward) not in by_options:
            by_options[str(reward)] = grader_of(data.task, reward)
        prompts += found
        graders |= dict.fromkeys((prompt.id for prompt in found), by_options[str(reward)])
    grader = ProblemGrader(graders)
    grader.check_golds(prompts)
    return prompts, grader


def _sources(config: EvaluateConfig) -> Iterator[tuple[DataConfig, RewardConfig]]:
    """The benchmarks that the config names, or its own data."""
    if config.data is not None:
        yield config.data, config.reward
        return
    section = config.benchmarks
    for name in section.names:
        data = DataConfig(
            dataset=name,
            path=None if section.folder is None else _local_copy(pathlib.Path(section.folder).expanduser(), name),
            split=section.split,
            max_prompt_tokens=section.max_prompt_tokens,
            overlong="error",
        )
        yield data, config.reward.model_copy(update={"functions": {DATASETS[name].reward: 1.0}})


def _local_copy(folder: pathlib.Path, name: str) -> str:
    for suffix in _SUFFIXES:
        if (folder / f"{name}{suffix}").exists():
            return str(folder / f"{name}{suffix}")
    raise ValueError(
        f"benchmarks.folder={str(folder)!r}: has no copy of {name}; put {name}.jsonl or {name}.parquet there, or remove"
        " the key to read the hub"
    )

"""The problems of an evaluation, each with its grader."""

import contextlib
import pathlib
from typing import NamedTuple

from oapl_jax.config.commands import EvaluateConfig
from oapl_jax.config.data import DataConfig
from oapl_jax.config.reward import RewardConfig
from oapl_jax.data.catalogue import DATASETS
from oapl_jax.data.prompts import first_prompts
from oapl_jax.data.tokenizer import Tokenizer
from oapl_jax.rewards.grader import Grader, grader_of
from oapl_jax.types import Prompt

_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".parquet", "")


class Benchmark(NamedTuple):
    """A source of problems and its reward."""

    data: DataConfig
    reward: RewardConfig


class Graded(NamedTuple):
    """A problem and the grader of its responses."""

    prompt: Prompt
    grader: Grader


def benchmarks(config: EvaluateConfig) -> list[Benchmark]:
    """The benchmarks that the config names.

    Raises:
        ValueError: the folder of local copies lacks a data set.
    """
    if config.data is not None:
        return [Benchmark(config.data, config.reward)]
    section, found = config.benchmarks, []
    for name in section.names:
        data = DataConfig(
            dataset=name,
            path=None if section.folder is None else _local_copy(pathlib.Path(section.folder).expanduser(), name),
            split=section.split,
            max_prompt_tokens=section.max_prompt_tokens,
            overlong="error",
        )
        found.append(Benchmark(data, config.reward.model_copy(update={"functions": {DATASETS[name].reward: 1.0}})))
    return found


def load(config: EvaluateConfig, tokenizer: Tokenizer, stack: contextlib.ExitStack) -> list[Graded]:
    """All problems, in the order of the config; benchmarks with the same options share a grader.

    Args:
        config: of the evaluation.
        tokenizer: of the policy.
        stack: closes the graders.

    Raises:
        ValueError: a data set cannot be read, a gold answer does not parse, or a grader does not work.
    """
    graders: dict[str, Grader] = {}
    members: dict[str, list[Prompt]] = {}
    problems: list[Graded] = []
    for data, reward in benchmarks(config):
        key = str(reward)
        prompts = first_prompts(data, tokenizer, config.benchmarks.problems)
        if key not in graders:
            graders[key] = grader_of(data.task, reward)
            stack.callback(graders[key].close)
        members.setdefault(key, []).extend(prompts)
        problems += [Graded(prompt, graders[key]) for prompt in prompts]
    for key, prompts in members.items():
        graders[key].check_golds(prompts)
    return problems


def _local_copy(folder: pathlib.Path, name: str) -> str:
    for suffix in _SUFFIXES:
        if (folder / f"{name}{suffix}").exists():
            return str(folder / f"{name}{suffix}")
    raise ValueError(
        f"benchmarks.folder={str(folder)!r}: has no copy of {name}; put {name}.jsonl or {name}.parquet there, or remove"
        " the key to read the hub"
    )

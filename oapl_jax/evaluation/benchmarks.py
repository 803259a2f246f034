"""The problems of an evaluation and their graders."""

import pathlib
from collections.abc import Mapping

from oapl_jax.config.commands import EvaluateConfig
from oapl_jax.config.data import DataConfig
from oapl_jax.config.reward import RewardConfig
from oapl_jax.data.catalogue import DATASETS
from oapl_jax.data.prompts import HeldOut, first_prompts
from oapl_jax.data.tokenizer import Tokenizer
from oapl_jax.rewards.grader import Grader, grader_of_sets

_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".parquet", "")


def load(config: EvaluateConfig, tokenizer: Tokenizer) -> tuple[HeldOut, Grader]:
    """All problems in the order of the config, and what grades them.

    Raises:
        ValueError: a data set cannot be read, a gold answer does not parse, or a grader does not work.
    """
    sources, prompts = _sources(config), HeldOut()
    for name, (data, _) in sources.items():
        in_set = name if config.data is not None else ""  # the ids of a benchmark begin with its name anyway
        prompts.add(name, *first_prompts(data, tokenizer, config.benchmarks.problems, in_set))
    grader = grader_of_sets(sources)
    grader.check_golds(prompts)
    return prompts, grader


def _sources(config: EvaluateConfig) -> Mapping[str, tuple[DataConfig, RewardConfig]]:
    """The benchmarks that the config names, or its own data, by the names that the ids of their prompts begin with."""
    if config.data is not None:
        return config.data.graded(config.reward)
    section, found = config.benchmarks, {}
    for name in section.names:
        data = DataConfig(
            dataset=name,
            path=None if section.folder is None else _local_copy(pathlib.Path(section.folder).expanduser(), name),
            split=section.split,
            max_prompt_tokens=section.max_prompt_tokens,
            overlong="error",
        )
        found[name] = data, config.reward.model_copy(update={"functions": {DATASETS[name].reward: 1.0}})
    return found


def _local_copy(folder: pathlib.Path, name: str) -> str:
    for suffix in _SUFFIXES:
        if (folder / f"{name}{suffix}").exists():
            return str(folder / f"{name}{suffix}")
    raise ValueError(
        f"benchmarks.folder={str(folder)!r}: has no copy of {name}; put {name}.jsonl or {name}.parquet there, or remove"
        " the key to read the hub"
    )

"""Evaluations: in the course of training, and of a policy on benchmarks."""

from typing import Annotated

from pydantic import Field

from oapl_jax.config.applies import AppliesWhen, is_null
from oapl_jax.config.data import Sets, has_splits, inert_weights
from oapl_jax.config.sampling import SamplingConfig
from oapl_jax.config.section import Count, CountOrZero, Section

NOT_OF_TASKS = AppliesWhen("data.task", condition=is_null)
NOT_OF_SETS = AppliesWhen("sets", condition=is_null)
IN_SPLITS = AppliesWhen("data.dataset", "evaluation.dataset", "data.format", condition=has_splits)
ONE_DATA_SET = AppliesWhen("data.sets", condition=is_null)
WITHOUT_DATA = AppliesWhen("data", condition=is_null)


HELD_OUT = "evaluation."
"""Begins the ids of held-out prompts of several data sets, before the name of the data set."""


class EvaluationConfig(SamplingConfig):
    """pass@k on held-out prompts: before, during and after training."""

    sets: Sets = Field(default={})
    """Several held-out data sets by their names, with metrics of their own (docs/data.md)."""
    path: Annotated[str | None, NOT_OF_TASKS, NOT_OF_SETS, ONE_DATA_SET] = None
    """Held-out prompts, in the format and columns of ``data``; built-in tasks bring their own."""
    dataset: Annotated[str | None, NOT_OF_TASKS, NOT_OF_SETS, ONE_DATA_SET] = None
    """Held-out prompts of another data set than ``data.dataset``, from the hub or from a copy at ``path``."""
    split: Annotated[str, NOT_OF_SETS, IN_SPLITS] = "test"
    """Split, for ``datasets`` and ``tfds``."""
    every: CountOrZero = 50
    """Learner steps between evaluations in the course of training; 0: none."""
    prompts: CountOrZero = 128
    """Held-out prompts of each data set; 0: no evaluation at all, and the other fields of the section are not read."""
    samples: Count = 16
    """Samples per prompt in the course of training."""
    final_samples: Count = 64
    """Samples per prompt before and after."""

    def find_mistakes(self) -> list[str]:
        """Weights."""
        return inert_weights(self.sets, "sets")


class BenchmarksConfig(Section):
    """Which problems. Exactly one of ``names`` and the section ``data``."""

    names: tuple[str, ...] = ()
    """Published data sets, from the hub unless there is a copy in ``folder``."""
    folder: Annotated[str | None, WITHOUT_DATA] = None
    """Folder of local copies: NAME.jsonl, NAME.json, NAME.jsonl.gz, NAME.parquet, or a folder NAME."""
    split: Annotated[str, WITHOUT_DATA] = "test"
    """Split of each of ``names``."""
    problems: Count | None = None
    """Number of problems of each, the first ones; null: all, and 128 of a built-in task, which has no end."""
    max_prompt_tokens: Annotated[Count, WITHOUT_DATA] = 4096
    """Limit of a tokenised prompt of ``names``; a longer one is an error."""

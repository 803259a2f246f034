"""Evaluations: in the course of training, and of a policy on benchmarks."""

from typing import Annotated

from oapl_jax.config.applies import AppliesWhen, is_null
from oapl_jax.config.data import has_splits
from oapl_jax.config.sampling import SamplingConfig
from oapl_jax.config.section import Count, CountOrZero, Section

NOT_OF_TASKS = AppliesWhen("data.task", condition=is_null)
WITHOUT_DATA = AppliesWhen("data", condition=is_null)


class EvaluationConfig(SamplingConfig):
    """pass@k on held-out prompts: before, during and after training."""

    path: Annotated[str | None, NOT_OF_TASKS] = None
    """Held-out prompts, in the format and columns of ``data``; the toy tasks bring their own."""
    dataset: Annotated[str | None, NOT_OF_TASKS] = None
    """Held-out prompts of another data set than ``data.dataset``, from the hub or from a copy at ``path``."""
    split: Annotated[str, AppliesWhen("data.dataset", "evaluation.dataset", "data.format", condition=has_splits)] = (
        "test"
    )
    """Split, for ``datasets`` and ``tfds``."""
    every: CountOrZero = 50
    """Learner steps between evaluations in the course of training; 0: none."""
    prompts: CountOrZero = 128
    """Held-out prompts; 0: no evaluation at all, and the other fields of the section are not read."""
    samples: Count = 16
    """Samples per prompt in the course of training."""
    final_samples: Count = 64
    """Samples per prompt before and after."""


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

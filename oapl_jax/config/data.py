"""Where prompts, held-out prompts and demonstrations come from."""

from typing import Annotated, Literal

from oapl_jax.config.applies import AppliesWhen, is_null
from oapl_jax.config.section import Count, Section

NOT_OF_TASKS = AppliesWhen("task", condition=is_null)
NOT_OF_DATASETS = AppliesWhen("dataset", condition=is_null)


def has_splits(*names: str | None) -> bool:
    """For ``AppliesWhen``: whether data come in splits, by the names of data sets, where given, and the format."""
    *datasets, file_format = names
    return any(name is not None for name in datasets) or file_format in ("datasets", "tfds")


def _has_configurations(dataset: str | None, file_format: str) -> bool:
    return dataset is not None or file_format == "datasets"


class DataConfig(Section):
    """Where prompts come from. Exactly one of ``task``, ``dataset`` and ``path``; ``dataset`` may have a ``path``."""

    task: str | None = None
    """A built-in toy task, chain or countdown; prompts, split and reward come with it."""
    dataset: str | None = None
    """A published data set by name (docs/evaluation.md has a table); its columns and its template come with it. From the
    hub, or from a copy at ``path``."""
    path: str | None = None
    """File, folder, or name of a dataset on the hub or in TFDS."""
    format: Annotated[Literal["jsonl", "parquet", "datasets", "tfds"], NOT_OF_TASKS, NOT_OF_DATASETS] = "jsonl"
    """How ``path`` is read."""
    name: Annotated[str | None, NOT_OF_TASKS, AppliesWhen("dataset", "format", condition=_has_configurations)] = None
    """Configuration of a ``datasets`` dataset (GSM8K's is ``main``)."""
    split: Annotated[str, NOT_OF_TASKS, AppliesWhen("dataset", "format", condition=has_splits)] = "train"
    """Split, for ``datasets`` and ``tfds``."""
    prompt_column: Annotated[str, NOT_OF_TASKS, NOT_OF_DATASETS] = "prompt"
    """Column of the question."""
    answer_column: Annotated[str, NOT_OF_TASKS, NOT_OF_DATASETS] = "answer"
    """Column of the gold answer."""
    template: Annotated[str, NOT_OF_TASKS] = "{prompt}"
    """What the user message says; ``{prompt}`` is the question."""
    system: Annotated[str | None, NOT_OF_TASKS] = None
    """System message of the chat template; null: the template's own default."""
    max_prompt_tokens: Count = 1024
    """Limit of a tokenised prompt."""
    overlong: Literal["drop", "error"] = "drop"
    """What happens to a prompt over the limit: dropped and counted, or an error."""

    def find_mistakes(self) -> list[str]:
        """One source."""
        given = (self.task is not None, self.dataset is not None or self.path is not None)
        return [] if sum(given) == 1 else ["give exactly one of task, dataset and path"]


class SftDataConfig(Section):
    """Pairs of prompt and response. Exactly one of ``task`` and ``path``."""

    task: str | None = None
    """A built-in toy task's demonstrations."""
    path: str | None = None
    """JSONL file with a prompt and a response in each row."""
    prompt_column: Annotated[str, NOT_OF_TASKS] = "prompt"
    """Column of the prompt."""
    response_column: Annotated[str, NOT_OF_TASKS] = "response"
    """Column of the response."""
    system: Annotated[str | None, NOT_OF_TASKS] = None
    """System message of the chat template; null: the template's own default."""
    max_prompt_tokens: Count = 1024
    """Limit of a tokenised prompt."""
    max_response_tokens: Count = 1024
    """Limit of a tokenised response."""
    overlong: Literal["drop", "error"] = "drop"
    """What happens to a row over a limit: dropped and counted, or an error."""

    def find_mistakes(self) -> list[str]:
        """One source."""
        return ["give exactly one of task and path"] if (self.task is None) == (self.path is None) else []

"""Where prompts, held-out prompts and demonstrations come from."""

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from oapl_jax.config.applies import AppliesWhen, changed, is_null, one_of
from oapl_jax.config.reward import RewardConfig
from oapl_jax.config.section import Count, CountOrZero, Positive, Section

NOT_OF_TASKS = AppliesWhen("task", condition=is_null)
NOT_OF_DATASETS = AppliesWhen("dataset", condition=is_null)


def has_splits(*names: str | None) -> bool:
    """``dataset`` is given, or ``format`` is ``datasets`` or ``tfds``."""
    *datasets, file_format = names
    return any(name is not None for name in datasets) or file_format in ("datasets", "tfds")


def _has_configurations(dataset: str | None, file_format: str) -> bool:
    """``dataset`` is given, or ``format`` is ``datasets``."""
    return dataset is not None or file_format == "datasets"


class SumsConfig(Section):
    """The questions of the built-in task sums: ``38 + 40 =`` after worked examples."""

    digits: Annotated[int, Field(ge=1, le=9)] = 2
    """Digits of each of the two numbers."""
    operations: Annotated[tuple[Literal["+", "-", "*"], ...], Field(min_length=1)] = ("+",)
    """What is done with them, drawn with equal probability."""
    shots: CountOrZero = 3
    """Worked examples before the question; they come from the training split."""
    form: Literal["text", "chat"] = "text"
    """text: a line for each example, as raw text whatever the tokenizer has, which needs the stop string "\\n"; chat: a
    turn for each example, in the chat template."""


Sums = Annotated[SumsConfig, AppliesWhen("task", condition=one_of("sums"))]


class SourceConfig(Section):
    """Where prompts come from. Exactly one of ``task``, ``dataset`` and ``path``; ``dataset`` may have a ``path``."""

    task: str | None = None
    """A built-in task, chain, countdown or sums; prompts, split and reward come with it."""
    sums: Sums = SumsConfig()
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
    """Column of the question: text, or a list of messages ``{role, content}``. ``a.b`` is entry ``b`` of column ``a``."""
    answer_column: Annotated[str | None, NOT_OF_TASKS, NOT_OF_DATASETS] = "answer"
    """Column of the gold answer, text or a number, such as ``reward_model.ground_truth``; null: there is none."""
    columns: Annotated[tuple[str, ...], NOT_OF_TASKS, NOT_OF_DATASETS] = ()
    """Further columns that reward functions of yours find in ``prompt.columns``."""
    template: Annotated[str, NOT_OF_TASKS] = "{prompt}"
    """What the user message says, the last one of a list; ``{prompt}`` is the question."""
    system: Annotated[str | None, NOT_OF_TASKS] = None
    """System message of the chat template; null: that of the row, or the template's own default."""

    def find_mistakes(self) -> Iterable[str]:
        """One source."""
        given = (self.task is not None, self.dataset is not None or self.path is not None)
        return [] if sum(given) == 1 else ["give exactly one of task, dataset and path"]


class SetConfig(SourceConfig):
    """One data set of several."""

    reward: Annotated[RewardConfig | None, NOT_OF_TASKS] = None
    """How responses are graded; null: by the section ``reward``, or as ``data.sets`` says of a held-out set's namesake."""
    weight: Positive = 1.0
    """Training: its share of the prompts that are drawn, relative to the weights of the others."""


def _check_names(sets: dict[str, SetConfig]) -> dict[str, SetConfig]:
    for name in sets:  # which begins the ids of prompts, and is part of the names of metrics
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ValueError(f"{name!r} is no name of a data set; use letters, digits, _ and -")
    return sets


Sets = Annotated[dict[str, SetConfig], AfterValidator(_check_names)]


def inert_weights(sets: Mapping[str, SetConfig], key: str) -> list[str]:
    """A line for each weight, where every prompt is asked once."""
    problem = "has no effect, every prompt is asked once; remove it"
    return [f"{key}.{name}.weight: {problem}" for name, part in sets.items() if "weight" in changed(part)]


class DataConfig(SourceConfig):
    """Where prompts come from: one source, or several ``sets`` with sources of their own (docs/data.md)."""

    sets: Sets = Field(default={})
    """Data sets by their names, which begin the ids of their prompts. The fields of the source then stand in each."""
    max_prompt_tokens: Count = 1024
    """Limit of a tokenised prompt."""
    overlong: Literal["drop", "error"] = "drop"
    """What happens to a prompt over the limit: dropped and counted, or an error."""

    def find_mistakes(self) -> Iterable[str]:
        """One source, or several sets."""
        if not self.sets:
            return super().find_mistakes()
        fields = sorted(changed(self) & SourceConfig.model_fields.keys())
        return [f"{field}: has no effect with sets; remove it, or move it to each of them" for field in fields]

    @property
    def is_endless(self) -> bool:
        """Whether its prompts have no last one: those of a built-in task, and of several data sets, which are mixed."""
        return self.task is not None or bool(self.sets)

    def of(self, source: SourceConfig) -> "DataConfig":
        """This section with another source."""
        return self.model_copy(
            update={"sets": {}} | {name: getattr(source, name) for name in SourceConfig.model_fields}
        )

    def graded(self, reward: RewardConfig) -> dict[str, tuple["DataConfig", RewardConfig]]:
        """Each data set as a section of its own, with how it is graded, by its name; '' where there is one without."""
        sets = {name: (self.of(part), part.reward or reward) for name, part in self.sets.items()}
        return sets or {"": (self, reward)}


GradedSets = Mapping[str, tuple[SourceConfig, RewardConfig]]
"""Data sets by what the ids of their prompts begin with ('' for any), each with how it is graded."""


class SftDataConfig(Section):
    """Pairs of prompt and response. Exactly one of ``task`` and ``path``."""

    task: str | None = None
    """A built-in task's demonstrations."""
    sums: Sums = SumsConfig()
    path: str | None = None
    """JSONL file with a prompt and a response in each row."""
    prompt_column: Annotated[str, NOT_OF_TASKS] = "prompt"
    """Column of the prompt: text, or a list of messages ``{role, content}``. ``a.b`` is entry ``b`` of column ``a``."""
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

    def find_mistakes(self) -> Iterable[str]:
        """One source."""
        return ["give exactly one of task and path"] if (self.task is None) == (self.path is None) else []

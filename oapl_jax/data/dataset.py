"""The description of a published data set: its location, columns, prompt and reward."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

BOXED = "{prompt}\nPlease reason step by step, and put your final answer within \\boxed{}."
"""User message of mathematical data sets."""

PROGRAM = "{prompt}\nThink first, then give the whole program in one Python code block at the end."
"""User message of data sets of programs."""


class Source(NamedTuple):
    """Location of a split on the Hugging Face hub."""

    split: str
    """Its name on the hub."""
    name: str | None = None
    """Configuration of the data set."""
    files: tuple[str, ...] = ()
    """Data files to read instead of loading the repository by its name."""


class Problem(NamedTuple):
    """The content of a row."""

    question: str
    answer: str
    """The gold answer, or tests in a layout of rewards/code/layouts.py."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A published data set; each has a file in ``data/datasets/``."""

    hub: str
    """Its name on the Hugging Face hub."""
    splits: Mapping[str, Source]
    """Its splits by our names: ``train`` and ``test``."""
    columns: tuple[str, ...]
    """Columns that every row must have."""
    read: Callable[[dict[str, Any]], Problem | None]
    """Makes a problem from a row's cells by column, or None if the row cannot be graded."""
    reward: Literal["math", "code"]
    """The reward function that grades it."""
    template: str
    """User message, unless the config has one."""
    optional: tuple[str, ...] = ()
    """Columns that may be missing, which makes their cells None."""


def with_starter_code(question: str, starter_code: str | None) -> str:
    """A question, followed by the code that the program must begin with, if there is any."""
    if not (starter_code or "").strip():
        return question
    return f"{question}\n\nBegin with this code:\n```python\n{starter_code}\n```"

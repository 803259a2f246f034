"""The description of a published data set: its location, columns, prompt and reward."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from oapl_jax.data.messages import Question

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

    question: Question
    answer: str
    """The gold answer, or tests in a layout of rewards/code/layouts.py."""
    columns: dict[str, Any] | None = None
    """The cells of ``data.columns``."""


Cells = dict[str, Any]
"""A row's cells by column."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A published data set; each has an entry in ``catalogue.py``."""

    hub: str
    """Its name on the Hugging Face hub."""
    splits: Mapping[str, Source]
    """Its splits by our names: ``train`` and ``test``."""
    columns: tuple[str, ...]
    """Columns that every row must have."""
    read: Callable[[Cells], Problem | None]
    """Makes a problem from a row, or None if the row cannot be graded."""
    reward: Literal["math", "code"] = "code"
    """The reward function that grades it."""
    template: str = PROGRAM
    """User message, unless the config has one."""
    optional: tuple[str, ...] = ()
    """Columns that may be missing, which makes their cells None."""

"""APPS: 5,000 training and 5,000 test problems; ``input_output`` is JSON, or empty if a problem has no tests."""

import json
from typing import Any

from oapl_jax.data.dataset import PROGRAM, Dataset, Problem, Source, with_starter_code


def read_input_output(row: dict[str, Any]) -> Problem | None:
    """Reads a row in the layout of APPS, which TACO uses too."""
    tests = row["input_output"]
    if not tests or not json.loads(tests).get("inputs"):
        return None
    return Problem(with_starter_code(row["question"], row["starter_code"]), tests)


def _source(split: str) -> Source:
    return Source("train", files=(f"hf://datasets/codeparrot/apps/{split}.jsonl",))


DATASET = Dataset(
    hub="codeparrot/apps",
    splits={"train": _source("train"), "test": _source("test")},
    columns=("question", "input_output"),
    optional=("starter_code",),
    read=read_input_output,
    reward="code",
    template=PROGRAM,
)

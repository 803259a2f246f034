"""LiveCodeBench's code generation, release 5: problems with public tests and packed private tests."""

import json
from typing import Any

from oapl_jax.data.dataset import PROGRAM, Dataset, Problem, Source, with_starter_code

_FILES = "hf://datasets/livecodebench/code_generation_lite/{}.jsonl"
_TESTS = ("public_test_cases", "private_test_cases", "metadata")


def _read(row: dict[str, Any]) -> Problem | None:
    question = with_starter_code(row["question_content"], row["starter_code"])
    return Problem(question, json.dumps({column: row[column] for column in _TESTS}))


DATASET = Dataset(
    hub="livecodebench/code_generation_lite",
    splits={"test": Source("train", files=tuple(map(_FILES.format, ("test", "test2", "test3", "test4", "test5"))))},
    columns=("question_content", "starter_code", *_TESTS),
    read=_read,
    reward="code",
    template=PROGRAM,
)

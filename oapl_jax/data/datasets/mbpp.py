"""MBPP: 974 short functions, 500 of them in the test split; sanitized MBPP has the question in ``prompt``."""

import json
from typing import Any

from oapl_jax.data.dataset import Dataset, Problem, Source


def _read(row: dict[str, Any]) -> Problem | None:
    question = row["text"] or row["prompt"]
    if not question or not row["test_list"]:
        return None
    tests = {"test_list": row["test_list"], "test_setup_code": row["test_setup_code"] or ""}
    shown = "\n".join(row["test_list"])  # the tests name the function
    return Problem(
        f"{question}\n\nIt has to pass these tests:\n```python\n{shown}\n```",
        json.dumps({**tests, "test_imports": row["test_imports"] or []}),
    )


DATASET = Dataset(
    hub="google-research-datasets/mbpp",
    splits={"train": Source("train", "full"), "test": Source("test", "full")},
    columns=("test_list",),
    optional=("text", "prompt", "test_setup_code", "test_imports"),
    read=_read,
    reward="code",
    template="{prompt}\nGive the whole function, with its imports, in one Python code block.",
)

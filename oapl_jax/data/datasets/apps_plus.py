"""APPS+: 7,413 refined problems of APPS, read from a local copy of Ablustrund/APPS_Plus on GitHub.

Its paper lists a description, a canonical solution, a function name, inputs, outputs and starter code for each
problem. The reader accepts APPS's column ``input_output``, as text or as an object, or the columns ``inputs``,
``outputs`` and ``fn_name``.
"""

import json
from typing import Any

from oapl_jax.data.dataset import PROGRAM, Dataset, Problem, with_starter_code

_TESTS = ("inputs", "outputs", "fn_name")


def _read(row: dict[str, Any]) -> Problem | None:
    tests = row["input_output"] or {key: row[key] for key in _TESTS if row[key]}
    tests = json.loads(tests) if isinstance(tests, str) else tests
    if not tests.get("inputs"):
        return None
    return Problem(with_starter_code(row["question"], row["starter_code"]), json.dumps(tests))


DATASET = Dataset(
    hub="",
    splits={},
    columns=("question",),
    optional=("input_output", "starter_code", *_TESTS),
    read=_read,
    reward="code",
    template=PROGRAM,
)

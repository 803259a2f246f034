"""The published data sets by their names in ``data.dataset`` (docs/evaluation.md has a table), and how a row is read."""

import json
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


class Dataset(NamedTuple):
    """A published data set."""

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


LIVECODEBENCH_FILES = "hf://datasets/livecodebench/code_generation_lite/{}.jsonl"
LIVECODEBENCH_TESTS = ("public_test_cases", "private_test_cases", "metadata")


def _problem_and_answer(row: Cells) -> Problem:
    return Problem(row["problem"], str(row["answer"]))


def _math(hub: str, **splits: Source) -> Dataset:
    """Mathematical problems with their answers in two columns."""
    return Dataset(hub, splits, ("problem", "answer"), _problem_and_answer, "math", BOXED)


def _gsm8k(row: Cells) -> Problem | None:
    """The answer column is a solution that ends with ``#### answer``."""
    _, mark, gold = row["answer"].rpartition("####")
    return Problem(row["question"], gold.strip().replace(",", "")) if mark else None


def _apps(row: Cells) -> Problem | None:
    """``input_output`` is JSON, or empty if a problem has no tests."""
    tests = row["input_output"]
    if not tests or not json.loads(tests).get("inputs"):
        return None
    return _with_starter_code(row["question"], row, tests)


def _apps_plus(row: Cells) -> Problem | None:
    """The column ``input_output`` of APPS, as text or as an object, or ``inputs``, ``outputs`` and ``fn_name``."""
    tests = row["input_output"] or {key: row[key] for key in ("inputs", "outputs", "fn_name") if row[key]}
    tests = json.loads(tests) if isinstance(tests, str) else tests
    return _with_starter_code(row["question"], row, json.dumps(tests)) if tests.get("inputs") else None


def _deepcoder(row: Cells) -> Problem | None:
    if row["tests"] in (None, "", "[]", "{}"):
        return None
    return _with_starter_code(row["problem"], row, row["tests"])


def _humaneval(row: Cells) -> Problem:
    tests = {"prompt": row["prompt"], "test": row["test"], "entry_point": row["entry_point"]}
    return Problem(row["prompt"].strip(), json.dumps(tests))


def _livecodebench(row: Cells) -> Problem:
    tests = json.dumps({column: row[column] for column in LIVECODEBENCH_TESTS})
    return _with_starter_code(row["question_content"], row, tests)


def _mbpp(row: Cells) -> Problem | None:
    """The sanitized MBPP has the question in ``prompt``; the tests, which name the function, are shown."""
    question = row["text"] or row["prompt"]
    if not question or not row["test_list"]:
        return None
    tests = {"test_list": row["test_list"], "test_setup_code": row["test_setup_code"] or ""}
    tests["test_imports"] = row["test_imports"] or []
    shown = "\n".join(row["test_list"])
    return Problem(f"{question}\n\nIt has to pass these tests:\n```python\n{shown}\n```", json.dumps(tests))


def _with_starter_code(question: str, row: Cells, tests: str) -> Problem:
    """The question, followed by the code that the program must begin with, if there is any."""
    code: Any = row["starter_code"]
    if (code or "").strip():
        question = f"{question}\n\nBegin with this code:\n```python\n{code}\n```"
    return Problem(question, tests)


def _hub(*splits: str, name: str | None = None) -> dict[str, Source]:
    """Splits that have our names on the hub."""
    return {split: Source(split, name) for split in splits}


_APPS = {name: Source("train", files=(f"hf://datasets/codeparrot/apps/{name}.jsonl",)) for name in ("train", "test")}
_COMPLETE = """Complete this function. Give the whole function, with its imports, in one Python code block.
```python
{prompt}
```"""
_WHOLE = "{prompt}\nGive the whole function, with its imports, in one Python code block."
_CODE = ("starter_code",)
_LIVECODEBENCH = Source(
    "train", files=tuple(map(LIVECODEBENCH_FILES.format, ("test", "test2", "test3", "test4", "test5")))
)
"""Release 5."""

DATASETS: dict[str, Dataset] = {
    "aime2025": _math("MathArena/aime_2025", test=Source("train")),
    "apps": Dataset("codeparrot/apps", _APPS, ("question", "input_output"), _apps, optional=_CODE),
    # Not on the hub: read from a local copy of Ablustrund/APPS_Plus on GitHub.
    "apps_plus": Dataset(
        "", {}, ("question",), _apps_plus, optional=("input_output", *_CODE, "inputs", "outputs", "fn_name")
    ),
    "brumo2025": _math("MathArena/brumo_2025", test=Source("train")),
    # ``data.name`` is primeintellect, taco, lcbv5 or codeforces.
    "deepcoder": Dataset(
        "agentica-org/DeepCoder-Preview-Dataset",
        {"train": Source("train", "primeintellect"), "test": Source("test", "lcbv5")},
        ("problem", "tests"),
        _deepcoder,
        optional=_CODE,
    ),
    "deepscaler": _math("agentica-org/DeepScaleR-Preview-Dataset", train=Source("train")),
    "gsm8k": Dataset("openai/gsm8k", _hub("train", "test", name="main"), ("question", "answer"), _gsm8k, "math", BOXED),
    "hmmt_feb_2025": _math("MathArena/hmmt_feb_2025", test=Source("train")),
    "hmmt_nov_2025": _math("MathArena/hmmt_nov_2025", test=Source("train")),
    "humaneval": Dataset(
        "openai/openai_humaneval", _hub("test"), ("prompt", "test", "entry_point"), _humaneval, template=_COMPLETE
    ),
    "livecodebench": Dataset(
        "livecodebench/code_generation_lite",
        {"test": _LIVECODEBENCH},
        ("question_content", *_CODE, *LIVECODEBENCH_TESTS),
        _livecodebench,
    ),
    "math500": _math("HuggingFaceH4/MATH-500", test=Source("test")),
    "mbpp": Dataset(
        "google-research-datasets/mbpp",
        _hub("train", "test", name="full"),
        ("test_list",),
        _mbpp,
        template=_WHOLE,
        optional=("text", "prompt", "test_setup_code", "test_imports"),
    ),
    "taco": Dataset("BAAI/TACO", _hub("train", "test"), ("question", "input_output"), _apps, optional=_CODE),
}

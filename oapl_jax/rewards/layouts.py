"""The tests of published data sets, in the form that ``code.parse_tests`` takes.

| data set | its layout |
|---|---|
| APPS, TACO, LiveCodeBench's harness | ``{inputs, outputs, fn_name?}`` |
| DeepCoder | the above, ``[{type, input, output, fn_name?}]``, or LiveCodeBench's |
| LiveCodeBench | ``[{input, output, testtype, metadata?}]``, or a row with public and private test cases |
| LeetCode | ``{functional}``: source that calls ``check`` |
| HumanEval | ``{prompt, test, entry_point}`` |
| MBPP | ``{test_list, test_setup_code?, test_imports?}`` |
"""

import ast
import base64
import io
import json
import pickle
import zlib
from typing import Any


def read_tests(layout: Any) -> list[dict]:
    """The tests of one row, whichever layout it has.

    Raises:
        ValueError: where the layout is none of those above.
    """
    if isinstance(layout, str):
        layout = json.loads(layout)
    if isinstance(layout, list):
        return [_one_test(test, None) for test in layout]
    if isinstance(layout, dict):
        for keys, reader in _READERS:
            if keys <= set(layout):
                return reader(layout)
    raise ValueError(f"the layout of the tests is not known (oapl_jax/rewards/layouts.py lists them): {layout!r:.200}")


def _one_test(test: Any, function: str | None) -> dict:
    """A test of a list: ours as it is, else DeepCoder's or LiveCodeBench's."""
    if not isinstance(test, dict) or "input" not in test:
        return test
    metadata = test.get("metadata") or {}
    metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
    function = test.get("fn_name") or metadata.get("func_name") or function
    if test.get("type") == "function_call":
        return _call(str(function), test["input"], test["output"])
    if test.get("testtype") == "functional":
        arguments = [json.loads(line) for line in test["input"].split("\n")]
        return {"call": function, "args": arguments, "expected": json.loads(test["output"])}
    return {"stdin": _text(test["input"]), "stdout": _text(test["output"])}


def _text(value: Any) -> str:
    """TACO gives some outputs as lists."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _call(function: str, arguments: Any, output: Any) -> dict:
    """APPS and those that took it over wrap some return values in a list, and do not say which: both are right."""
    if isinstance(arguments, str):  # a JSON value a line
        arguments = [json.loads(line) for line in arguments.split("\n")]
        output = json.loads(output) if isinstance(output, str) else output
    right = [output, output[0]] if isinstance(output, list) and output else [output]
    return {"call": function, "args": arguments, "any_of": right}


def _inputs_and_outputs(row: dict) -> list[dict]:
    pairs = zip(row["inputs"], row["outputs"], strict=True)
    if row.get("fn_name"):
        return [_call(row["fn_name"], arguments, output) for arguments, output in pairs]
    return [{"stdin": _text(given), "stdout": _text(output)} for given, output in pairs]


def _live_code_bench(row: dict) -> list[dict]:
    metadata = row.get("metadata") or {}
    metadata = json.loads(metadata) if isinstance(metadata, str) else metadata
    tests = json.loads(row["public_test_cases"])
    private = row.get("private_test_cases") or "[]"
    try:
        tests += json.loads(private)
    except json.JSONDecodeError:
        packed = zlib.decompress(base64.b64decode(private))
        tests += json.loads(_TextUnpickler(io.BytesIO(packed)).load())
    return [_one_test(test, metadata.get("func_name")) for test in tests]


class _TextUnpickler(pickle.Unpickler):
    """LiveCodeBench packs a string as a pickle: plain values only, no class is looked up."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise ValueError(f"private_test_cases: asks for {module_name}.{global_name}")


def _human_eval(row: dict) -> list[dict]:
    """The tests with the helpers that the prompt gives them; these must not be the program's to define."""
    tests, entry_point = row["test"], row["entry_point"]
    used = {node.id for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)}
    helpers, imports = [], []
    for node in ast.parse(row["prompt"]).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imports.append(ast.unparse(node))
        elif isinstance(node, ast.FunctionDef) and node.name in used - {entry_point}:
            helpers.append(ast.unparse(node))
    source = "\n".join([*(imports if helpers else ()), *helpers, tests])
    return [{"assert": source if f"check({entry_point})" in tests else f"{source}\ncheck({entry_point})\n"}]


def _mbpp(row: dict) -> list[dict]:
    before = [row.get("test_setup_code") or "", *(row.get("test_imports") or ())]
    return [{"assert": "\n".join([*before, test])} for test in row["test_list"]]


_READERS = (
    ({"inputs", "outputs"}, _inputs_and_outputs),
    ({"public_test_cases"}, _live_code_bench),
    ({"functional"}, lambda row: [{"assert": row["functional"]}]),
    ({"prompt", "test", "entry_point"}, _human_eval),
    ({"test_list"}, _mbpp),
    ({"tests"}, lambda row: read_tests(row["tests"])),
)

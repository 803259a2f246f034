"""Converts the tests of published data sets to the form that ``programs.parse_tests`` takes.

| data set | layout |
|---|---|
| APPS, TACO, LiveCodeBench's harness | ``{inputs, outputs, fn_name?}`` |
| DeepCoder | the above, ``[{type, input, output, fn_name?}]``, or LiveCodeBench's |
| LiveCodeBench | ``[{input, output, testtype, metadata?}]``, or a row with public and private test cases |
| LeetCode | ``{functional}``: source code that calls ``check`` |
| HumanEval | ``{prompt, test, entry_point}`` |
| MBPP | ``{test_list, test_setup_code?, test_imports?}`` |
"""

import ast
import base64
import json
import pickle
import pickletools
import zlib
from typing import Any

MAX_UNPACKED = 1 << 27
"""Most bytes of unpacked tests: a small file can expand a thousandfold."""
STRING_OPCODES = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"}
HARMLESS_OPCODES = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP"}


def read_tests(layout: Any) -> list[dict]:
    """The tests of one row; raises ValueError where the layout is none of those above."""
    try:
        layout = json.loads(layout) if isinstance(layout, str) else layout
        if isinstance(layout, list):
            tests = [_one_test(test, None) for test in layout]
            _unwrap([new for old, new in zip(layout, tests, strict=True) if new is not old and "any_of" in new])
            return tests
        for keys, reader in _READERS if isinstance(layout, dict) else ():
            if keys <= set(layout):
                return reader(layout)
    except (KeyError, IndexError, TypeError, AttributeError, SyntaxError, RecursionError) as error:
        raise ValueError(f"the tests are damaged: {type(error).__name__}: {error!s:.100}") from None
    raise ValueError(
        f"the tests have an unknown layout (oapl_jax/rewards/code/layouts.py lists the known ones): {layout!r:.200}"
    )


def _one_test(test: Any, function: str | None) -> dict:
    """A test of a list: one in our form stays as it is, those of DeepCoder and LiveCodeBench are converted."""
    if not isinstance(test, dict) or "input" not in test:
        return test
    function = test.get("fn_name") or _function_of(test) or function
    if test.get("type") == "function_call":
        return _call(str(function), test["input"], test["output"])
    if test.get("testtype") == "functional":
        arguments = [json.loads(line) for line in test["input"].split("\n")]
        return {"call": function, "args": arguments, "expected": json.loads(test["output"])}
    return {"stdin": _text(test["input"]), "stdout": _text(test["output"])}


def _text(value: Any) -> str:
    """Some outputs of TACO are lists of lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _call(function: str, arguments: Any, output: Any) -> dict:
    if isinstance(arguments, str):  # one JSON value per line
        arguments = [json.loads(line) for line in arguments.split("\n")]
        output = json.loads(output) if isinstance(output, str) else output
    return {"call": function, "args": arguments, "any_of": [output]}


def _unwrap(calls: list[dict]) -> None:
    """Accepts the only item of an output as well, where every output of the function is a list of one item.

    APPS and its successors wrap return values in a list for some problems and do not say for which.
    """
    if all(isinstance(output, list) and len(output) == 1 for call in calls for output in call["any_of"]):
        for call in calls:
            call["any_of"] += call["any_of"][0]


def _inputs_and_outputs(row: dict) -> list[dict]:
    pairs = zip(row["inputs"], row["outputs"], strict=True)
    if row.get("fn_name"):
        calls = [_call(row["fn_name"], arguments, output) for arguments, output in pairs]
        _unwrap(calls)
        return calls
    return [{"stdin": _text(given), "stdout": _text(output)} for given, output in pairs]


def _live_code_bench(row: dict) -> list[dict]:
    tests = json.loads(row["public_test_cases"])
    private = row.get("private_test_cases") or "[]"
    try:
        tests += json.loads(private)
    except json.JSONDecodeError:
        tests += json.loads(unpack(private))
    return [_one_test(test, _function_of(row)) for test in tests]


def _function_of(row: dict) -> str | None:
    metadata = row.get("metadata") or {}
    return (json.loads(metadata) if isinstance(metadata, str) else metadata).get("func_name")


def pack(text: str) -> str:
    """``base64(zlib(pickle(text)))``: LiveCodeBench and the paper's authors store tests in this form."""
    return base64.b64encode(zlib.compress(pickle.dumps(text))).decode()


def unpack(packed: str) -> str:
    """The inverse of ``pack``. The pickle is never executed: a ValueError refuses what is not exactly one string."""
    try:
        decompressor = zlib.decompressobj()
        data = decompressor.decompress(base64.b64decode(packed, validate=True), MAX_UNPACKED)
    except (ValueError, zlib.error) as error:  # binascii's error is a ValueError
        raise ValueError(f"is not base64 of a zlib stream: {error}") from None
    if not decompressor.eof:
        raise ValueError(f"is a truncated zlib stream, or one of more than {MAX_UNPACKED:,} bytes")
    return _pickled_string(data)


def _pickled_string(data: bytes) -> str:
    strings, is_ended = [], False
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in STRING_OPCODES:
                strings.append(argument)
            elif opcode.name not in HARMLESS_OPCODES:
                raise ValueError(f"its pickle has {opcode.name} {argument!r:.80}; it may contain only a string")
            is_ended = opcode.name == "STOP"
    except (ValueError, UnicodeDecodeError, IndexError) as error:
        raise ValueError(f"is refused: {error}") from None
    if len(strings) != 1 or not is_ended:
        raise ValueError(f"is refused: its pickle has {len(strings)} strings; it must contain exactly one")
    return strings[0]


def _human_eval(row: dict) -> list[dict]:
    """The tests, with the helper functions of the prompt, which the program must not be able to redefine."""
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

"""Runs a program in a confined child: as a script, as a server of its functions, or as tests of such a server.

This code runs after the seccomp filter is in place. Once the program has started, this process cannot be trusted: its
output is compared in another process, with values that it never sees.
"""

import ast
import atexit
import builtins
import functools
import io
import os
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterable
from typing import Any

from oapl_jax.rewards.code.sandbox.confined import values
from oapl_jax.rewards.code.sandbox.confined.calls import EXIT_CRASH, Peer

EXIT_COMPILE, EXIT_PASSED, EXIT_WRONG, EXIT_UNASKED, EXIT_MEMORY = 65, 70, 71, 72, 77
"""How a child ended. ``EXIT_PASSED`` and ``EXIT_UNASKED`` (the tests did not use the program) count for tests only."""
TEST_RECURSION_LIMIT = 10_000

STAR_IMPORTS = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json"
)
_MODULES = STAR_IMPORTS.split()
PREFIX = "\n".join(
    [f"from {name} import *" for name in [*_MODULES, "builtins", "typing"]] + [f"import {name}" for name in _MODULES]
)
"""LiveCodeBench's imports, which programs with function-call tests and assertions may use without importing them."""
LCB_RECURSION_LIMIT = 50_000
_STANDARD_FILES = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
_STANDARD_FILES |= {f"{folder}/{number}": number for folder in ("/dev/fd", "/proc/self/fd") for number in range(3)}


def names_for(mode: str) -> dict[str, Any]:
    """Names that are defined for a program of this mode: none for a script, otherwise those that its judge provides."""
    if mode in ("script", "lcb"):
        return {}
    if mode == "test":
        return {name: __import__(name) for name in _MODULES} | values.LEETCODE_NAMES
    names: dict[str, Any] = {}
    exec(PREFIX, names)
    return names | values.LEETCODE_NAMES


def open_standard_files() -> None:
    """Lets programs open ``/dev/stdin`` by its name, for which the kernel needs a /proc that the sandbox may lack."""
    open_file, open_descriptor = io.open, os.open

    class FileIO(io.FileIO):
        def __init__(self, file: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(_resolved(file), *args, **kwargs)

    @functools.wraps(open_file)
    def opened(file: Any, *args: Any, **kwargs: Any) -> Any:
        return open_file(_resolved(file), *args, **kwargs)

    @functools.wraps(open_descriptor)
    def opened_descriptor(path: Any, *args: Any, **kwargs: Any) -> int:
        found = _resolved(path)
        return open_descriptor(path, *args, **kwargs) if found is path else found

    builtins.open = io.open = opened
    os.open, io.FileIO = opened_descriptor, FileIO


def _resolved(file: Any) -> Any:
    """A new descriptor for the name of a standard file; anything else as it is."""
    number = None if isinstance(file, int) else _STANDARD_FILES.get(os.fsdecode(file))
    return file if number is None else os.dup(number)


def run(mode: str, source: bytes, names: dict[str, Any], remote: Iterable[str] = ()) -> int:
    """Runs a program, in mode ``test`` tests, to its end and returns the exit status.

    ``names`` are defined for it; ``remote`` are the names of the program under test that the tests use.
    """
    main = types.ModuleType("__main__")
    vars(main).update({**names, "__file__": "solution.py", "__builtins__": builtins})
    sys.modules["__main__"], sys.argv = main, ["solution.py"]
    peer = None
    try:
        text = lcb_source(source) if mode == "lcb" else source
        code = compile(text, "solution.py", "exec", dont_inherit=True)
        if mode == "test":
            sys.setrecursionlimit(TEST_RECURSION_LIMIT)
            peer, caught = Peer("tests", vars(main)), _caught_names(source)
            for name in remote:
                vars(main)[name] = type(name, (Exception,), {}) if name in caught else peer.remote(name, name)
    except (SyntaxError, ValueError, OverflowError, RecursionError):
        traceback.print_exc(limit=0)
        return EXIT_COMPILE
    except MemoryError:
        return EXIT_MEMORY
    try:
        MODES[mode](code, vars(main))
        status = 0 if peer is None else EXIT_PASSED if peer.has_asked else EXIT_UNASKED
    except SystemExit:
        status = 0 if mode in ("script", "lcb") else EXIT_CRASH
    except MemoryError:
        status = EXIT_MEMORY
    except BaseException:
        status = EXIT_CRASH
        traceback.print_exc(limit=5)
    return _end_of_script(status)


def _end_of_script(status: int) -> int:
    """Does what the interpreter does when a script ends: it waits for threads, runs atexit functions and flushes."""
    try:
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        status = status or EXIT_CRASH
    return status


def lcb_source(source: bytes) -> str:
    """The program as LiveCodeBench rewrites it: imports first, all other statements inside one function."""
    tree = ast.parse(source)
    last = tree.body[-1] if tree.body else None
    if isinstance(last, ast.If) and ast.unparse(last.test).strip() == "__name__ == '__main__'":
        tree.body[-1:] = last.body
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    others = [node for node in tree.body if not isinstance(node, (ast.Import, ast.ImportFrom))]
    nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
    wrapped = ast.FunctionDef("wrapped_function", nothing, others, decorator_list=[], lineno=-1)
    return "\n".join([PREFIX, *map(ast.unparse, imports), ast.unparse(wrapped)])


def _mock_stdin(text: str) -> types.SimpleNamespace:
    """LiveCodeBench's mock: each read returns the whole text, lines are counted separately, and it has no iterator."""
    stream, lines, data = io.StringIO(text), iter(text.split("\n")), text.encode()
    mock = {name: getattr(stream, name) for name in dir(stream) if not name.startswith("_")}
    mock |= {"read": lambda *_: text, "readline": lambda *_: next(lines), "readlines": lambda *_: text.split("\n")}
    first = data.split(b"\n")[0] + b"\n"
    return types.SimpleNamespace(**mock, buffer=types.SimpleNamespace(read=lambda *_: data, readline=lambda *_: first))


def _run_lcb(code: types.CodeType, namespace: dict[str, Any]) -> None:
    text = sys.stdin.read()
    real, captured = os.dup(1), io.StringIO()
    captured.close = lambda: None
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # only output through sys.stdout counts
    builtins.exit = builtins.quit = None  # pyright: ignore[reportAttributeAccessIssue]
    sys.setrecursionlimit(LCB_RECURSION_LIMIT)
    namespace["__name__"] = "tmp_sol"
    exec(code, namespace)
    sys.stdin, sys.stdout, opened = _mock_stdin(text), captured, builtins.open  # pyright: ignore[reportAttributeAccessIssue]
    builtins.open = lambda *_, **__: io.StringIO(text)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        namespace["wrapped_function"]()
    except SystemExit:
        pass
    finally:
        builtins.open = opened
    with os.fdopen(real, "w", encoding="utf-8", errors="surrogatepass", newline="\n") as stream:
        stream.write(captured.getvalue())


def _serve(code: types.CodeType, namespace: dict[str, Any]) -> None:
    """Runs the program, then answers requests until the pipe is closed."""
    namespace["__name__"] = "tmp_sol"
    sys.modules["tmp_sol"] = sys.modules["__main__"]
    exec(code, namespace)
    Peer("program", namespace).serve()


_CATCHING = {"suppress": 0, "assertRaises": 0, "raises": 0, "isinstance": 1, "issubclass": 1}
"""Functions and the position of the argument that may be an exception."""


def _caught_names(source: bytes) -> set[str]:
    """Names that the tests catch as exceptions."""
    kinds: list[Any] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            kinds.append(node.type)
        elif isinstance(node, ast.Call):
            position = _CATCHING.get(getattr(node.func, "attr", getattr(node.func, "id", "")))
            kinds += [] if position is None else node.args[position : position + 1]
    return {name.id for kind in kinds if kind for name in ast.walk(kind) if isinstance(name, ast.Name)}


MODES: dict[str, Callable[[types.CodeType, dict[str, Any]], None]] = {
    "script": exec,
    "lcb": _run_lcb,
    "serve": _serve,
    "test": exec,
}

"""Runs a program in a confined child: as a script, as a server of its functions, or as tests of such a server.

This code runs after the seccomp filter is in place. Once the program has started, this process cannot be trusted: its
output is compared in another process, with values that it never sees.
"""

import ast
import atexit
import builtins
import io
import operator
import os
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterable
from typing import Any

from oapl_jax.rewards.code.sandbox.confined import values

RESULTS, REQUESTS = 4, 5
"""Descriptors of the child: frames to the grader and frames from it."""

EXIT_CRASH, EXIT_COMPILE, EXIT_NO_DATA, EXIT_MEMORY = 1, 65, 70, 77

STAR_IMPORTS = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json"
)
_MODULES = STAR_IMPORTS.split()
PREFIX = "\n".join(
    [f"from {name} import *" for name in [*_MODULES, "builtins", "typing"]] + [f"import {name}" for name in _MODULES]
)
"""LiveCodeBench's imports, which programs with function-call tests and assertions may use without importing them."""
LCB_RECURSION_LIMIT = 50_000


def names_for(mode: str) -> dict[str, Any]:
    """Names that are defined for a program of this mode: none for a script, otherwise those that its judge provides."""
    leetcode = {item.__name__: item for item in values.LEETCODE_NAMES}
    if mode in ("script", "lcb"):
        return {}
    if mode == "test":
        return {name: __import__(name) for name in _MODULES} | leetcode
    names: dict[str, Any] = {}
    exec(PREFIX, names)
    return names | leetcode


def run(mode: str, source: bytes, names: dict[str, Any], remote: Iterable[str] = ()) -> int:
    """Runs a program to its end and returns the exit status.

    Args:
        mode: ``script``, ``lcb``, ``serve`` or ``test``.
        source: the program; in mode ``test`` the tests.
        names: names that are defined for it.
        remote: names of the program under test that the tests use.
    """
    main = types.ModuleType("__main__")
    vars(main).update({**names, "__file__": "solution.py", "__builtins__": builtins})
    vars(main).update({name: Remote({"t": "name", "v": name}) for name in remote})
    sys.modules["__main__"], sys.argv = main, ["solution.py"]
    try:
        text = lcb_source(source) if mode == "lcb" else source
        code = compile(text, "solution.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, OverflowError, RecursionError):
        traceback.print_exc(limit=0)
        return EXIT_COMPILE
    except MemoryError:
        return EXIT_MEMORY
    status = 0
    try:
        MODES[mode](code, vars(main))
    except SystemExit:
        status = 0 if mode in ("script", "lcb") else EXIT_CRASH
    except MemoryError:
        status = EXIT_MEMORY
    except NoDataError:
        status = EXIT_NO_DATA
        traceback.print_exc(limit=0)
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


def _run_script(code: types.CodeType, namespace: dict[str, Any]) -> None:
    exec(code, namespace)


# ---- LiveCodeBench's own harness (lcb_runner/evaluation/testing_util.py) ----


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


class _MockBuffer:
    def __init__(self, text: str) -> None:
        self._data = text.encode()

    def read(self, *_: object) -> bytes:
        return self._data

    def readline(self, *_: object) -> bytes:
        return self._data.split(b"\n")[0] + b"\n"


class _MockStdin:
    """LiveCodeBench's mock: each read returns the whole text, lines are counted separately, and it has no iterator."""

    def __init__(self, text: str) -> None:
        self._text, self._lines = text, iter(text.split("\n"))
        self._stream = io.StringIO(text)
        self.buffer = _MockBuffer(text)

    def read(self, *_: object) -> str:
        return self._text

    def readline(self, *_: object) -> str:
        return next(self._lines)

    def readlines(self, *_: object) -> list[str]:
        return self._text.split("\n")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _run_lcb(code: types.CodeType, namespace: dict[str, Any]) -> None:
    text = sys.stdin.read()
    real, captured = os.dup(1), io.StringIO()
    captured.close = lambda: None
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # only output through sys.stdout counts
    builtins.exit = builtins.quit = None  # pyright: ignore[reportAttributeAccessIssue]
    sys.setrecursionlimit(LCB_RECURSION_LIMIT)
    namespace["__name__"] = "tmp_sol"
    exec(code, namespace)
    sys.stdin, sys.stdout, opened = _MockStdin(text), captured, builtins.open
    builtins.open = lambda *_, **__: io.StringIO(text)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        namespace["wrapped_function"]()
    except SystemExit:
        pass
    finally:
        builtins.open = opened
    with os.fdopen(real, "w", encoding="utf-8", errors="surrogatepass", newline="\n") as stream:
        stream.write(captured.getvalue())


# ---- the program under test, called by requests ----


def _serve(code: types.CodeType, namespace: dict[str, Any]) -> None:
    """Runs the program, then answers requests until the pipe is closed."""
    namespace["__name__"] = "tmp_sol"
    sys.modules["tmp_sol"] = sys.modules["__main__"]
    exec(code, namespace)
    handles: list[Any] = []

    def opaque(value: Any) -> dict:
        handles.append(value)
        return {"t": "opaque", "v": len(handles) - 1, "n": type(value).__name__[:80]}

    while True:
        try:
            request = values.read_frame(REQUESTS)
        except EOFError:
            os._exit(0)
        try:
            reply = _answer(request, namespace, handles, opaque)
        except Exception as error:
            reply = {"t": "raised", "n": type(error).__name__, "v": str(error)[:300]}
        values.write_frame(RESULTS, reply)


SPECIAL: dict[str, Callable[..., Any]] = {
    "call": lambda target, /, *args, **kwargs: target(*args, **kwargs),
    "get": getattr,
    "set": setattr,
    "iter": iter,
    "next": next,
    "len": len,
    "item": operator.getitem,
    "str": str,
    "bool": bool,
    "contains": operator.contains,
}


def _answer(request: dict, namespace: dict[str, Any], handles: list, opaque: Callable[[Any], dict]) -> dict:
    def resolve(node: dict) -> Any:
        if node["t"] == "name":
            return _named(node["v"], namespace)
        return handles[node["v"]]

    target = resolve(request["of"])
    args = [values.decode(node, resolve) for node in request["args"]]
    kwargs = {name: values.decode(node, resolve) for name, node in request["kwargs"].items()}
    result = SPECIAL[request["do"]](target, *args, **kwargs)
    reply = {"t": "value", "v": values.encode(result, opaque)}
    changed = [
        [i, values.encode(value, opaque)]
        for i, value in enumerate(args)
        if type(value) in (list, dict) and values.encode(value, opaque) != request["args"][i]
    ]
    return {**reply, "changed": changed} if changed else reply


def _named(name: str, namespace: dict[str, Any]) -> Any:
    """A method of the program's class ``Solution``, or a global name of the program."""
    solution: Any = namespace.get("Solution")
    return getattr(solution(), name) if hasattr(solution, name) else namespace[name]


# ---- assertions, which run in another child than the program that they test ----


class CandidateDiedError(BaseException):
    """The program under test has ended. It is not an Exception, so that a test cannot swallow it."""


class NoDataError(BaseException):
    """The test cannot run in two processes, which is not the program's fault."""


class Remote:
    """A proxy of something in the other child: a name of the program, or an object that cannot be sent as data.

    It equals only itself, so an object of the program cannot claim to equal what a test expects.
    """

    def __init__(self, node: dict) -> None:
        object.__setattr__(self, "_node", node)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", name, value)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 (ruff mistakes it for an ordinary method)
        return self._ask("call", *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("get", name)

    def __iter__(self) -> "Remote":
        return self._ask("iter")

    def __next__(self) -> Any:
        return self._ask("next")

    def __len__(self) -> int:
        return self._ask("len")

    def __getitem__(self, key: Any) -> Any:
        return self._ask("item", key)

    def __contains__(self, item: Any) -> bool:
        return self._ask("contains", item) is True

    def __bool__(self) -> bool:
        return self._ask("bool") is True

    def __str__(self) -> str:
        return str.__str__(self._ask("str"))

    def _ask(self, what: str, /, *args: Any, **kwargs: Any) -> Any:
        request = {
            "t": "ask",
            "do": what,
            "of": self._node,
            "args": [values.encode(value, _handed_back) for value in args],
            "kwargs": {name: values.encode(value, _handed_back) for name, value in kwargs.items()},
        }
        values.write_frame(RESULTS, request)
        reply = values.read_frame(REQUESTS)
        if reply["t"] == "raised":
            raise _EXCEPTIONS.get(reply["n"], RuntimeError)(reply["v"])
        if reply["t"] != "value":
            raise CandidateDiedError
        for i, node in reply.get("changed", ()):
            _become(args[i], values.decode(node, Remote))
        result = values.decode(reply["v"], Remote)
        return iter(result) if what == "iter" and isinstance(result, (list, str)) else result


def _handed_back(value: Any) -> dict:
    if not isinstance(value, Remote):
        raise NoDataError(f"a test passes a {type(value).__name__}, which cannot be sent as data")
    return value._node


def _become(old: Any, new: Any) -> None:
    """Applies the change that a call made to its argument."""
    if isinstance(old, list) and isinstance(new, list):
        old[:] = new
    elif isinstance(old, dict) and isinstance(new, dict):
        old.clear()
        old.update(new)


_EXCEPTIONS = {
    name: kind
    for name, kind in vars(sys.modules["builtins"]).items()
    if isinstance(kind, type) and issubclass(kind, Exception)
}


def _run_tests(code: types.CodeType, namespace: dict[str, Any]) -> None:
    exec(code, namespace)
    values.write_frame(RESULTS, {"t": "passed"})


MODES: dict[str, Callable[[types.CodeType, dict[str, Any]], None]] = {
    "script": _run_script,
    "lcb": _run_lcb,
    "serve": _serve,
    "test": _run_tests,
}

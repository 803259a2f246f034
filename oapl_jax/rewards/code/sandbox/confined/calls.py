"""Calls between a program and its tests, which run in two children, and the calls that a grader makes.

A request names an object of the other side and what to do with it; the reply has the result, or the exception, and the
arguments that changed. While one side waits for a reply it answers requests, so functions can be passed as arguments.
What a program returns reaches its tests as data. An object that is no data is a ``Remote`` there: it can be called, and
its attributes, items and iteration give data again, but it is never asked whether it is equal, contained, true or long.
"""

import os
from collections.abc import Iterable
from typing import Any

from oapl_jax.rewards.code.sandbox.confined import values

RESULTS, REQUESTS = 4, 5
"""Descriptors of the child: frames to the other side and frames from it."""
EXIT_CRASH = 1
MAX_TEXT = 300
_EXCEPTIONS = {
    name: kind
    for name, kind in vars(values.builtins).items()
    if isinstance(kind, type) and issubclass(kind, BaseException)
}


class Remote:
    """An object of the other side. It equals only itself, and it is always true."""

    def __init__(self, peer: "Peer", node: dict) -> None:
        vars(self).update(_peer=peer, _node=node, __name__=node.get("n"))

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.ask("set", self._node, name, value)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:  # noqa: D102 (ruff mistakes it for an ordinary method)
        return self._peer.ask("call", self._node, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._peer.ask("get", self._node, name)

    def __iter__(self) -> Any:
        return self._peer.ask("iter", self._node)

    def __next__(self) -> Any:
        return self._peer.ask("next", self._node)

    def __getitem__(self, key: Any) -> Any:
        return self._peer.ask("item", self._node, key)

    def __str__(self) -> str:
        return str.__str__(self._peer.ask("str", self._node))


_OPERATIONS = {
    "call": lambda target, /, *args, **kwargs: target(*args, **kwargs),
    "get": getattr,
    "set": setattr,
    "iter": iter,
    "next": next,
    "item": lambda target, key: target[key],
    "str": str,
}


class Peer:
    """One side of the calls.

    Args:
        side: ``program`` or ``tests``.
        names: the global names of this side.
    """

    def __init__(self, side: str, names: dict[str, Any]) -> None:
        self._side, self._names = side, names
        self._handles: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._remotes: dict[Any, Remote] = {}

    def remote(self, index: Any, name: Any = None) -> Remote:
        """The proxy of an object of the other side; there is one for each."""
        other = "tests" if self._side == "program" else "program"
        if index not in self._remotes:
            self._remotes[index] = Remote(self, {"t": "handle", "v": [other, index], "n": name})
        return self._remotes[index]

    def ask(self, do: str, of: dict, /, *args: Any, **kwargs: Any) -> Any:
        """Makes a request and returns the result, or raises the exception, of the other side."""
        graph = values.Graph(self._handle_of, self._owner_of)
        request = {"do": do, "of": of, **_encoded(graph, args, kwargs)}
        try:
            values.write_frame(RESULTS, request)
            while "do" in (reply := values.read_frame(REQUESTS)):
                values.write_frame(RESULTS, self._answer(reply))
            graph.add(reply["new"])
            for number, content in reply["changed"]:
                graph.fill(number, content)
            result = graph.decode(reply["v"])
            raised = self._exception(reply["raised"], result, reply["text"]) if "raised" in reply else None
        except BaseException:
            # The other side is gone, or what it sent is no reply. A test must not be able to catch that.
            os._exit(EXIT_CRASH)
        if raised is not None:
            raise raised
        # A list or text cannot lie about its items, so they need no further requests.
        return iter(result) if do == "iter" and isinstance(result, (list, str)) else result

    def serve(self) -> None:
        """Answers requests until the pipe is closed."""
        while True:
            try:
                request = values.read_frame(REQUESTS)
            except EOFError:
                os._exit(0)
            values.write_frame(RESULTS, self._answer(request))

    def _answer(self, request: dict) -> dict:
        graph = values.Graph(self._handle_of, self._owner_of)
        try:
            graph.add(request["new"])
            known = len(graph.objects)
            args = [graph.decode(node) for node in request["args"]]
            kwargs = {name: graph.decode(node) for name, node in request["kwargs"].items()}
            target = self._owner_of(request["of"])
            if self._side == "tests":
                _check_allowed(request["do"], target, *args)
            raised = {}
            try:
                result: Any = _OPERATIONS[request["do"]](target, *args, **kwargs)
            except BaseException as error:
                raised = {"raised": [kind.__name__ for kind in type(error).__mro__], "text": str(error)[:MAX_TEXT]}
                result = error.args, dict(vars(error))
            node = graph.encode(result)
            after = [graph.content(number) for number in range(known)]
            changed = [[number, content] for number, content in enumerate(after) if content != request["new"][number]]
            return {"v": node, "changed": changed, "new": graph.contents(known), **raised}
        except BaseException as error:
            # The result cannot be sent: it is too deep, say, or reading it raises an exception.
            names = [kind.__name__ for kind in type(error).__mro__]
            nothing = {"t": "tuple", "v": [{"t": "tuple", "v": []}, {"t": "tuple", "v": []}]}
            return {"v": nothing, "changed": [], "new": [], "raised": names, "text": ""}

    def _handle_of(self, value: Any) -> dict:
        if isinstance(value, Remote):
            return vars(value)["_node"]
        number = self._numbers.setdefault(id(value), len(self._handles))
        if number == len(self._handles):
            self._handles.append(value)
        name = getattr(value, "__name__", None)
        return {"t": "handle", "v": [self._side, number], "n": name if isinstance(name, str) else None}

    def _owner_of(self, node: dict) -> Any:
        side, index = node["v"]
        if side != self._side:
            return self.remote(index, node.get("n"))
        if isinstance(index, int):
            return self._handles[index]
        if side != "program":
            raise KeyError(index)
        solution: Any = self._names.get("Solution")
        return getattr(solution(), index) if hasattr(solution, index) else self._names[index]

    def _exception(self, names: list[str], state: Any, text: str) -> BaseException:
        """An exception of the nearest ancestor that this side knows, with the names of those that it does not know."""
        built_in = next(_EXCEPTIONS[name] for name in names if name in _EXCEPTIONS)
        kind, unknown = built_in, names[: names.index(built_in.__name__)]
        for number, name in enumerate(unknown):
            own = self._names.get(name)
            if isinstance(own, type) and issubclass(own, BaseException):
                kind = own if issubclass(own, built_in) else type(name, (own, built_in), {})
                unknown = unknown[:number]
                break
        for name in reversed(unknown):
            kind = type(name, (kind,), {})
        args, attributes = state
        try:
            error = kind(*args)
        except TypeError:
            return RuntimeError(text)
        vars(error).update(attributes)
        return error


def _encoded(graph: values.Graph, args: Iterable[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a request, and the contents of the objects in them."""
    nodes = {
        "args": [graph.encode(value) for value in args],
        "kwargs": {name: graph.encode(value) for name, value in kwargs.items()},
    }
    return {**nodes, "new": graph.contents()}


def call_of(function: str, args: Iterable[Any]) -> dict[str, Any]:
    """The request of a grader to call a function of the program with JSON values."""
    graph = values.Graph(_no_handle, _no_handle)
    return {"do": "call", "of": {"t": "handle", "v": ["program", function]}, **_encoded(graph, args, {})}


def _no_handle(value: Any) -> Any:
    raise TypeError(f"{value!r:.80} is no JSON value")


def _check_allowed(do: str, target: Any, *args: Any) -> None:
    """A program may call and iterate what the tests gave it, but not look behind it: frames and globals have answers."""
    if do in ("call", "iter", "next"):
        return
    name = args[0] if do in ("get", "set") else ""
    if type(target).__module__ != "__main__" or (isinstance(name, str) and name.startswith("_")):
        raise AttributeError(name)

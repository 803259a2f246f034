"""Calls between a program and its tests, which run in two children, and the calls that a grader makes.

A request names an object of the other side and what to do with it; the reply has the result, or the exception, and the
arguments that changed. While one side waits for a reply it answers requests, so functions can be passed as arguments.
What a program returns reaches its tests as data. An object that is no data is a ``Remote`` there: it can be called, and
its attributes, items and iteration give data again. What is equal or contained and how many there are is decided by the
values that crossed, never by the object.
"""

import contextlib
import copy
import itertools
import operator
import os
import sys
from collections.abc import Callable
from typing import Any

from oapl_jax.rewards.code.sandbox.confined import values

EXIT_CRASH = 1
_LIBRARIES = ("builtins", "decimal", "json.decoder", "statistics")
"""Modules whose exceptions both sides know; an exception of ``unittest`` could end the tests."""


def _asks(do: str) -> Callable[..., Any]:
    """A method that asks the other side for an operation."""
    return lambda self, /, *args, **kwargs: self._its_peer.ask(do, self._its_node, *args, **kwargs)


class Remote:
    """An object of the other side. It equals only itself, and it is always true."""

    __call__, __getitem__, __next__ = _asks("call"), _asks("item"), _asks("next")
    __setattr__, __setitem__ = _asks("set"), _asks("put")

    def __init__(self, peer: "Peer", node: dict) -> None:
        vars(self).update(_its_peer=peer, _its_node=node, _its_items=(-1, None), __name__=node.get("n"))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._its_peer.ask("get", self._its_node, name)

    def __str__(self) -> str:
        return str.__str__(self._its_peer.ask("str", self._its_node))

    def __iter__(self) -> Any:
        """Iterates over what has crossed; the object is asked again only after a call that may have changed it."""
        when, items = self._its_items
        if when != self._its_peer.num_changes:
            items = self._its_peer.ask("iter", self._its_node)
            if items is self:  # an iterator: what it gave is gone
                return self
            (items,) = itertools.tee(items, 1)
            vars(self)["_its_items"] = self._its_peer.num_changes, items
        return copy.copy(items)

    def __len__(self) -> int:
        if iter(self) is self:
            raise TypeError("an iterator has no length")
        return sum(1 for _ in self)

    def __bool__(self) -> bool:
        return True


_OPERATIONS = {"get": getattr, "set": setattr, "item": operator.getitem, "put": operator.setitem}
_OPERATIONS |= {"call": operator.call, "iter": iter, "next": next, "str": str}


class Peer:
    """One side of the calls, ``program`` or ``tests``, with its global names."""

    def __init__(self, side: str, names: dict[str, Any]) -> None:
        self._side, self._names = side, names
        self._results, self._requests = os.fdopen(4, "wb", closefd=False), os.fdopen(5, "rb", closefd=False)
        self.has_asked = False
        self.num_changes = 0
        """Requests that may have changed objects of the other side."""
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
        self.has_asked = True
        self.num_changes += do in ("call", "set", "put")
        request = {"do": do, "of": of, "args": graph.encode((args, kwargs)), "new": graph.contents()}
        try:
            values.write_frame(self._results, request)
            while "do" in (reply := values.read_frame(self._requests)):
                values.write_frame(self._results, self._answer(reply))
            graph.add(reply["new"])
            for number, content in reply["changed"]:
                graph.fill(number, content)
            result = graph.decode(reply["v"])
            raised = self._exception(*result) if reply["is_raised"] else None
        except BaseException:
            # The other side is gone, or what it sent is no reply. A test must not be able to catch that.
            os._exit(EXIT_CRASH)
        if raised is not None:
            raise raised
        return result

    def serve(self) -> None:
        """Answers requests until the pipe is closed."""
        while True:
            try:
                request = values.read_frame(self._requests)
            except EOFError:
                os._exit(0)
            values.write_frame(self._results, self._answer(request))

    def _answer(self, request: dict) -> dict:
        graph = values.Graph(self._handle_of, self._owner_of)
        try:
            graph.add(request["new"])
            known = len(graph.objects)
            args, kwargs = graph.decode(request["args"])
            args = tuple(args)  # an object of the other side could give other items when it is asked again
            target = self._owner_of(request["of"])
            if self._side == "tests":
                _check_allowed(request["do"], target, *args)
            is_raised = False
            try:
                result: Any = _OPERATIONS[request["do"]](target, *args, **kwargs)
            except BaseException as error:
                is_raised, result = True, _parts_of(error)
            node = graph.encode(result)
            after = [graph.content(number) for number in range(known)]
            changed = [[number, content] for number, content in enumerate(after) if content != request["new"][number]]
            return {"v": node, "changed": changed, "new": graph.contents(known), "is_raised": is_raised}
        except BaseException as error:
            # The result cannot be sent: it is too deep, say, or reading it raises an exception.
            return {"v": graph.encode((_names_of(error), (), ())), "changed": [], "new": [], "is_raised": True}

    def _handle_of(self, value: Any) -> dict:
        if isinstance(value, Remote):
            return vars(value)["_its_node"]
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

    def _exception(self, names: tuple, args: tuple, attributes: tuple) -> BaseException:
        """An exception of the nearest ancestors that this side knows, with the names of those below them."""
        if ("builtins", "BaseExceptionGroup") in names:
            args = args[0], [self._exception(*member) for member in args[1]]
        found = [self._known(*name) for name in names]
        known = [kind for kind in found if kind]
        bases = [kind for kind in known if not any(kind in other.__mro__[1:] for other in known)]
        kind = bases[0]
        if len(bases) > 1:
            with contextlib.suppress(TypeError):  # their layouts can differ
                kind = type(kind.__name__, tuple(bases), {})
        for module, name in reversed(names[: found.index(known[0])]):
            kind = type(name, (kind,), {"__module__": module})
        try:
            error = kind(*args)
        except (TypeError, ValueError):  # some constructors take something else
            error = kind.__new__(kind, *args)
        vars(error).update(attributes)
        return error

    def _known(self, module: str, name: str) -> type[BaseException] | None:
        kind = getattr(sys.modules[module], name, None) if module in _LIBRARIES else self._names.get(name)
        return kind if isinstance(kind, type) and issubclass(kind, BaseException) else None


def _names_of(error: BaseException) -> tuple:
    return tuple((kind.__module__, kind.__name__) for kind in type(error).__mro__)


def _parts_of(error: BaseException) -> tuple:
    """An exception as data: the names of its ancestors, its arguments, or message and members, and its attributes."""
    args = error.args
    if isinstance(error, BaseExceptionGroup):
        args = error.message, tuple(map(_parts_of, error.exceptions))
    return _names_of(error), args, tuple(vars(error).items())


def _check_allowed(do: str, target: Any, *args: Any) -> None:
    """A program may call and iterate what the tests gave it, but not look behind it: frames and globals have answers."""
    if do in ("call", "iter", "next"):
        return
    name = args[0] if do in ("get", "set") else ""
    if type(target).__module__ != "__main__" or (isinstance(name, str) and name.startswith("_")):
        raise AttributeError(name)

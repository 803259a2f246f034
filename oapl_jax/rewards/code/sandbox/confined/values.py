"""Python values as plain JSON, for the pipes between a program and its tests; pickle is never used.

``None``, booleans, strings, floats and small integers stand for themselves. Other values that cannot change, such as
tuples and large integers, are ``{"t": tag, "v": parts}``. Lists, dictionaries, sets and linked nodes are numbered, and
``{"o": number}`` refers to one; so shared and cyclic structures keep their form, and both sides of a call know which
object a change belongs to. Anything else is a handle, which the other side can only use through its owner.
This runs on both sides of the sandbox, so it imports only the standard library.
"""

import builtins
import collections
import json
import struct
import sys
from collections.abc import Callable, Iterable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any, BinaryIO

LARGEST_PLAIN = 1 << 53
"""Integers of at least this size are sent as hexadecimal text."""
MAX_NODES = 100_000
"""Most nodes of a linked list or tree, so that a cycle ends."""


class ListNode:
    """LeetCode's singly linked list."""

    def __init__(self, val=0, next=None):  # noqa: A002 (LeetCode's name)
        self.val, self.next = val, next


class TreeNode:
    """LeetCode's binary tree."""

    def __init__(self, val=0, left=None, right=None):
        self.val, self.left, self.right = val, left, right


def list_node(values: list | None) -> ListNode | None:
    """The linked list of these values."""
    head = None
    for value in reversed(values or []):
        head = ListNode(value, head)
    return head


def list_values(node: Any) -> list:
    """The values of a linked list."""
    values = []
    while node is not None and len(values) < MAX_NODES:
        values.append(node.val)
        node = node.next
    return values


def tree_node(values: list | None) -> TreeNode | None:
    """The tree with these nodes, level by level; ``None`` marks a missing node."""
    if not values or values[0] is None:
        return None
    root = TreeNode(values[0])
    level, rest = [root], iter(values[1:])
    for node in level:
        for side in ("left", "right"):
            value = next(rest, None)
            if value is not None:
                setattr(node, side, TreeNode(value))
                level.append(getattr(node, side))
    return root


def tree_values(root: Any) -> list:
    """The inverse of ``tree_node``, without trailing ``None``."""
    values, level = [], [root]
    for node in level:
        values.append(None if node is None else node.val)
        if node is not None and len(level) < MAX_NODES:
            level += [node.left, node.right]
    while values and values[-1] is None:
        values.pop()
    return values


LEETCODE_NAMES = {item.__name__: item for item in (ListNode, TreeNode, list_node, tree_node)} | {
    "is_same_list": lambda left, right: list_values(left) == list_values(right),
    "is_same_tree": lambda left, right: tree_values(left) == tree_values(right),
}

_FIELDS = {"ListNode": ("val", "next"), "TreeNode": ("val", "left", "right")}
_MAPPINGS = {
    kind.__name__: kind for kind in (collections.Counter, collections.OrderedDict, collections.defaultdict, dict)
}
_KINDS = {kind.__name__: kind for kind in (list, collections.deque, bytearray, set)} | _MAPPINGS
_SHELLS = {**_KINDS, "ListNode": ListNode, "TreeNode": TreeNode}
_PURE = "abs all any bin chr divmod hash hex isinstance len max min oct ord pow repr round sorted sum".split()  # noqa: SIM905
_BUILTINS = {name: item for name, item in vars(builtins).items() if isinstance(item, type) or name in _PURE}
"""What crosses by its name. Another function is called where it is: ``globals`` would give away what tests know."""
_IMMUTABLE: dict[type, tuple[Callable[[Any], Iterable], Callable[[list], Any]]] = {
    tuple: (tuple.__iter__, tuple),
    frozenset: (frozenset.__iter__, frozenset),
    bytes: (lambda value: [bytes.hex(value)], lambda parts: bytes.fromhex(*parts)),
    type({}.keys()): (iter, lambda items: dict.fromkeys(items).keys()),
    type({}.values()): (iter, lambda items: dict(enumerate(items)).values()),
    type({}.items()): (iter, lambda items: dict(items).items()),
    range: (lambda value: [value.start, value.stop, value.step], lambda parts: range(*parts)),
    complex: (lambda value: [value.real, value.imag], lambda parts: complex(*parts)),
    Decimal: (lambda value: [str(value)], lambda parts: Decimal(*parts)),
    Fraction: (lambda value: [value.numerator, value.denominator], lambda parts: Fraction(*parts)),
    timedelta: (lambda value: [value.days, value.seconds, value.microseconds], lambda parts: timedelta(*parts)),
    **{
        kind: (lambda value: [value.isoformat()], lambda parts, kind=kind: kind.fromisoformat(*parts))
        for kind in (datetime, date, time)
    },
}
"""Other kinds: a value to its parts, and back. Only of the first three a subclass counts as its built-in type."""
_FROM_PARTS: dict[str, Callable[[list], Any]] = {
    "int": lambda parts: int(parts[0], 16),
    "builtin": lambda parts: _BUILTINS[parts[0]],
    **{kind.__name__: back for kind, (_, back) in _IMMUTABLE.items()},
}


def _kind_of(value: Any) -> str | None:
    """Name of the kind of an object that is numbered, or None.

    A subclass counts as its built-in type, and is read through the methods of that type: its overrides have no effect.
    """
    kind = type(value)
    if kind.__name__ in _FIELDS and hasattr(value, "val"):
        return kind.__name__
    return next((name for name, base in _KINDS.items() if issubclass(kind, base)), None)


class Graph:
    """The objects of one call: those of its arguments first, then those of its result.

    ``handle_of`` makes the node of a value that cannot be sent as data, ``owner_of`` returns the object of such a node.
    """

    def __init__(self, handle_of: Callable[[Any], dict], owner_of: Callable[[dict], Any]) -> None:
        self._handle_of, self._owner_of = handle_of, owner_of
        self.objects: list[Any] = []
        self._numbers: dict[int, int] = {}

    def encode(self, value: Any) -> Any:
        """The node of a value. The objects in it are numbered; ``contents`` then has what is in them."""
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if issubclass(kind, int):
            number = int.__pos__(value)
            return number if -LARGEST_PLAIN < number < LARGEST_PLAIN else {"t": "int", "v": [hex(number)]}
        if issubclass(kind, float):
            return float.__pos__(value)
        if issubclass(kind, str):
            return str.__getitem__(value, slice(None))
        if _kind_of(value) is not None:
            return {"o": self._number(value)}
        for base in (kind, tuple, frozenset, bytes):
            if issubclass(kind, base) and base in _IMMUTABLE:
                fields = getattr(kind, "_fields", None) if base is tuple else None
                name = {"n": [kind.__name__, list(fields)]} if fields else {}
                return {"t": base.__name__, "v": list(map(self.encode, _IMMUTABLE[base][0](value))), **name}
        if kind in (type, type(len)) and _BUILTINS.get(value.__name__) is value:
            return {"t": "builtin", "v": [value.__name__]}
        numpy = sys.modules.get("numpy")
        for base in (numpy.generic, numpy.ndarray) if numpy else ():
            if issubclass(kind, base):
                return self.encode(base.tolist(value))
        return self._handle_of(value)

    def _number(self, value: Any) -> int:
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return number

    def contents(self, first: int = 0) -> list:
        """Kind and content of the objects from a number on; it may number more of them on the way."""
        found: list = []
        while first + len(found) < len(self.objects):
            found.append(self.content(first + len(found)))
        return found

    def content(self, number: int) -> list:
        """Kind and content of an object."""
        value, encode = self.objects[number], self.encode
        kind = _kind_of(value) or "list"
        if kind in _FIELDS:
            return [kind, [[name, encode(getattr(value, name, None))] for name in _FIELDS[kind]]]
        if kind in _MAPPINGS:
            factory = [encode(value.default_factory)] if kind == "defaultdict" else []
            return [kind, [[encode(key), encode(item)] for key, item in _MAPPINGS[kind].items(value)], *factory]
        return [kind, [encode(item) for item in _KINDS[kind].__iter__(value)]]

    def add(self, contents: list) -> None:
        """Makes objects of these contents; they get the next numbers."""
        first = len(self.objects)
        for kind, *_ in contents:
            self._number(_SHELLS[kind]())
        for number, content in enumerate(contents, first):
            self.fill(number, content)

    def fill(self, number: int, content: list) -> None:
        """Replaces the content of an object, in place."""
        (kind, items, *factory), value = content, self.objects[number]
        if kind in _FIELDS:
            for name, (_, item) in zip(_FIELDS[kind], items, strict=True):
                setattr(value, name, self.decode(item))
        elif kind in _MAPPINGS:
            new = {self.decode(key): self.decode(item) for key, item in items}
            value.clear()
            value.update(new)
            if factory:
                value.default_factory = self.decode(factory[0])
        else:
            new = [self.decode(item) for item in items]
            value.clear()
            (value.update if kind == "set" else value.extend)(new)

    def decode(self, node: Any) -> Any:
        """The value of a node, whose objects have been added."""
        if not isinstance(node, dict):
            return node
        if "o" in node:
            return self.objects[node["o"]]
        if node["t"] not in _FROM_PARTS:
            return self._owner_of(node)
        parts = list(map(self.decode, node["v"]))
        if "n" in node:
            return collections.namedtuple(*node["n"])(*parts)  # pyright: ignore[reportCallIssue, reportArgumentType]
        return _FROM_PARTS[node["t"]](parts)


def write_frame(file: BinaryIO, message: Any) -> None:
    """Writes a frame; it waits until the pipe has room."""
    body = json.dumps(message).encode()
    file.write(struct.pack("<I", len(body)) + body)
    file.flush()


def read_frame(file: BinaryIO) -> Any:
    """The next message; it raises EOFError at the end of the pipe."""
    length = file.read(4)
    if not length:
        raise EOFError
    return json.loads(file.read(*struct.unpack("<I", length)))

"""Python values as plain JSON, for the pipes between a program and its grader; pickle is never used.

``None``, booleans, strings, finite floats, small integers and lists stand for themselves. Every other value is an
object with a tag ``t``. An object that cannot be sent as data is opaque: the other side gets a handle that it can only return.
This runs on both sides of the sandbox, so it imports only the standard library.
"""

import builtins
import json
import os
import struct
import sys
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

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


def is_same_list(left: Any, right: Any) -> bool:
    """Whether two linked lists have the same values."""
    return list_values(left) == list_values(right)


def is_same_tree(left: Any, right: Any) -> bool:
    """Whether two trees have the same shape and values."""
    return tree_values(left) == tree_values(right)


LEETCODE_NAMES = (ListNode, TreeNode, list_node, tree_node, is_same_list, is_same_tree)
_NODES = {
    "ListNode": (list_values, list_node),
    "TreeNode": (tree_values, tree_node),
}


_PLAIN = (int, float, str, list, tuple, dict)


def encode(value: Any, opaque: Callable[[Any], dict] | None = None) -> Any:
    """The JSON form of a value.

    A subclass of a built-in type is read through the methods of the built-in type, so its overrides have no effect.

    Args:
        value: any object.
        opaque: makes the node of an object that cannot be sent as data.
    """
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    exact = kind if kind in _PLAIN else next((base for base in _PLAIN if issubclass(kind, base)), object)

    def inner(item: Any) -> Any:
        return encode(item, opaque)

    if exact is str:
        return str.__getitem__(value, slice(None))
    if exact is int:
        number = int.__add__(value, 0)
        return number if -LARGEST_PLAIN < number < LARGEST_PLAIN else {"t": "int", "v": hex(number)}
    if exact is float:
        number = float.__add__(value, 0.0)
        is_finite = number == number and number not in (float("inf"), float("-inf"))
        return number if is_finite else {"t": "float", "v": repr(number)}
    if exact is list:
        return [inner(item) for item in list.__iter__(value)]
    if exact is tuple:
        return {"t": "tuple", "v": [inner(item) for item in tuple.__iter__(value)]}
    if exact is dict:
        return {"t": "dict", "v": [[inner(key), inner(item)] for key, item in dict.items(value)]}
    if kind in (set, frozenset):
        return {"t": "set", "v": [inner(item) for item in value]}
    if kind is bytes:
        return {"t": "bytes", "v": value.hex()}
    if kind is complex:
        return {"t": "complex", "v": [repr(value.real), repr(value.imag)]}
    if kind is Decimal or kind is Fraction:
        return {"t": kind.__name__, "v": str(value)}
    if isinstance(value, type) and getattr(builtins, value.__name__, None) is value:
        return {"t": "type", "v": value.__name__}
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        return inner(value.item())
    if numpy is not None and isinstance(value, numpy.ndarray):
        return {"t": "array", "v": inner(value.tolist())}
    if kind.__name__ in _NODES and hasattr(value, "val"):
        values_of, _ = _NODES[kind.__name__]
        return {"t": kind.__name__, "v": [inner(item) for item in values_of(value)]}
    return (opaque or _unknown)(value)


def _unknown(value: Any) -> dict:
    return {"t": "opaque", "v": -1, "n": type(value).__name__[:80]}


def decode(node: Any, resolve: Callable[[dict], Any]) -> Any:
    """The value of a node; ``resolve`` returns the object of an opaque one."""

    def inner(item: Any) -> Any:
        return decode(item, resolve)

    if isinstance(node, list):
        return [inner(item) for item in node]
    if not isinstance(node, dict):
        return node
    tag, value = node["t"], node["v"]
    if tag == "dict":
        return {inner(key): inner(item) for key, item in value}
    if tag in _NODES:
        return _NODES[tag][1]([inner(item) for item in value])
    if tag in ("tuple", "set"):
        return {"tuple": tuple, "set": set}[tag](inner(item) for item in value)
    if tag == "array":
        return inner(value)
    if tag == "complex":
        return complex(*map(float, value))
    scalars: dict[str, Callable[[Any], Any]] = {
        "int": lambda text: int(text, 16),
        "float": float,
        "bytes": bytes.fromhex,
        "Decimal": Decimal,
        "Fraction": Fraction,
        "type": _built_in_type,
    }
    return scalars[tag](value) if tag in scalars else resolve(node)


def _built_in_type(name: str) -> type:
    found = getattr(builtins, name, None)
    if not isinstance(found, type):
        raise ValueError(f"{name!r} is not a built-in type")
    return found


# ---- frames: four bytes of length, then JSON ----


def pack(message: Any) -> bytes:
    """A message as a frame."""
    body = json.dumps(message).encode()
    return struct.pack("<I", len(body)) + body


def write_frame(descriptor: int, message: Any) -> None:
    """Writes a frame; it waits until the pipe has room."""
    frame = pack(message)
    while frame:
        frame = frame[os.write(descriptor, frame) :]


def read_frame(descriptor: int) -> Any:
    """The next message; it raises EOFError at the end of the pipe."""
    (length,) = struct.unpack("<I", _read_exactly(descriptor, 4))
    return json.loads(_read_exactly(descriptor, length))


def _read_exactly(descriptor: int, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        piece = os.read(descriptor, length - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)

"""Compares the output or the return value of a program with the expected one, by LiveCodeBench's rules.

This runs in the grader, and the program's side is hostile. It is text or plain JSON (``sandbox/confined/values.py``).
No object of the program is built from it, and it is read only as far as the expected value goes.
"""

import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

MAX_RATIO, MAX_EXTRA = 4, 4096
"""A line with more than 4 times the expected characters plus 4096 is not parsed: its digits could take minutes."""
MAX_DIGITS = 5000
MAX_DIMENSIONS = 32
"""Of an array."""
_NUMBER = (int, float, bool)
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
"""What counts as a number in an output. ``Decimal`` itself also reads ``1_5``, Arabic digits and ``nan``."""


def is_same_output(output: str, expected: str, tolerance: float = 0.0) -> bool:
    """Compares standard output line by line, stripped; lines that differ as text are compared word by word as decimals.

    LiveCodeBench has no tolerance: ``0.30000000000000004`` is not ``0.3``, but ``1.0`` is ``1``.

    Args:
        output: what the program printed.
        expected: what it should have printed.
        tolerance: largest difference of two numbers, absolute or relative to the expected one.
    """
    lines, wanted = _lines(output), _lines(expected)
    if len(lines) != len(wanted):
        return False
    return all(
        line == right or _has_same_numbers(line, right, Decimal(tolerance))
        for line, right in zip(lines, wanted, strict=True)
    )


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().split("\n")]


def _has_same_numbers(line: str, wanted: str, tolerance: Decimal) -> bool:
    if len(line) > MAX_RATIO * len(wanted) + MAX_EXTRA:
        return False
    words, right_words = line.split(), wanted.split()
    if len(words) != len(right_words) or not all(map(_DECIMAL.fullmatch, words + right_words)):
        return False
    try:
        numbers, right = [Decimal(word) for word in words], [Decimal(word) for word in right_words]
        if numbers == right or not tolerance:
            return numbers == right
        return all(abs(a - b) <= tolerance * max(1, abs(b)) for a, b in zip(numbers, right, strict=True))
    except ArithmeticError:  # an exponent that Decimal cannot hold
        return False


def is_same_value(node: Any, objects: list, expected: Any, *, is_top: bool = True) -> bool:
    """Compares a returned value, as the child encoded it, with an expected one from JSON, like Python's ``==``.

    A tuple at the top counts as a list. An object that cannot be sent as data differs from every expected value.

    Args:
        node: the value, which may be any JSON.
        objects: kind and content of the objects that it refers to; they may be any JSON, too.
        expected: the expected value.
        is_top: whether it is the returned value itself, not a part of it.
    """
    if isinstance(node, dict):
        tag, value = (*_content(node, objects), node.get("t"), node.get("v"))[:2]
        return _is_same_tagged(tag, value, objects, expected, is_top)
    if node is None or expected is None:
        return node is expected
    if isinstance(node, str) or isinstance(expected, str):
        return type(node) is type(expected) and node == expected
    return type(node) in _NUMBER and type(expected) in _NUMBER and node == expected


def _content(node: dict, objects: list) -> list:
    """Kind and content of the object that a node refers to; nothing if it refers to none."""
    index = node.get("o")
    if (
        type(index) is int
        and 0 <= index < len(objects)
        and isinstance(objects[index], list)
        and len(objects[index]) == 2
    ):
        return objects[index]
    return []


def _is_same_tagged(tag: Any, value: Any, objects: list, expected: Any, is_top: bool) -> bool:
    if tag == "list" or (tag == "tuple" and is_top):
        return isinstance(value, list) and type(expected) is list and _is_same_list(value, objects, expected)
    if tag == "dict":
        return isinstance(value, list) and type(expected) is dict and _is_same_dict(value, objects, expected)
    if tag == "array":  # NumPy's == gives an array; an array of one element has a truth value
        while isinstance(expected, list) and len(expected) == 1:
            expected = expected[0]
        for _ in range(MAX_DIMENSIONS):
            content = _content(value, objects) if isinstance(value, dict) else []
            if content and content[0] == "list" and isinstance(content[1], list) and len(content[1]) == 1:
                value = content[1][0]
        return type(expected) in _NUMBER and not isinstance(value, dict) and is_same_value(value, [], expected)
    if type(expected) not in _NUMBER or not isinstance(value, (str, list)):
        return False
    return _is_same_number(tag, value, expected)


def _is_same_list(items: list, objects: list, expected: list) -> bool:
    if len(items) != len(expected):
        return False
    return all(is_same_value(item, objects, wanted, is_top=False) for item, wanted in zip(items, expected, strict=True))


def _is_same_number(tag: Any, value: Any, expected: float) -> bool:
    try:
        if tag == "int":
            return int(value, 16) == expected
        if tag == "Decimal":
            return len(value) < MAX_DIGITS and Decimal(value) == expected
        if tag == "Fraction":  # exponents are refused: 1e999999999 would be computed
            return (
                len(value) < MAX_DIGITS
                and re.fullmatch(r"-?\d+(/\d+)?", value) is not None
                and Fraction(value) == expected
            )
        if tag == "complex":
            return complex(float(value[0]), float(value[1])) == expected
    except (ValueError, TypeError, ArithmeticError, IndexError):
        return False
    return False


def _is_same_dict(pairs: list, objects: list, expected: dict) -> bool:
    """Keys of JSON are text, so the keys of the value must be text too. No dictionary is built from hostile keys."""
    if len(pairs) != len(expected):
        return False
    seen = set()
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
            return False
        key, item = pair
        if key in seen or key not in expected or not is_same_value(item, objects, expected[key], is_top=False):
            return False
        seen.add(key)
    return True

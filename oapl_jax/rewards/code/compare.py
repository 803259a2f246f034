"""Compares the output of a program with the expected one, by LiveCodeBench's rules.

This runs in the grader, and the output is hostile: it is read only as far as the expected one goes.
"""

import re
from decimal import Decimal

MAX_RATIO, MAX_EXTRA = 4, 4096
"""A line with more than 4 times the expected characters plus 4096 is not parsed: its digits could take minutes."""
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
"""What counts as a number in an output. ``Decimal`` itself also reads ``1_5``, Arabic digits and ``nan``."""


def is_same_output(output: str, expected: str, tolerance: float = 0.0) -> bool:
    """Compares standard output line by line, stripped; lines that differ as text are compared word by word as decimals.

    LiveCodeBench has no tolerance: ``0.30000000000000004`` is not ``0.3``, but ``1.0`` is ``1``. Here ``tolerance`` is the
    largest difference of two numbers, absolute or relative to the expected one.
    """
    lines, wanted = _lines(output), _lines(expected)
    if len(lines) != len(wanted):
        return False
    pairs = zip(lines, wanted, strict=True)
    return all(line == right or _has_same_numbers(line, right, Decimal(tolerance)) for line, right in pairs)


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

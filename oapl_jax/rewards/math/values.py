r"""Values of trees (``parser.py``), and whether two of them are equal. All work is bounded before it is done.

A value is a fraction as long as it is rational, so that nothing is rounded. Other values are ``mpmath`` numbers. Two of
them are equal if they agree to more bits than both trees can hide: to twice the sum of the sizes of all values in them,
and 192 more. (That this suffices is van der Hoeven's witness conjecture; only a number that was built to refute it could
be misjudged.) So ``e^{-1000}`` and ``e^{-1001}`` differ, and ``5 + 2\sqrt6`` is ``(\sqrt2 + \sqrt3)^2``.

Trees with variables are equal if their values are at points that are drawn from both trees, which an answer cannot aim
at. Points at which both are real count, and all others only if there are none.
"""

import functools
import math
import random
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import mpmath
from mpmath import libmp

from oapl_jax.rewards.math.parser import Node

MAX_BITS = 100_000
"""Size of the largest fraction that is computed."""
MAX_EXPONENT = 10.0**6
"""Largest magnitude of a computed power, as an exponent of 2, and largest argument of a function."""
MAX_PRECISION = 25_000
"""Bits of the most precise computation."""
MAX_WORK = 400_000
"""Most steps times bits of a comparison; at one of several points, a sixth."""
SPARE_BITS = 192
MAX_DEGREE = 100
"""Largest degree of a root that is taken exactly."""
MIN_POINTS = 3
"""Fewest points at which both trees must have values."""
POINTS = ((1, 1, 101), (1, 1000, 101), (-1, 1, 101), (-1, 30, 101), *[(0, 30, 101), (1, 9, 1), (1, 40, 1)] * 3)
"""Sign (0: any), scale and denominator of the coordinates at which trees with variables are compared."""


class TooLargeError(ArithmeticError):
    """Computing the value would take too long."""


class UnknownValueError(ArithmeticError):
    """The tree has no value that this module knows."""


class _Trace:
    """What a computation went through: the sizes of its values in bits, their number, whether all are real."""

    def __init__(self) -> None:
        self.bits, self.steps, self.is_real = 0.0, 0, True

    def add(self, value: Any) -> None:
        self.steps += 1
        if isinstance(value, Fraction):
            size = value.numerator.bit_length() + value.denominator.bit_length()
            if size > MAX_BITS:
                raise TooLargeError
        elif not mpmath.isfinite(value):
            raise UnknownValueError("infinite")
        else:
            self.is_real = self.is_real and not mpmath.im(value)
            size = abs(mpmath.mag(value)) if value else 0
        self.bits += size


@functools.lru_cache(maxsize=1024)
def variables(node: Node) -> frozenset[str]:
    """Names of the variables in a tree; words are variables too."""
    own = {node.text} if node.kind in ("symbol", "word") and node.text not in _CONSTANTS else set()
    return frozenset(own).union(*map(variables, node.args))


@functools.lru_cache(maxsize=1024)
def rational(node: Node) -> Fraction | None:
    r"""The value of a tree if it is rational by its form, so ``\sin 30^\circ`` has none; raises TooLargeError."""
    try:
        value = _evaluate(node, {}, _Trace())
    except UnknownValueError:
        return None
    return value if isinstance(value, Fraction) else None


def approximate(node: Node, bits: int = 256) -> Fraction:
    """The real value of a tree to ``bits`` bits, or exactly if it is rational; UnknownValueError if it is not finite."""
    with mpmath.workprec(bits):
        value = _evaluate(node, {}, _Trace())
        if isinstance(value, Fraction):
            return value
        if mpmath.im(value):
            raise UnknownValueError("not real")
        return Fraction(*libmp.to_rational(mpmath.re(value)._mpf_))


def are_equal(first: Node, second: Node) -> bool:
    """Whether two expressions have the same value, for all values of their variables.

    Raises TooLargeError if a value is too large to compute, and UnknownValueError if a part has none.
    """
    names = sorted(variables(first) | variables(second))
    if not names or first == second:
        return first == second or difference_sign(first, second) == 0
    draw = random.Random(repr((first, second)))
    elsewhere: list[bool] = []
    num_real = num_failed = 0
    for sign, scale, denominator in POINTS:
        point = {}
        for name in names:
            coordinate = Fraction(draw.randint(3 + denominator // 9, scale * denominator), denominator)
            point[name] = coordinate * (sign or draw.choice((-1, 1)))
        trace = _Trace()
        try:
            is_equal = difference_sign(first, second, point, trace) == 0
        except (TooLargeError, UnknownValueError):
            num_failed += 1
            if len(POINTS) - num_failed < MIN_POINTS:
                raise
            continue
        if trace.is_real and not is_equal:
            return False
        num_real += trace.is_real
        elsewhere.append(is_equal)
    return num_real > 0 or all(elsewhere)


def difference_sign(
    first: Node, second: Node, point: Mapping[str, Fraction] | None = None, trace: _Trace | None = None
) -> int:
    """1, 0 or -1 as the first value is larger, equal or smaller; 1 for complex numbers that differ."""
    point, trace = point or {}, trace or _Trace()
    with mpmath.workprec(64):
        values = [_evaluate(node, point, trace) for node in (first, second)]
    if all(isinstance(value, Fraction) for value in values):
        return (values[0] > values[1]) - (values[0] < values[1])
    agreeing = int(2 * trace.bits) + SPARE_BITS
    precision = agreeing + int(trace.bits) + 64
    if precision > MAX_PRECISION or precision * trace.steps * (6 if point else 1) > MAX_WORK:
        raise TooLargeError
    with mpmath.workprec(precision):
        difference = mpmath.fsub(*(_inexact(_evaluate(node, point, _Trace())) for node in (first, second)))
        if abs(difference) < mpmath.mpf(2) ** -agreeing:
            return 0
        return -1 if not mpmath.im(difference) and mpmath.re(difference) < 0 else 1


def _evaluate(node: Node, point: Mapping[str, Fraction], trace: _Trace) -> Any:
    """The value of a tree at a point: a fraction, or an mpmath number in the present precision."""
    if node.kind == "number":
        value = _decimal(node.text)
    elif node.kind in ("symbol", "word"):
        if node.text not in point and node.text not in _CONSTANTS:
            raise UnknownValueError(node.text)
        value = point[node.text] if node.text in point else _CONSTANTS[node.text]()
    else:
        operation = _OPERATIONS.get(node.text if node.kind == "call" else node.kind)
        if operation is None:
            raise UnknownValueError(node.kind)
        parts = [_evaluate(part, point, trace) for part in node.args]
        if not all(isinstance(part, Fraction) for part in parts):
            parts = list(map(_inexact, parts))
        try:
            if node.kind == "call" and node.text.endswith("h"):
                trace.bits += 3 * float(abs(parts[0]))  # the exponentials in a hyperbolic tangent
            value = operation(*parts)
        except (ZeroDivisionError, ValueError, TypeError, OverflowError) as error:
            raise UnknownValueError(node.kind) from error
        value = Fraction(value) if isinstance(value, int) else value
    trace.add(value)
    return value


def _inexact(value: Any) -> Any:
    return mpmath.fdiv(value.numerator, value.denominator) if isinstance(value, Fraction) else value


def _decimal(text: str) -> Fraction:
    """The value of digits, like ``2.5e3``, ``0.1(6)`` and ``0xff`` (Python limits decimal digits)."""
    if text.startswith("0x"):
        return Fraction(int(text, 16))
    digits, _, exponent = text.lower().partition("e")
    if exponent and abs(int(exponent)) > MAX_BITS // 4:
        raise TooLargeError
    digits, _, period = digits.partition("(")
    value = Fraction(digits)
    if period:
        places = len(digits.partition(".")[2])
        value += Fraction(int(period[:-1]), 10**places * (10 ** (len(period) - 1) - 1))
    return value * Fraction(10) ** int(exponent or 0)


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if exponent.denominator > 1:
            root = _root(base, Fraction(exponent.denominator))
            if isinstance(root, Fraction):
                return _power(root, Fraction(exponent.numerator))
        elif base == 0 and exponent <= 0:
            raise ZeroDivisionError
        else:
            size = max(base.numerator.bit_length(), base.denominator.bit_length())
            if abs(base) not in (0, 1) and size * abs(exponent) > MAX_BITS:
                raise TooLargeError
            return base ** int(exponent)
    base, exponent = _inexact(base), _inexact(exponent)
    if base and abs(exponent) * max(1, abs(mpmath.mag(base))) > MAX_EXPONENT:
        raise TooLargeError
    return mpmath.power(base, exponent)


def _root(value: Any, degree: Any) -> Any:
    """The real root where there is one: the cube root of -8 is -2."""
    if isinstance(value, Fraction) and value >= 0 and degree in range(2, MAX_DEGREE):
        root = Fraction(*(_integer_root(part, int(degree)) for part in (value.numerator, value.denominator)))
        if root ** int(degree) == value:
            return root
    if not isinstance(value, mpmath.mpc) and value < 0 and degree % 2 == 1:
        return -_root(-value, degree)
    return mpmath.power(_inexact(value), _inexact(1 / degree))


def _integer_root(value: int, degree: int) -> int:
    guess = 1 << -(-value.bit_length() // degree) if value else 0
    while value and (better := ((degree - 1) * guess + value // guess ** (degree - 1)) // degree) < guess:
        guess = better
    return guess


def _of_naturals(function: Callable[..., int], *, is_large: bool = False) -> Callable[..., int]:
    """A function that only natural numbers have, like the factorial."""

    @functools.lru_cache(maxsize=256)
    def apply(*values: Any) -> int:
        numbers = [int(value) for value in values]
        if any(value != number or value < 0 for value, number in zip(values, numbers, strict=True)):
            raise ValueError
        count = min(numbers[-1], abs(numbers[0] - numbers[-1]) or numbers[0])
        if is_large and count * math.log2(numbers[0] + 2) > MAX_BITS:
            raise TooLargeError
        return function(*numbers)

    return apply


def _bounded(function: Callable[..., Any], most: Any = MAX_EXPONENT) -> Callable[..., Any]:
    def apply(*values: Any) -> Any:
        if any(abs(value) > most for value in values):
            raise TooLargeError
        return function(*map(_inexact, values))

    return apply


def _rounded(exact: Callable[[Any], int], other: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: exact(value) if isinstance(value, Fraction) else other(value)


def _log(value: Any, base: Any = None) -> Any:
    return mpmath.log(_inexact(value)) / (1 if base is None else mpmath.log(_inexact(base)))


_CONSTANTS: dict[str, Callable[[], Any]] = {
    r"\pi": lambda: +mpmath.pi, "e": lambda: +mpmath.e, "i": lambda: mpmath.mpc(0, 1), r"\infty": lambda: mpmath.inf,
}  # fmt: skip
_CIRCULAR = ("sin", "cos", "tan", "cot", "sinh", "cosh", "tanh", "coth")
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": lambda *terms: functools.reduce(lambda a, b: a + b, terms),
    "mul": lambda *factors: functools.reduce(lambda a, b: a * b, factors),
    "neg": lambda value: -value,
    "div": lambda above, below: above / below,
    "pow": _power,
    "root": _root,
    "mixed": lambda whole, fraction: whole + fraction,
    "percent": lambda value: value / 100,
    "degrees": lambda value: mpmath.pi * _inexact(value) / 180,
    "unit": lambda value: value,
    **{name: _bounded(getattr(mpmath, name)) for name in (*_CIRCULAR, "sec", "csc", "exp")},
    **{f"arc{name}": _bounded(getattr(mpmath, f"a{name}"), mpmath.inf) for name in _CIRCULAR},
    "ln": _log, "log": _log, "lg": lambda value: _log(value, Fraction(10)), "abs": abs, "max": max, "min": min,
    "floor": _rounded(math.floor, mpmath.floor), "ceil": _rounded(math.ceil, mpmath.ceil),
    "factorial": _of_naturals(math.factorial, is_large=True), "binomial": _of_naturals(math.comb, is_large=True),
    "gcd": _of_naturals(math.gcd), "lcm": _of_naturals(math.lcm),
}  # fmt: skip

"""Values of trees (``parser.py``), and whether two of them are equal, with work that is bounded before it is done.

Rational numbers are compared as fractions. Other values are compared at a few points with 60 digits, which only ever
shows that they differ; equality is proved: of numbers with roots by a separation bound, of the others by SymPy. SymPy
sees a value only after it has agreed at all points.
"""

import functools
import math
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath

from oapl_jax.rewards.math.parser import Node

MAX_BITS = 100_000
"""Size of the largest numerator or denominator that is computed."""
MAX_EXPONENT = 10.0**6
"""Largest magnitude of a computed power, as an exponent of 2."""
MAX_ROOT_BITS = 20_000
"""Precision of the longest computation that decides whether a number with roots is zero."""
MAX_TERMS = 5000
"""Most terms of an expression that SymPy expands."""
DIGITS = 60
AGREEING_DIGITS = 40
POINTS = 3
"""Number of points at which expressions with variables are compared."""


class TooLargeError(ValueError):
    """Computing the value would take too long."""


class UnknownValueError(ValueError):
    """The tree has no value that this module knows."""


# ---- rational numbers ----


@functools.lru_cache(maxsize=4096)
def exact(node: Node) -> Fraction | None:
    """The rational value of a tree; None if it has none, or none that can be computed.

    Raises:
        TooLargeError: the value, or one that it is made of, has more than ``MAX_BITS`` bits.
    """
    if node.kind == "number":
        return _decimal(node.text)
    if node.kind not in _EXACT:
        return None
    parts = [exact(part) for part in node.args]
    if any(part is None for part in parts):
        return None
    try:
        value = _EXACT[node.kind](node.text, *parts)
    except ZeroDivisionError:
        return None
    return None if value is None else _bounded(value)


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise TooLargeError
    return value


def _decimal(text: str) -> Fraction:
    digits, _, exponent = text.lower().partition("e")
    if exponent and abs(int(exponent)) * math.log2(10) > MAX_BITS:
        raise TooLargeError
    digits, _, period = digits.partition("(")
    value = Fraction(digits)
    if period:
        places = len(digits.partition(".")[2])
        value += Fraction(int(period[:-1]), 10**places * (10 ** (len(period) - 1) - 1))
    return value * Fraction(10) ** int(exponent or 0)


def _product(_: str, *factors: Fraction) -> Fraction:
    return functools.reduce(lambda product, factor: _bounded(product * factor), factors)


def _power(_: str, base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator > 1:
        root = _root("", base, Fraction(exponent.denominator))
        return None if root is None else _power("", root, Fraction(exponent.numerator))
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if base not in (0, 1, -1) and size * abs(exponent) > MAX_BITS:
        raise TooLargeError
    if base in (1, -1):
        return base if exponent % 2 else Fraction(1)
    return None if base == 0 and exponent <= 0 else base ** int(exponent)


def _root(_: str, value: Fraction, degree: Fraction) -> Fraction | None:
    """The real root if it is rational."""
    if degree.denominator > 1 or not 1 < degree <= 1000 or (value < 0 and degree % 2 == 0):
        return None
    parts = [_integer_root(part, int(degree)) for part in (abs(value.numerator), value.denominator)]
    if parts[0] is None or parts[1] is None:
        return None
    return Fraction(parts[0], parts[1]) * (-1 if value < 0 else 1)


def _integer_root(value: int, degree: int) -> int | None:
    from sympy import integer_nthroot

    root, is_exact = integer_nthroot(value, degree)
    return int(root) if is_exact else None


def _called(name: str, *values: Fraction) -> Fraction | None:
    if name in _OF_RATIONALS:
        return Fraction(_OF_RATIONALS[name](*values))
    if any(value.denominator > 1 or value < 0 for value in values) or name not in _OF_NATURALS:
        return None
    numbers = [int(value) for value in values]
    size = max(numbers)
    if name in _LARGE and size * math.log2(size + 2) > MAX_BITS:
        raise TooLargeError
    return Fraction(_OF_NATURALS[name](*numbers))


_OF_RATIONALS: dict[str, Callable[..., Any]] = {
    "max": max, "min": min, "abs": abs, "floor": math.floor, "ceil": math.ceil,
}  # fmt: skip
_OF_NATURALS: dict[str, Callable[..., Any]] = {
    "factorial": math.factorial, "factorial2": lambda n: math.prod(range(n, 0, -2)), "binomial": math.comb,
    "gcd": math.gcd, "lcm": math.lcm,
}  # fmt: skip
_LARGE = ("factorial", "factorial2", "binomial")
_EXACT: dict[str, Callable[..., Fraction | None]] = {
    "add": lambda _, *terms: functools.reduce(lambda total, term: _bounded(total + term), terms),
    "mul": _product,
    "scaled": _product,
    "neg": lambda _, value: -value,
    "div": lambda _, above, below: above / below,
    "pow": _power,
    "root": _root,
    "mixed": lambda _, whole, fraction: whole + fraction,
    "percent": lambda _, value: value / 100,
    "unit": lambda _, value: value,
    "call": _called,
}


# ---- equality ----


def variables(node: Node) -> frozenset[str]:
    """Names of the variables in a tree; words are variables too."""
    if node.kind in ("symbol", "word") and node.text not in _CONSTANTS:
        return frozenset({node.text})
    is_known = node.text in _NUMERIC or node.text in _OF_NATURALS
    own = {node.text + "()"} if node.kind == "call" and not is_known else set()
    return frozenset(own).union(*map(variables, node.args))


def are_equal(first: Node, second: Node) -> bool:
    """Whether two expressions have the same value, for all values of their variables.

    Raises:
        TooLargeError: a value is too large to compute.
        UnknownValueError: an expression has a part without a value.
    """
    if first == second:
        return True
    values = exact(first), exact(second)
    if None not in values:
        return values[0] == values[1]
    names = sorted(variables(first) | variables(second))
    if not _agree(first, second, names):
        return False
    difference = Node("add", (first, Node("neg", (second,))))
    if not names and (is_zero := _is_zero_with_roots(difference)) is not None:
        return is_zero
    return _is_zero(difference)


def _agree(first: Node, second: Node, names: list[str]) -> bool:
    """Whether two expressions agree to ``AGREEING_DIGITS`` at all points at which both have a value."""
    draw, num_points = random.Random(0), 0
    with mpmath.workdps(DIGITS):
        for _ in range(POINTS if names else 1):
            point = {name: mpmath.mpf(draw.randint(-3000, 3000)) / 997 for name in names}
            try:
                a, b = approximate(first, point), approximate(second, point)
            except (ZeroDivisionError, OverflowError, ArithmeticError):
                continue
            if not (mpmath.isfinite(a) and mpmath.isfinite(b)):
                continue
            num_points += 1
            if abs(a - b) > max(abs(a), abs(b)) * mpmath.mpf(10) ** -AGREEING_DIGITS:
                return False
    return num_points > 0


def approximate(node: Node, point: dict[str, Any]) -> Any:
    """The value of a tree at a point, as an mpmath number in the present precision."""
    if node.kind == "number":
        value = _decimal(node.text)
        return mpmath.mpf(value.numerator) / value.denominator
    if node.kind in ("symbol", "word"):
        return point[node.text] if node.text in point else _CONSTANTS[node.text]()
    parts = [approximate(part, point) for part in node.args]
    if node.kind == "call":
        if node.text not in _NUMERIC:
            if node.text in _OF_NATURALS:
                raise UnknownValueError(node.text)
            return _unknown_function(node.text, parts, point)
        if any(_size(part) > math.log2(MAX_EXPONENT) for part in parts):
            raise TooLargeError
        return _NUMERIC[node.text](*parts)
    if node.kind not in _ARITHMETIC:
        raise UnknownValueError(node.kind)
    if node.kind == "root" and variables(node):
        return mpmath.power(parts[0], 1 / parts[1])
    return _ARITHMETIC[node.kind](*parts)


def _size(value: Any) -> float:
    """The binary logarithm of a magnitude, roughly."""
    return float(mpmath.mag(value)) if value else -math.inf


def _unknown_function(name: str, parts: list[Any], point: dict[str, Any]) -> Any:
    """The value of an unknown function: a number that depends on its name and arguments."""
    value = point[name + "()"]
    for part in parts:
        value = mpmath.sin(value * 3 + part * 7) + value / 5
    return value


def _approximate_power(base: Any, exponent: Any) -> Any:
    if base and abs(mpmath.re(exponent)) * max(1.0, abs(_size(base))) > MAX_EXPONENT:
        raise TooLargeError
    return mpmath.power(base, exponent)


def _approximate_root(value: Any, degree: Any) -> Any:
    """The real root where there is one: the cube root of -8 is -2."""
    if not mpmath.im(value) and mpmath.re(value) < 0 and mpmath.isint(degree) and int(mpmath.re(degree)) % 2:
        return -mpmath.power(-value, 1 / degree)
    return mpmath.power(value, 1 / degree)


_CONSTANTS: dict[str, Callable[[], Any]] = {
    r"\pi": lambda: +mpmath.pi, "e": lambda: mpmath.exp(1), "i": lambda: mpmath.mpc(0, 1), r"\infty": lambda: mpmath.inf,
    r"\emptyset": lambda: mpmath.nan,
}  # fmt: skip
_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": lambda *terms: mpmath.fsum(terms),
    "mul": lambda *factors: mpmath.fprod(factors),
    "scaled": lambda *factors: mpmath.fprod(factors),
    "neg": lambda value: -value,
    "div": lambda above, below: above / below,
    "pow": _approximate_power,
    "root": _approximate_root,
    "mixed": lambda whole, fraction: whole + fraction,
    "percent": lambda value: value / 100,
    "degrees": lambda value: value * mpmath.pi / 180,
    "unit": lambda value: value,
}
_NUMERIC: dict[str, Callable[..., Any]] = {
    **{name: getattr(mpmath, name) for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth")},
    **{f"arc{name}": getattr(mpmath, f"a{name}") for name in ("sin", "cos", "tan", "cot", "sinh", "cosh", "tanh", "coth")},
    "exp": mpmath.exp, "ln": mpmath.log, "log": mpmath.log, "lg": mpmath.log10, "abs": abs,
    "floor": mpmath.floor, "ceil": mpmath.ceil, "max": max, "min": min,
    "factorial": mpmath.factorial, "factorial2": mpmath.fac2, "binomial": mpmath.binomial,
}  # fmt: skip


def _is_zero_with_roots(node: Node) -> bool | None:
    """Whether a number is zero that is made of rational numbers, roots and i; None if it is made of more, or too large.

    Sines and the like of rational multiples of pi count as roots. Such a number is U / L with algebraic integers U and L, whose degrees are at most the product D of the degrees of
    all roots in it. Each conjugate of U is at most u, and of L at most l, so that U is zero or at least 1 / u^(D - 1)
    (Burnikel, Fleischer, Mehlhorn, Schirra, "A strong and easily computable separation bound for arithmetic expressions
    involving radicals", Algorithmica 2000). Computed with a smaller error, the number shows which.
    """
    roots: dict[Node, int] = {}
    bounds = _log_bounds(node, roots)
    if bounds is None:
        return None
    upper, lower = bounds
    bits = (math.prod(roots.values()) - 1) * upper + lower
    if bits > MAX_ROOT_BITS:
        return None
    with mpmath.workprec(int(bits + 4 * (upper + lower)) + 100):
        return bool(_size(approximate(node, {})) < -bits - 2)


def _log_bounds(node: Node, roots: dict[Node, int]) -> tuple[float, float] | None:
    """Binary logarithms of u and l of a number; enters its roots with their degrees."""
    value = exact(node)
    if value is not None:
        return math.log2(abs(value.numerator) or 1) + 1e-9, math.log2(value.denominator) + 1e-9
    if node.kind == "symbol" and node.text == "i":
        roots[node] = 2
        return 0.0, 0.0
    if node.kind == "call" and node.text in _OF_ANGLES and (turns := _turns(node.args[0])) is not None:
        # Twice a sine or cosine of p/q turns is an algebraic integer in the field of the 4q-th roots of unity.
        roots[_UNITY] = math.lcm(roots.get(_UNITY, 1), 4 * turns.denominator)
        return 1.0, 1.0
    if node.kind not in ("add", "mul", "neg", "div", "pow", "root"):
        return None
    if node.kind in ("root", "pow"):
        degree = exact(node.args[1])
        inner = _log_bounds(node.args[0], roots)
        if degree is None or inner is None or degree == 0:
            return None
        degree = 1 / degree if node.kind == "root" else degree
        upper, lower = (part * abs(degree.numerator) for part in (inner if degree > 0 else inner[::-1]))
        if degree.denominator > 1:
            roots[node] = degree.denominator
            share = (degree.denominator - 1) / degree.denominator
            if upper >= lower:
                return upper / degree.denominator + lower * share, lower
            return upper, upper * share + lower / degree.denominator
        return upper, lower
    parts = [_log_bounds(part, roots) for part in node.args]
    if any(part is None for part in parts):
        return None
    known = [part for part in parts if part is not None]
    if node.kind == "div":
        known[1] = (known[1][1], known[1][0])
    upper, lower = sum(part[0] for part in known), sum(part[1] for part in known)
    if node.kind == "add":
        upper = max(part[0] + lower - part[1] for part in known) + math.log2(len(known))
    return upper, lower


_OF_ANGLES = ("sin", "cos", "tan", "cot", "sec", "csc")
_UNITY = Node("symbol", (), "roots of unity")


def _turns(angle: Node) -> Fraction | None:
    """An angle as a fraction of a full turn; None if it is no rational multiple of pi."""
    if angle.kind == "degrees":
        degrees = exact(angle.args[0])
        return None if degrees is None else degrees / 360
    zero, one, two = (exact(_with_pi(angle, digit)) for digit in "012")
    return one / 2 if one is not None and zero == 0 and two == 2 * one else None


def _with_pi(node: Node, digit: str) -> Node:
    """A tree with a digit in the place of pi, which shows whether it is a multiple of pi."""
    if node == Node("symbol", (), r"\pi"):
        return Node("number", (), digit)
    return node._replace(args=tuple(_with_pi(part, digit) for part in node.args))


def _is_zero(node: Node) -> bool:
    """Whether SymPy proves that an expression is zero."""
    import sympy

    value = symbolic(node)
    if value.has(sympy.factorial, sympy.factorial2, sympy.binomial):
        value = sympy.gammasimp(value)
    forms = (
        lambda: value,
        lambda: sympy.expand_log(value, factor=True),
        lambda: sympy.expand(value, complex=True) if not value.free_symbols else value,
        lambda: sympy.numer(sympy.together(value.rewrite(sympy.exp))),
    )
    return any(_expanded(form()) == 0 for form in forms)


def _expanded(value: Any) -> Any:
    import sympy

    if _num_terms(value) > MAX_TERMS:
        raise TooLargeError
    return sympy.expand(value)


def _num_terms(value: Any) -> float:
    """An upper bound of the number of terms of an expanded expression."""
    parts = [_num_terms(part) for part in value.args]
    if value.is_Add:
        return sum(parts)
    if value.is_Mul:
        return math.prod(parts)
    if value.is_Pow and value.exp.is_Integer:
        base, power = int(min(parts[0], 1000)), int(min(abs(value.exp), 1000))
        return float(min(math.comb(base + power - 1, power), 10**9))
    return max(parts, default=1.0)


def symbolic(node: Node) -> Any:
    """A tree as a SymPy expression."""
    import sympy

    value = exact(node)
    if value is not None:
        return sympy.Rational(value.numerator, value.denominator)
    if node.kind in ("symbol", "word"):
        return _sympy_constants().get(node.text) or sympy.Symbol(node.text)
    parts = [symbolic(part) for part in node.args]
    if node.kind == "call":
        if node.text not in _NUMERIC:
            return sympy.Function(node.text)(*parts)
        name = _SYMPY_NAMES.get(node.text, node.text)
        return getattr(sympy, name)(*parts, *([10] if node.text == "lg" else []))
    operations: dict[str, Callable[..., Any]] = {
        "add": sympy.Add,
        "mul": sympy.Mul,
        "scaled": sympy.Mul,
        "neg": lambda part: -part,
        "div": lambda above, below: above / below,
        "pow": sympy.Pow,
        "root": lambda part, degree: (
            -((-part) ** (1 / degree)) if part.is_negative and degree.is_odd else part ** (1 / degree)
        ),
        "mixed": sympy.Add,
        "percent": lambda part: part / 100,
        "degrees": lambda part: part * sympy.pi / 180,
        "unit": lambda part: part,
    }
    return operations[node.kind](*parts)


_SYMPY_NAMES = {
    **{f"arc{name}": f"a{name}" for name in ("sin", "cos", "tan", "cot", "sinh", "cosh", "tanh", "coth")},
    "ln": "log", "lg": "log", "ceil": "ceiling", "abs": "Abs", "max": "Max", "min": "Min",
}  # fmt: skip


@functools.cache
def _sympy_constants() -> dict[str, Any]:
    import sympy

    return {r"\pi": sympy.pi, "e": sympy.E, "i": sympy.I, r"\infty": sympy.oo}

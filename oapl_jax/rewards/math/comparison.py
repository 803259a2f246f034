r"""Whether an answer says the same as a gold answer: labels, lists, sets, intervals, matrices, down to single values.

What an answer leaves out has to be without meaning for the value: a label (``x = 4``), a unit, a percent sign. Nothing
else is dropped: a set is no tuple, a chain of equations has to be true, words keep their order.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import mpmath

from oapl_jax.rewards.math.parser import Node
from oapl_jax.rewards.math.values import UnknownValueError, approximate, are_equal, exact, symbolic, variables

MIN_ROUNDED_DIGITS = 6
"""Significant digits from which a decimal number may stand for a number with more."""

_INFINITY = Node("symbol", (), r"\infty")
_NEGATIONS = {"not", "no", "never", "cannot", "isn", "isnt", "doesn"}
_LETTERS = ("symbol", "word", "call", "mul", "div", "list", "ratio", "unit")
_BOUNDS = ("<", "<=", ">", ">=")


class PendingError(ValueError):
    """The answer has the value of the gold answer, but has not computed it."""


class _Piece(NamedTuple):
    """An interval, or a point, as a part of a set of numbers."""

    low: Node
    has_low: bool
    high: Node
    has_high: bool


def says(gold: Node, answer: Node, *, is_evaluated: bool) -> bool:
    """Whether an answer says the same as the gold answer.

    Args:
        gold: the tree of the gold answer.
        answer: that of the answer.
        is_evaluated: refuse pending arithmetic where the gold answer has none.

    Raises:
        PendingError: it does, but it has pending arithmetic.
        TooLargeError: a value is too large to compute.
        UnknownValueError: a part has no value.
    """

    def is_same(first: Node, second: Node) -> bool:
        if not _is_same_value(first, second):
            return False
        if is_evaluated and not variables(first) and is_pending(second) and not is_pending(first):
            raise PendingError
        return True

    return _matches(gold, answer, is_same)


def is_pending(node: Node) -> bool:
    r"""Whether a tree has a sum, difference, product or function of rational numbers that has a rational value.

    Not pending: fractions, mixed numbers, powers, ``3 \cdot 10^5``, roots and logarithms.
    """
    if node.kind in ("add", "mul") and sum(exact(part) is not None for part in node.args) > 1:
        return not _is_scientific(node)
    if node.kind == "div" and node.text and exact(node) is not None:  # with the sign of division
        return True
    if node.kind == "call" and node.text not in ("log", "ln", "lg", "exp") and not variables(node):
        return exact(node) is not None or bool(symbolic(node).is_Rational)
    return any(is_pending(part) for part in node.args)


def is_number(node: Node) -> bool:
    """Whether a tree is a number that is written out: digits, a fraction in lowest terms, a mixed or scientific one."""
    if node.kind in ("neg", "unit", "percent", "degrees"):
        return is_number(node.args[0])
    if node.kind == "div" and all(part.kind == "number" for part in node.args):
        above, below = (exact(part) for part in node.args)
        fraction = exact(node)
        return fraction is not None and (fraction.numerator, fraction.denominator) == (above, below)
    return node.kind in ("number", "mixed", "based", "word", "symbol") or _is_scientific(node)


def _is_scientific(node: Node) -> bool:
    if node.kind != "mul" or len([part for part in node.args if exact(part) is not None]) != 2:
        return False
    kinds = [part for part in node.args if exact(part) is not None]
    power, number = sorted(kinds, key=lambda part: part.kind != "pow")
    number = number.args[0] if number.kind == "neg" else number
    return number.kind == "number" and power.kind == "pow" and power.args[0] == Node("number", (), "10")


# ---- structure ----

_Same = Callable[[Node, Node], bool]


def _matches(gold: Node, answer: Node, is_same: _Same) -> bool:
    if gold == answer:
        return True
    sets = _pieces(gold), _pieces(answer)
    if sets[0] is not None and sets[1] is not None and any(map(_is_set, (gold, answer))):
        return _match_in_any_order(sets[0], sets[1], lambda a, b: _is_same_piece(a, b, is_same))
    gold, answer = _as_list(gold, answer), _as_list(answer, gold)
    if gold.kind == "list" and answer.kind == "list":
        return _match_lists(gold, answer, is_same)
    if gold.kind == answer.kind == "relation" and (equal := _match_relations(gold, answer, is_same)) is not None:
        return equal
    (gold_label, gold_value), (label, value) = _statement(gold, is_gold=True), _statement(answer, is_gold=False)
    if value is None or gold_value is None:
        return False
    if (
        gold_label is not None
        and label is not None
        and gold_label.kind == label.kind == "symbol"
        and gold_label != label
    ):
        return False
    if gold_value is not gold or value is not answer:
        return _matches(gold_value, value, is_same)
    if gold.kind == "list" and gold.text == "{}" and len(gold.args) == 1:
        return _matches(gold.args[0], answer, is_same)
    if answer.kind == "list" and answer.text == "{}" and len(answer.args) == 1:
        return _matches(gold, answer.args[0], is_same)
    if gold.kind == answer.kind == "ratio" and any(part.text[:1] == "0" for part in (*gold.args, *answer.args)):
        return False  # 10:05 is a time, and 10:5 is none
    if gold.kind == answer.kind and gold.kind in ("ratio", "matrix", "list"):
        return _match_in_order(gold.args, answer.args, is_same)
    if gold.kind in ("list", "ratio", "matrix", "relation") or answer.kind in ("list", "ratio", "matrix", "relation"):
        return False
    return is_same(gold, answer)


def _match_in_order(golds: Sequence[Node], answers: Sequence[Node], is_same: _Same) -> bool:
    return len(golds) == len(answers) and all(
        _matches(gold, answer, is_same) for gold, answer in zip(golds, answers, strict=True)
    )


def _match_in_any_order(golds: Sequence, answers: Sequence, is_match: Callable[..., bool]) -> bool:
    left = list(answers)
    if len(golds) != len(left):
        return False
    for gold in golds:
        found = next((index for index, answer in enumerate(left) if is_match(gold, answer)), None)
        if found is None:
            return False
        del left[found]
    return True


def _match_lists(gold: Node, answer: Node, is_same: _Same) -> bool:
    """Brackets have to agree, but a list without brackets may be a set, and with labels a tuple."""
    golds, answers = _items(gold), _items(answer)
    brackets = [node.text if node.text not in (",", "or") else "" for node in (gold, answer)]
    are_labelled = [_has_own_labels(items) for items in (golds, answers)]
    if brackets[0] != brackets[1] and set(brackets) != {"", "{}"}:
        is_tuple = set(brackets) == {"", "()"} and _has_own_labels(
            (golds, answers)[brackets.index("")], with_indices=True
        )
        return is_tuple and _match_in_order(golds, answers, is_same)
    is_ordered = brackets[0] not in ("", "{}") or (brackets == ["", ""] and all(map(_is_word, golds)))
    if is_ordered or are_labelled[0] != are_labelled[1]:
        return _match_in_order(golds, answers, is_same)
    return _match_in_any_order(golds, answers, lambda a, b: _matches(a, b, is_same))


def _as_list(node: Node, other: Node) -> Node:
    """A number with plus or minus is a list of two; ``(p, q) = (3, 2)`` is ``p = 3, q = 2`` beside such a list."""
    if node.kind != "list" and _has_sign_choice(node):
        return Node("list", tuple(_with_sign(node, sign) for sign in "+-"), ",")
    if node.kind == "relation" and node.text == "=" and other.kind == "list" and _has_own_labels(other.args):
        names, values = node.args
        if names.kind == values.kind == "list" and len(names.args) == len(values.args):
            pairs = zip(names.args, values.args, strict=True)
            return Node("list", tuple(Node("relation", pair, "=") for pair in pairs), ",")
    return node


def _items(node: Node) -> list[Node]:
    items: list[Node] = []
    for part in node.args:
        if part.kind == "list" and part in items:
            continue  # a solution given twice
        items += [_with_sign(part, sign) for sign in "+-"] if _has_sign_choice(part) else [part]
    return items


def _has_sign_choice(node: Node) -> bool:
    return node.kind == "pm" or any(map(_has_sign_choice, node.args))


def _with_sign(node: Node, sign: str) -> Node:
    parts = tuple(_with_sign(part, sign) for part in node.args)
    if node.kind == "pm":
        return parts[0] if node.text == sign else Node("neg", parts)
    return node._replace(args=parts)


def _is_word(node: Node) -> bool:
    return node.kind == "word" or (node.kind == "symbol" and len(node.text) == 1)


def _has_own_labels(items: Sequence[Node], *, with_indices: bool = False) -> bool:
    """Whether every item is an equation with a label of its own, unlike ``x = 1, x = 2`` and ``x_1 = 1, x_2 = 2``."""
    labels = [part.args[0] for part in items if part.kind == "relation" and part.text == "="]
    names = {label if with_indices else label._replace(text=label.text.partition("_")[0]) for label in labels}
    return len(names) == len(items) > 1


# ---- equations ----


def _statement(node: Node, *, is_gold: bool) -> tuple[Node | None, Node | None]:
    r"""The label and the value of ``x = 4`` or ``x \in S``; no value if the statement is false or denies something."""
    relations = node.text.split()
    if node.kind != "relation":
        return None, node
    if relations == ["in"]:
        return node.args[0], node.args[1]
    if not set(relations) <= {"=", "~"}:
        return None, node
    sides = list(node.args)
    if "~" in relations:  # x = 1/3 ~ 0.33
        cut = relations.index("~")
        sides = sides[: cut + 1] if cut or not variables(sides[0]) else sides[:2]
    numbers = [side for side in sides if not variables(side)]
    if not is_gold and any(not _matches(a, b, _is_same_value) for a, b in itertools.pairwise(numbers)):
        return None, None
    if len(sides) == 2 and not variables(sides[0]) and sides[1].kind == "symbol" and variables(sides[1]):
        sides.reverse()  # 4 = x
    label, value = sides[0], sides[-1]
    if not variables(label):
        return (None, node) if variables(value) else (None, value)
    if set(label.text.casefold().split()) & _NEGATIONS:
        return None, None
    is_value = not variables(value) and exact(value) != 0 and not is_gold
    return (label, value) if is_value or _is_label(label) else (None, node)


def _is_label(node: Node) -> bool:
    r"""Whether a tree names a quantity: a symbol, words, ``f(2)``, ``\frac{NO}{BO}``, ``(p, q)``."""
    if node.kind == "symbol":
        return bool(variables(node))
    if node.kind in ("mul", "div"):  # segments, unlike the x y of an equation
        return all(
            (part.kind == "symbol" and not part.text[0].islower()) or part.kind == "mul" for part in node.args
        ) and all(map(_is_label, node.args))
    return node.kind in ("word", "call") or (node.kind in ("list", "ratio") and all(map(_is_label, node.args)))


def _match_relations(gold: Node, answer: Node, is_same: _Same) -> bool | None:
    """Whether two relations are the same or multiples of each other; None if both are labelled values."""
    gold, answer = _ascending(gold), _ascending(answer)
    if gold.text == answer.text and len(gold.args) == len(answer.args) and len(gold.args) != 2:
        return all(_is_same_value(a, b) for a, b in zip(gold.args, answer.args, strict=True))
    if "=" in gold.text and all(_statement(node, is_gold=True)[0] is not None for node in (gold, answer)):
        return None
    if gold.text != answer.text or len(gold.args) != 2 or len(answer.args) != 2:
        return False if set(gold.text.split()) - {"=", "~"} else None
    if gold.text in ("in", "=="):
        return _match_in_order(gold.args, answer.args, is_same)
    differences = [Node("add", (node.args[0], Node("neg", (node.args[1],)))) for node in (gold, answer)]
    draw = random.Random(1)
    names = sorted(variables(differences[0]) | variables(differences[1]))
    point = {name: Node("number", (), str(draw.randint(2, 97))) for name in names}
    scales = [_substituted(difference, point) for difference in differences]
    crossed = [Node("mul", pair) for pair in zip(differences, reversed(scales), strict=True)]
    values = [approximate(scale, dict.fromkeys(variables(scale), mpmath.mpf(1) / 3)) for scale in scales]
    if not all(values) or (gold.text in _BOUNDS and mpmath.re(values[0] / values[1]) < 0):
        return False
    return are_equal(crossed[0], crossed[1])


def _ascending(node: Node) -> Node:
    if set(node.text.split()) & {">", ">="}:
        flipped = [relation.replace(">", "<") if ">" in relation else relation for relation in node.text.split()]
        return Node("relation", node.args[::-1], " ".join(reversed(flipped)))
    return node


def _substituted(node: Node, point: dict[str, Node]) -> Node:
    if node.kind in ("symbol", "word") and node.text in point:
        return point[node.text]
    return node._replace(args=tuple(_substituted(part, point) for part in node.args))


# ---- sets of numbers ----


def _is_set(node: Node) -> bool:
    """Whether a tree is a set of numbers by its form alone, unlike a pair, which may be an interval or a point."""
    if node.kind == "list":
        return node.text in (",", "or") and any(map(_is_set, node.args))
    is_inequality = node.kind == "relation" and bool(set(node.text.split()) & {*_BOUNDS, "!="})
    is_member = node.kind == "relation" and node.text == "in" and _is_set(node.args[1])
    return is_inequality or is_member or node.kind == "region" or node.text == r"\mathbbR"


def _pieces(node: Node) -> list[_Piece] | None:
    """The intervals and points that make up a set of numbers; None if the tree is no such set."""
    if node.kind == "symbol" and node.text == r"\mathbbR":
        return [_Piece(_minus(_INFINITY), False, _INFINITY, False)]
    if node.kind == "symbol" and node.text == r"\emptyset":
        return []
    if node.kind == "relation":
        return _pieces_of_relation(node)
    if node.kind == "region":
        parts = [_pieces(part) for part in node.args]
        if parts[0] is None or parts[1] is None:
            return None
        if node.text == r"\cup":
            return parts[0] + parts[1]
        if node.text == r"\setminus":
            parts[1] = _complement(parts[1])
        return _common(parts[0], parts[1])
    if node.kind != "list":
        return None
    if node.text == "{}":
        return [_Piece(part, True, part, True) for part in _items(node)]
    if node.text in (",", "or"):
        parts = [_pieces(part) for part in node.args]
        if any(part is None for part in parts):
            return None
        known = [part for part in parts if part is not None]
        common = known[0]
        for part in known[1:]:
            common = _common(common, part)
        return common if common and node.text == "," else list(itertools.chain(*known))
    if len(node.args) == 2:
        return [_Piece(node.args[0], node.text[0] == "[", node.args[1], node.text[1] == "]")]
    return None


def _pieces_of_relation(node: Node) -> list[_Piece] | None:
    r"""``x < 3``, ``3 < x \le 5``, ``x \ne 3``, ``|x| < 2``, ``x \in S``, ``x = 3``."""
    if node.text == "in":
        return _pieces(node.args[1])
    node = _ascending(node)
    relations, sides = node.text.split(), list(node.args)
    unknown = [index for index, side in enumerate(sides) if variables(side)]
    if len(unknown) != 1 or len(sides) > 3 or (len(sides) == 3 and unknown != [1]):
        return None
    (index,) = unknown
    variable = sides[index]
    if relations in (["="], ["!="]):
        point = sides[1 - index]
        inside = [_Piece(point, True, point, True)]
        inside = inside if relations == ["="] else _complement(inside)
    elif set(relations) <= {"<", "<="}:
        low, has_low = (sides[index - 1], relations[index - 1] == "<=") if index else (_minus(_INFINITY), False)
        high, has_high = (sides[index + 1], relations[index] == "<=") if index + 1 < len(sides) else (_INFINITY, False)
        inside = [_Piece(low, has_low, high, has_high)]
    else:
        return None
    if variable.kind == "call" and variable.text == "abs":
        variable = variable.args[0]
        mirrored = [_Piece(_minus(piece.high), piece.has_high, _minus(piece.low), piece.has_low) for piece in inside]
        is_above = index > 0 and relations[0] in ("<", "<=")
        inside = mirrored + inside if is_above or relations[0] in ("=", "!=") else _common(mirrored, inside)
    return inside if variable.kind == "symbol" else None


def _minus(node: Node) -> Node:
    return node.args[0] if node.kind == "neg" else Node("neg", (node,))


def _position(node: Node) -> Any:
    try:
        return mpmath.mpf(mpmath.re(approximate(node, {})))
    except KeyError as error:
        raise UnknownValueError("an end of an interval with a variable") from error


def _common(first: list[_Piece], second: list[_Piece]) -> list[_Piece]:
    """The intersection of two sets."""
    found = []
    for a, b in itertools.product(first, second):
        low = max(((_position(piece.low), not piece.has_low), piece) for piece in (a, b))[1]
        high = min(((_position(piece.high), piece.has_high), piece) for piece in (a, b))[1]
        length = _position(high.high) - _position(low.low)
        if length > 0 or (length == 0 and low.has_low and high.has_high):
            found.append(_Piece(low.low, low.has_low, high.high, high.has_high))
    return found


def _complement(pieces: list[_Piece]) -> list[_Piece]:
    rest = [_Piece(_minus(_INFINITY), False, _INFINITY, False)]
    for piece in pieces:
        below = _Piece(_minus(_INFINITY), False, piece.low, not piece.has_low)
        above = _Piece(piece.high, not piece.has_high, _INFINITY, False)
        rest = _common(rest, [below, above])
    return rest


def _is_same_piece(gold: _Piece, answer: _Piece, is_same: _Same) -> bool:
    if (gold.has_low, gold.has_high) != (answer.has_low, answer.has_high):
        return False
    return _matches(gold.low, answer.low, is_same) and _matches(gold.high, answer.high, is_same)


# ---- single values ----


def _is_same_value(gold: Node, answer: Node) -> bool:
    """Whether two single values are equal, apart from a unit or a percent sign that only one of them has."""
    if gold.kind == "unit" or answer.kind == "unit":
        if gold.kind == answer.kind and _have_other_units(gold.text, answer.text):
            return False
        return _is_same_value(*(node.args[0] if node.kind == "unit" else node for node in (gold, answer)))
    if "based" in (gold.kind, answer.kind):
        numbers = [
            Node("number", (), n.text[:-3]) if n.kind == "based" and n.text.endswith("_10") else n
            for n in (gold, answer)
        ]
        return numbers[0] == numbers[1] or (
            "based" not in [n.kind for n in numbers] and are_equal(numbers[0], numbers[1])
        )
    if "word" in (gold.kind, answer.kind):
        return gold.text.casefold() == answer.text.casefold() and answer.kind in ("word", "symbol")
    if "degrees" in (gold.kind, answer.kind) and gold.kind != answer.kind:
        return any(_is_same_value(a, b) for a, b in _with_and_without(gold, answer, "degrees"))
    if "percent" in (gold.kind, answer.kind) and gold.kind != answer.kind:
        return any(are_equal(a, b) for a, b in _with_and_without(gold, answer, "percent"))
    if any(_is_infinite(node) for node in (gold, answer)):
        return False  # equal ones have the same tree
    return _is_rounded(gold, answer) or _is_rounded(answer, gold) or are_equal(gold, answer)


def _with_and_without(gold: Node, answer: Node, kind: str) -> list[tuple[Node, Node]]:
    bare = [node.args[0] if node.kind == kind else node for node in (gold, answer)]
    wrapped = [Node("mul", (node, Node("number", (), "1"))) if node.kind == kind else node for node in (gold, answer)]
    return [(bare[0], bare[1]), (wrapped[0], wrapped[1])]


def _is_infinite(node: Node) -> bool:
    return node == _INFINITY or (node.kind == "neg" and node.args[0] == _INFINITY)


def _have_other_units(first: str, second: str) -> bool:
    from oapl_jax.rewards.math.parser import UNITS

    known = set(UNITS.values()) | {"/", "^", "2", "3", "{", "}"}
    return first != second and all(word in known for word in f"{first} {second}".split())


def _is_rounded(number: Node, other: Node) -> bool:
    """Whether a decimal number is another number, that has more decimals than can be written, rounded or cut off."""
    digits = number.args[0] if number.kind == "neg" else number
    if digits.kind != "number" or "." not in digits.text or "(" in digits.text or "e" in digits.text.lower():
        return False
    places = len(digits.text.partition(".")[2])
    if len(digits.text.replace(".", "").lstrip("0")) < MIN_ROUNDED_DIGITS or variables(other):
        return False
    written, value = exact(number), exact(other)
    if written is None or (value is not None and _terminates(value)):
        return False
    if value is None:
        try:
            approximation = approximate(other, {})
        except (ArithmeticError, TypeError):
            return False
        if not mpmath.isfinite(approximation) or mpmath.im(approximation):
            return False
        with mpmath.workdps(MIN_ROUNDED_DIGITS + len(digits.text)):
            value = Fraction(str(mpmath.nstr(approximate(other, {}), len(digits.text) + 3, strip_zeros=False)))
    return abs(value - written) < Fraction(1, 10**places) and (
        round(value, places) == written or int(value * 10**places) == written * 10**places
    )


def _terminates(value: Fraction) -> bool:
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1

r"""Whether an answer says the same as a gold answer: labels, lists, sets, matrices, relations, down to single values.

What an answer leaves out has to be without meaning for the value: a label (``x = 4``), a unit, a percent sign. Nothing
else is dropped: a set is no tuple, a chain of equations has to be true, words keep their order. Sets of numbers are equal
if they have the same members among all ends of their intervals and the numbers between.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from fractions import Fraction

from oapl_jax.rewards.math.parser import UNITS, Node
from oapl_jax.rewards.math.values import UnknownValueError, approximate, are_equal, difference_sign, rational, variables

MIN_ROUNDED_DIGITS = 6
"""Significant digits from which a decimal number may stand for a number with more."""
MAX_ENDS = 16
"""Most ends of intervals in two sets that are compared."""

_BOUNDS = {"<", "<=", ">", ">="}
_NEGATIONS = {"not", "no", "never", "cannot", "isn", "isnt", "doesn"}
_STRUCTURES = ("list", "ratio", "matrix", "relation")


class PendingError(ValueError):
    """The answer has the value of the gold answer, but has not computed it."""


def says(gold: Node, answer: Node, *, is_evaluated: bool) -> bool:
    """Whether an answer says the same as the gold answer.

    Raises:
        PendingError: with ``is_evaluated``: it does, but it has pending arithmetic, and the gold answer has none.
        TooLargeError, UnknownValueError: a value is too large to compute, or not known.
    """
    if not is_evaluated:
        return _matches(gold, answer, _is_same_value)

    def is_same(first: Node, second: Node) -> bool:
        is_equal = _is_same_value(first, second)
        if is_equal and not variables(first) and is_pending(second) and not is_pending(first):
            raise PendingError
        return is_equal

    return _matches(gold, answer, is_same)


# ---- form ----


def is_pending(node: Node) -> bool:
    r"""Whether a tree has a sum, difference, product or function of rational numbers that has a rational value.

    Not pending: fractions, mixed numbers, powers, ``3 \cdot 10^5``, roots and logarithms.
    """
    if node.kind in ("add", "mul") and sum(map(_is_rational, node.args)) > 1:
        return not _is_scientific(node)
    if node.kind == "div" and node.text:  # with the sign of division
        return _is_rational(node)
    if node.kind == "call" and node.text not in ("log", "ln", "lg", "exp") and _is_rational(node):
        return True
    return any(map(is_pending, node.args))


def _is_rational(node: Node) -> bool:
    r"""Whether a tree without roots has a rational value in any form, like ``\sin 30^\circ``."""
    if rational(node) is not None:
        return True
    if variables(node) or node.kind == "symbol" or _has_root(node):
        return False
    with contextlib.suppress(UnknownValueError):
        return are_equal(node, _number(approximate(node).limit_denominator(1000)))
    return False


def _has_root(node: Node) -> bool:
    return node.kind == "root" or any(map(_has_root, node.args))


def is_number(node: Node) -> bool:
    """Whether a tree is a number that is written out: digits, a fraction in lowest terms, a mixed or scientific one."""
    if node.kind in ("neg", "unit", "percent", "degrees"):
        return is_number(node.args[0])
    if node.kind == "div" and (value := rational(node)) is not None:
        return node == _number(value)
    return node.kind in ("number", "mixed", "based", "word", "symbol", *_STRUCTURES) or _is_scientific(node)


def _is_scientific(node: Node) -> bool:
    numbers = [part for part in node.args if rational(part) is not None] if node.kind == "mul" else []
    kinds = {(part.args[0] if part.kind == "neg" else part).kind for part in numbers}
    is_ten = any(part.kind == "pow" and part.args[0] == _number(10) for part in numbers)
    return is_ten and len(numbers) == 2 and kinds == {"number", "pow"}


def _number(value: Fraction | int) -> Node:
    texts = [(hex if size.bit_length() > 9999 else str)(size) for size in (abs(value.numerator), value.denominator)]
    parts = [Node("number", (), text) for text in texts]
    node = parts[0] if value.denominator == 1 else Node("div", tuple(parts))
    return Node("neg", (node,)) if value < 0 else node


# ---- structure ----

_Same = Callable[[Node, Node], bool]


def _matches(gold: Node, answer: Node, is_same: _Same) -> bool:
    gold, answer = _only_element(gold), _only_element(answer)
    if gold == answer:
        return True
    if (_is_set(gold) or _is_set(answer)) and (equal := _are_same_sets(gold, answer, is_same)) is not None:
        return equal
    gold, answer = _as_list(gold, answer), _as_list(answer, gold)
    if gold.kind == answer.kind == "list":
        return _match_lists(gold, answer, is_same)
    if gold.kind == answer.kind == "relation" and (equal := _match_relations(gold, answer, is_same)) is not None:
        return equal
    (gold_label, gold_value), (label, value) = _statement(gold), _statement(answer, is_same)
    if value is None or gold_value is None:
        return False
    if gold_label and label and gold_label.kind == label.kind == "symbol" and gold_label != label:
        return False
    if gold_value is not gold or value is not answer:
        return _matches(gold_value, value, is_same)
    if gold.kind == answer.kind == "ratio" and any(part.text[:1] == "0" for part in (*gold.args, *answer.args)):
        return False  # 10:05 is a time, and 10:5 is none
    if gold.kind == answer.kind and gold.kind in ("ratio", "matrix"):
        return _match_in_order(gold.args, answer.args, is_same)
    return gold.kind not in _STRUCTURES and answer.kind not in _STRUCTURES and is_same(gold, answer)


def _only_element(node: Node) -> Node:
    """A set of one number may stand for it."""
    return node.args[0] if node.kind == "list" and node.text == "{}" and len(node.args) == 1 else node


def _match_in_order(golds: Sequence[Node], answers: Sequence[Node], is_same: _Same) -> bool:
    return len(golds) == len(answers) and all(_matches(a, b, is_same) for a, b in zip(golds, answers, strict=True))


def _match_lists(gold: Node, answer: Node, is_same: _Same) -> bool:
    """Brackets have to agree, but a list without brackets may be a set, and with labels a tuple."""
    golds, answers = _items(gold), _items(answer)
    brackets = ["" if node.text in (",", "or") else node.text for node in (gold, answer)]
    if brackets[0] != brackets[1] and set(brackets) != {"", "{}"}:
        labelled = (golds, answers)[brackets.index("")] if set(brackets) == {"", "()"} else []
        return _has_own_labels(labelled, with_indices=True) and _match_in_order(golds, answers, is_same)
    are_words = all(item.kind == "word" or (item.kind == "symbol" and len(item.text) == 1) for item in golds)
    is_ordered = brackets[0] not in ("", "{}") or (brackets == ["", ""] and are_words)
    if is_ordered or _has_own_labels(golds) != _has_own_labels(answers):
        return _match_in_order(golds, answers, is_same)
    for item in golds:
        found = next((other for other in answers if _matches(item, other, is_same)), None)
        if found is None:
            return False
        answers.remove(found)
    return not answers


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
    parts = dict.fromkeys(node.args) if any(part.kind == "list" for part in node.args) else node.args
    return [each for p in parts for each in ([_with_sign(p, s) for s in "+-"] if _has_sign_choice(p) else [p])]


def _has_sign_choice(node: Node) -> bool:
    return node.kind == "pm" or any(map(_has_sign_choice, node.args))


def _with_sign(node: Node, sign: str) -> Node:
    parts = tuple(_with_sign(part, sign) for part in node.args)
    if node.kind == "pm":
        return parts[0] if node.text == sign else Node("neg", parts)
    return node._replace(args=parts)


def _has_own_labels(items: Sequence[Node], *, with_indices: bool = False) -> bool:
    """Whether every item is an equation with a label of its own, unlike ``x = 1, x = 2`` and ``x_1 = 1, x_2 = 2``."""
    labels = [part.args[0] for part in items if part.kind == "relation" and part.text == "="]
    names = {label if with_indices else label._replace(text=label.text.partition("_")[0]) for label in labels}
    return len(names) == len(items) > 1


# ---- relations ----


def _statement(node: Node, is_same: _Same | None = None) -> tuple[Node | None, Node | None]:
    r"""The label and the value of ``x = 4`` or ``x \in S``; no value if an answer is false or denies something.

    ``is_same`` is None for a gold answer, which is true. Steps that are pending arithmetic are not checked where any form
    is accepted.
    """
    sides, relations = list(node.args), node.text.split()
    if node.kind != "relation" or not (relations == ["in"] or {*relations} <= {"=", "~"}):
        return None, node
    if "~" in relations:  # x = 1/3 ~ 0.33
        cut = relations.index("~")
        sides = sides[: cut + 1] if cut or not variables(sides[0]) else sides[:2]
    are_steps_free = is_same is _is_same_value
    numbers = [side for side in sides if not variables(side) and not (are_steps_free and is_pending(side))]
    if is_same and not all(_matches(a, b, _is_same_value) for a, b in itertools.pairwise(numbers)):
        return None, None
    if len(sides) == 2 and not variables(sides[0]) and sides[1].kind == "symbol" and variables(sides[1]):
        sides.reverse()  # 4 = x
    label, value = sides[0], sides[-1]
    if not variables(label):
        return (None, node) if variables(value) else (None, value)
    if {*label.text.casefold().split()} & _NEGATIONS:
        return None, None
    is_value = not variables(value) and is_same is not None and rational(value) != 0
    return (label, value) if is_value or relations == ["in"] or _is_label(label) else (None, node)


def _is_label(node: Node) -> bool:
    r"""Whether a tree names a quantity: a symbol, words, ``\frac{NO}{BO}``, ``(p, q)``."""
    if node.kind in ("mul", "div"):  # segments, unlike the x y of an equation
        return all(_is_label(part) and (part.kind == "mul" or not part.text[:1].islower()) for part in node.args)
    if node.kind in ("list", "ratio"):
        return all(map(_is_label, node.args))
    return node.kind == "word" or (node.kind == "symbol" and bool(variables(node)))


def _match_relations(gold: Node, answer: Node, is_same: _Same) -> bool | None:
    """Whether two relations are the same or multiples of each other; None if both are labelled values."""
    gold, answer = _ascending(gold), _ascending(answer)
    if "=" in gold.text and all(_statement(node)[0] is not None for node in (gold, answer)):
        return None
    if gold.text != answer.text:
        return False if {*gold.text.split()} - {"=", "~"} else None
    if len(gold.args) != 2 or gold.text in ("in", "=="):
        return _match_in_order(gold.args, answer.args, is_same)
    differences = [Node("add", (node.args[0], Node("neg", (node.args[1],)))) for node in (gold, answer)]
    names = sorted(variables(gold) | variables(answer))
    point = {name: _number(Fraction(1_000_003 + 7907 * index**2, 9973)) for index, name in enumerate(names)}
    scales = [_substituted(difference, point) for difference in differences]
    signs = [difference_sign(scale, _number(0)) for scale in scales]
    if not all(signs) or (gold.text in _BOUNDS and signs[0] != signs[1]):
        return False
    return are_equal(*(Node("mul", pair) for pair in zip(differences, reversed(scales), strict=True)))


def _ascending(node: Node) -> Node:
    relations = node.text.split()
    if {*relations} & {">", ">="}:
        return Node("relation", node.args[::-1], " ".join(r.replace(">", "<") for r in reversed(relations)))
    return node


def _substituted(node: Node, point: dict[str, Node]) -> Node:
    if node.kind in ("symbol", "word") and node.text in point:
        return point[node.text]
    return node._replace(args=tuple(_substituted(part, point) for part in node.args))


# ---- sets of numbers ----

_INFINITY = Node("symbol", (), r"\infty")
_INFINITIES = {_INFINITY: 1, Node("neg", (_INFINITY,)): -1}
_SIGNS = {"<": (-1,), "<=": (-1, 0), ">": (1,), ">=": (1, 0), "=": (0,), "!=": (1, -1)}
"""The signs of the difference of two sides between which a relation holds."""
_NAMED_SETS = {r"\mathbb{R}": True, r"\emptyset": False}
"""Whether a set contains every number or none."""


def _is_set(node: Node) -> bool:
    """Whether a tree is a set of numbers by its form alone, unlike a pair, which may be an interval or a point."""
    if node.kind == "list":
        return node.text in (",", "or") and any(map(_is_set, node.args))
    if node.kind == "relation":
        return bool({*node.text.split()} & {*_BOUNDS, "!="}) or (node.text == "in" and _is_set(node.args[1]))
    return node.kind == "region" or node.text == r"\mathbb{R}"


def _are_same_sets(gold: Node, answer: Node, is_same: _Same) -> bool | None:
    """Whether two sets have the same members; None if one of the trees is no set of numbers of one variable."""
    ends, others = _ends(gold), _ends(answer)
    if ends is None or others is None:
        return None
    names = [variables(node) - _NAMED_SETS.keys() for node in (gold, answer)]
    if (all(names) and names[0] != names[1]) or len(ends) + len(others) > MAX_ENDS:
        return False
    if any(_contains(gold, test) != _contains(answer, test) for test in _tests([*ends, *others])):
        return False
    for end in others:  # raises if an end is pending arithmetic
        any(is_same(other, end) for other in ends if _compare(other, end) == 0)
    return True


def _tests(ends: Sequence[Node]) -> list[Node]:
    """The ends of intervals, and a number between any two, below and above them."""
    finite = [end for end in ends if end not in _INFINITIES]
    places = sorted(map(approximate, finite)) or [Fraction(0)]
    between = [(a + b) / 2 for a, b in itertools.pairwise(places)]
    return finite + [_number(value) for value in (places[0] - 1, *between, places[-1] + 1)]


def _ends(node: Node) -> list[Node] | None:
    """The numbers at which membership in a set may change; None if the tree is no set of numbers."""
    found: list[list[Node] | None] = [None]
    if node.text in _NAMED_SETS:
        found = []
    elif node.kind == "relation" and node.text == "in":
        found = [_ends(node.args[1])]
    elif node.kind == "relation" and {*node.text.split()} <= _SIGNS.keys():
        found = list(itertools.starmap(_roots, itertools.pairwise(node.args)))
    elif node.kind == "region" or (node.kind == "list" and node.text in (",", "or")):
        found = [_ends(part) for part in node.args]
    elif node.kind == "list" and (node.text == "{}" or len(node.args) == 2) and not variables(node):
        found = [_items(node)]
    return None if None in found else [end for ends in found for end in ends or []]


def _roots(left: Node, right: Node) -> list[Node] | None:
    """The solutions of an equation of a number with something linear in one variable, or its absolute value."""
    if variables(right):
        left, right = right, left
    if variables(right) or len(names := variables(left)) != 1:
        return None
    if left.kind == "call" and left.text == "abs":
        found = [_roots(left.args[0], side) for side in (right, Node("neg", (right,)))]
        return None if None in found else [root for roots in found for root in roots or []]
    if left.kind == "symbol":
        return [right]
    values = [_substituted(left, dict.fromkeys(names, _number(x))) for x in range(3)]
    slopes = [rational(Node("add", (b, Node("neg", (a,))))) for a, b in itertools.pairwise(values)]
    rest = rational(Node("add", (right, Node("neg", (values[0],)))))
    return [_number(rest / slopes[0])] if slopes[0] and slopes[0] == slopes[1] and rest is not None else None


def _contains(node: Node, point: Node) -> bool:
    if node.text in _NAMED_SETS:
        return _NAMED_SETS[node.text]
    if node.kind == "region":
        is_in, is_in_other = (_contains(part, point) for part in node.args)
        return is_in or is_in_other if node.text == r"\cup" else is_in and is_in_other == (node.text == r"\cap")
    if node.kind == "relation" and node.text == "in":
        return _contains(node.args[1], point)
    if node.kind == "relation":
        sides = [_substituted(side, dict.fromkeys(variables(node), point)) for side in node.args]
        signs = itertools.starmap(_compare, itertools.pairwise(sides))
        return all(sign in _SIGNS[relation] for sign, relation in zip(signs, node.text.split(), strict=True))
    if node.text == "{}":
        return any(_compare(point, item) == 0 for item in _items(node))
    if node.text in (",", "or"):
        return (any if node.text == "or" or _is_union(node) else all)(_contains(part, point) for part in node.args)
    low, high = (_compare(point, end) for end in node.args)
    return (low > 0 or (low == 0 and node.text[0] == "[")) and (high < 0 or (high == 0 and node.text[1] == "]"))


@functools.lru_cache(maxsize=64)
def _is_union(node: Node) -> bool:
    """Whether the parts of a list exclude each other, so that the commas mean "or": ``x < 1, x > 2``."""
    return not any(all(_contains(part, test) for part in node.args) for test in _tests(_ends(node) or []))


def _compare(first: Node, second: Node) -> int:
    """The sign of a difference; the infinities are numbers here."""
    a, b = _INFINITIES.get(first, 0), _INFINITIES.get(second, 0)
    return (a > b) - (a < b) if a or b else difference_sign(first, second)


# ---- single values ----


def _is_same_value(gold: Node, answer: Node) -> bool:
    """Whether two single values are equal, apart from a unit or a percent sign that only one of them has."""
    nodes, kinds = (gold, answer), (gold.kind, answer.kind)
    if "unit" in kinds:
        known = {*UNITS.values(), *"/^23"}
        if gold.text != answer.text and all(n.kind == "unit" and {*n.text.split()} <= known for n in nodes):
            return False
        return _is_same_value(*(node.args[0] if node.kind == "unit" else node for node in nodes))
    if "based" in kinds:  # equal ones have the same tree
        bare = [n._replace(kind="number", text=n.text[:-3]) if n.text.endswith("_10") else n for n in nodes]
        return bare != [*nodes] and _is_same_value(*bare)
    if "word" in kinds:
        return gold.text.casefold() == answer.text.casefold() and answer.kind in ("word", "symbol")
    for kind in ("degrees", "percent"):  # on one side only, it counts or it does not
        if kind in kinds and kinds[0] != kinds[1]:
            return are_equal(*nodes) or _is_same_value(*(n.args[0] if n.kind == kind else n for n in nodes))
    if any(node in _INFINITIES for node in nodes):
        return False  # equal ones have the same tree
    return _is_rounded(gold, answer) or _is_rounded(answer, gold) or are_equal(gold, answer)


def _is_rounded(number: Node, other: Node) -> bool:
    """Whether a decimal number is another one, that has more decimals than can be written, rounded or cut off."""
    digits = (number.args[0] if number.kind == "neg" else number).text
    whole, _, decimals = digits.partition(".")
    is_decimal = number.kind in ("neg", "number") and decimals.isdigit()
    if not is_decimal or len((whole + decimals).lstrip("0")) < MIN_ROUNDED_DIGITS or variables(other):
        return False
    written, value = rational(number), rational(other)
    if written is None or (value is not None and 10 ** value.denominator.bit_length() % value.denominator == 0):
        return False
    try:
        value = approximate(other, 4 * len(digits) + 64)
    except UnknownValueError:
        return False
    missing = (abs(value) - abs(written)) * 10 ** len(decimals)
    return value * written > 0 and -Fraction(1, 2) <= missing < 1

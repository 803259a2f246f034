r"""Whether a mathematical answer equals the gold one: Math-Verify, with its traps handled before it.

What counts as the answer: the last ``\boxed{}`` after the end of thinking (with the boxes that adjoin it:
``\boxed{1}, \boxed{2}`` is a list); where there is no box, what follows ``####`` in the last line, else the formula
after the last "answer is" or "answer:", else what Math-Verify finds in the last lines.

Runs inside grading workers, so it imports nothing heavier than Math-Verify (no JAX), and not even that
before the first answer that needs it. It is pure, but hostile input can be slow: call it through ``pool.py``.
"""

import functools
import logging
import re
from typing import Any, NamedTuple

MAX_ANSWER_CHARACTERS = 1000
"""A longer boxed answer is not read; the longest gold of the data sets that we checked has 159."""
MAX_UNBOXED_CHARACTERS = 1500
"""End of a response in which an answer without a box is looked for."""
MAX_DEPTH = 12
"""Nested brackets. Parsing 30 levels takes 2.6 s."""
MAX_EXPONENT = 10_000
"""Numeric exponents, factorials and numbers of terms above this are not computed."""
MAX_SYMBOLIC_EXPONENT = 100
"""Powers of sums with variables are expanded when compared."""
RELATIVE_TOLERANCE = 1e-4
"""Two numbers further apart are not equal, whatever Math-Verify says (it rounds to decimal places)."""

ROUNDING = 1e-12
"""Two numbers, one of them written with a decimal point, that are as near as this are equal."""

_END_OF_THINKING = "</think>"
_PLAIN_NUMBER = re.compile(r"-?(\d+|\d{1,3}(,\d{3})+)(\.\d+)?")
_DECIMAL_COMMA = re.compile(r"-?\d+,(\d{1,2}|\d{4,})")
_BOX_JOINT = re.compile(r"(?:\s|\\[,;:! ]|\\q?quad|\\text\{[^{}]{0,40}\}|[$,;.&]|\\[()\[\]]|and|or)*")
_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
"""A box's opening, an escaped character (an escaped brace is none), or a brace."""
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mbox)\s*\{[^{}]*\}")
_PROSE = re.compile(r"[A-Za-z]{2,}\s+[A-Za-z]{2,}|[A-Za-z]{3,}.*\n|\n.*[A-Za-z]{3,}")
_ANSWER_IS = re.compile(r"answer(?:\s+is|:)\s*:?\s*(\S.*?)(?:\.(?!\d)|\n|$)", re.IGNORECASE)
_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{3,}")
_HALF_EXPRESSION = re.compile(r"[-+*/^=<>]\s*$")


class Judgement(NamedTuple):
    """The outcome with its reason."""

    is_correct: bool
    detail: str


def grade_answer(gold: str, response: str, place: str = "any") -> Judgement:
    """Judges a finished response against a gold answer.

    Args:
        gold: a number, bare LaTeX, or text with ``$...$`` or a box.
        response: the decoded response, thinking included.
        place: where the answer counts, see ``extract_answer``.

    Raises:
        ValueError: where the gold answer does not parse; rows are checked for it when they are loaded.
    """
    answer = extract_answer(response, place)
    if answer is None:
        return Judgement(False, "no answer")
    if _canonical(answer) == _canonical(_unboxed(gold)):
        return Judgement(True, "equal strings")
    gold, answer = _with_point(gold, answer), _with_point(answer, gold)
    if _is_plain_number(answer) and _is_plain_number(gold):
        is_equal = float(answer.replace(",", "")) == float(gold.replace(",", ""))
        return Judgement(is_equal and _exact(answer) == _exact(gold), "numbers")
    if _is_too_nested(answer):
        return Judgement(False, "answer too deeply nested")
    return _compare(gold, answer)


def extract_answer(response: str, place: str = "any") -> str | None:
    r"""The text of the answer after thinking, or None.

    Args:
        response: the decoded response, thinking included.
        place: ``boxed``: the last box only; ``hash``: after ``####`` in the last line only; ``any``: the last box,
            else after ``####``, else after "answer is", else the last lines.
    """
    if "<think>" in response and _END_OF_THINKING not in response:
        return None
    text = response.rpartition(_END_OF_THINKING)[2]
    boxes = _boxes(text) if place != "hash" else []
    if boxes:
        answer = _last_boxes(text, boxes)
        return answer if answer.strip() and len(answer) <= MAX_ANSWER_CHARACTERS else None
    if place == "boxed":
        return None
    tail = text[-MAX_UNBOXED_CHARACTERS:]
    if len(tail) < len(text):
        tail = tail.partition("\n")[2] or tail  # a cut line could begin inside a formula
    last_line = tail.strip().rpartition("\n")[2]
    if "####" in last_line:
        return last_line.rpartition("####")[2].strip()
    if place == "hash":
        return None
    said = _ANSWER_IS.findall(tail)
    if said and not _WORD.search(_COMMAND.sub("", said[-1])):
        return said[-1]
    return tail.strip() or None


def vote(response: str) -> str | None:
    """The answer of a response as text in which equal answers mostly are equal, for majority votes; None: it has none.

    Spaces, dollars and trailing zeros do not matter; that 1/2 is 0.5 is not seen.
    """
    answer = extract_answer(response)
    if answer is None:
        return None
    text = _canonical(answer)
    if not _is_plain_number(text):
        return text
    whole, decimals = _exact(text)
    sign = "-" if text.startswith("-") and (whole.strip("0") or decimals) else ""
    return f"{sign}{whole or '0'}.{decimals}"


def extract_gold(answer: str, rule: str) -> str:
    """The gold answer in its column: all of it (``whole``), or after the last ``####`` (``last_hash``, GSM8K).

    Raises:
        ValueError: where there is no ``####``.
    """
    if rule == "whole":
        return answer.strip()
    _, mark, gold = answer.rpartition("####")
    if not mark:
        raise ValueError(f"the answer has no '####': {answer[-80:]!r}")
    return gold.strip().replace(",", "")


def is_usable_gold(gold: str) -> bool:
    """Whether a gold answer can be compared with; numbers are recognised without parsing."""
    if _is_plain_number(gold):
        return True
    if not gold.strip() or _is_too_nested(gold):
        return False
    return any(not isinstance(value, str) for value in _parse_gold(gold))


def _compare(gold: str, answer: str) -> Judgement:
    """Math-Verify's verdict, where both sides parse, are not huge, and are not further apart than it sees."""
    import math_verify
    import sympy

    gold_values, answer_values = _parse_gold(gold), _parse_answer(answer)
    if not gold_values:
        raise ValueError(f"the gold answer {gold!r} does not parse")
    if not answer_values:
        return Judgement(False, "answer does not parse")
    if any(_is_huge(value) for value in (*gold_values, *answer_values)):
        return Judgement(False, "too large to compute")
    distance = _distance(gold_values[0], answer_values[0])
    # The order matters: the gold decides whether `x = 1` or `1` is wanted.
    if not math_verify.verify(list(gold_values), list(answer_values), timeout_seconds=None):
        # Compared exactly, 11/33.0 is not 1/3.
        is_rounding = distance < ROUNDING and any(
            value.has(sympy.Float) for value in (gold_values[0], answer_values[0])
        )
        return Judgement(is_rounding, "equal but for rounding" if is_rounding else "not equal")
    is_percent = "%" in gold + answer or "percent" in gold + answer
    if not is_percent and RELATIVE_TOLERANCE < distance < float("inf"):
        return Judgement(False, "numbers differ")
    return Judgement(True, "equal")


# ---- text ----


def _boxes(text: str) -> list[tuple[int, int, str]]:
    r"""Every closed outermost ``\boxed{...}`` or ``\fbox{...}``: where it begins, where it ends, its content.

    One pass with a stack: a search from every box would take quadratic time on a text of open boxes.
    """
    found: list[tuple[int, int, str]] = []
    open_braces: list[re.Match[str]] = []
    for match in _BRACE.finditer(text):
        if match[0] == "}":
            opening = open_braces.pop() if open_braces else None
            if opening is not None and opening[0] != "{":
                while found and found[-1][0] > opening.start():
                    found.pop()
                found.append((opening.start(), match.end(), text[opening.end() : match.start()]))
        elif match[0].endswith("{") and match[0] != r"\{":
            open_braces.append(match)
    return found


def _last_boxes(text: str, boxes: list[tuple[int, int, str]]) -> str:
    """Content of the last box, after those of the boxes that only a comma, `and` or the like parts from it."""
    contents = [boxes[-1][2]]
    for (_, end, content), (start, _, _) in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        if not _BOX_JOINT.fullmatch(text[end:start]) or "\n\n" in text[end:start]:
            break
        contents.insert(0, content)
    return contents[0] if len(set(contents)) == 1 else ",".join(contents)


def _unboxed(gold: str) -> str:
    boxes = _boxes(gold)
    return _last_boxes(gold, boxes) if boxes else gold


def _canonical(text: str) -> str:
    r"""Text for the comparison of strings: without spaces, ``$`` around it, and a last full stop."""
    text = re.sub(r"\\[,;:! ]|\s", "", text).replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
    return text.removesuffix(".").strip("$")


def _is_plain_number(text: str) -> bool:
    return _PLAIN_NUMBER.fullmatch(text.strip()) is not None and len(text) <= 40


def _with_point(number: str, other: str) -> str:
    """A decimal comma as a point, where the other side is written with a point: ``1000,99`` is then no pair."""
    is_decimal = _DECIMAL_COMMA.fullmatch(number.strip()) and _is_plain_number(other) and "." in other
    return number.replace(",", ".") if is_decimal else number


def _exact(number: str) -> tuple[str, str]:
    """Sign and digits before the point, digits after it; float() alone would lose digits of long ones."""
    whole, _, decimals = number.strip().replace(",", "").partition(".")
    return whole.lstrip("-0"), decimals.rstrip("0")


def _is_too_nested(text: str) -> bool:
    depth = deepest = 0
    for character in text:
        depth += (character in "({[") - (character in ")}]")
        deepest = max(deepest, depth)
    return deepest > MAX_DEPTH


def _cleaned(text: str) -> str:
    r"""Removes what Math-Verify misreads: ``\mathrm{e}`` is cut off as a unit, ``\$`` ends a formula."""
    text = re.sub(r"\\(?:mathrm|operatorname)\{([a-z])\}", r"\1", text)
    text = re.sub(r"\\!\s*", "", text.replace(r"\$", "").replace(r"{,}", ",").replace("π", r"\pi "))
    return re.sub(r"(?<=\d)(?:\s|\\,|\\ )(?=\d{3}(?!\d))", "", text)


def _in_dollars(text: str) -> str:
    r"""Bare LaTeX is parsed only inside ``$...$``; text that has formulas of its own stays as it is."""
    return text if re.search(r"\$|\\\(|\\\[|\\boxed", text) else f"${text}$"


# ---- expressions ----


@functools.cache
def _parser() -> Any:
    """Math-Verify's parse, imported once; its warnings about our own deadline would fill the log."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    import math_verify

    parse: Any = math_verify.parse  # its annotation does not know of None, its documentation does
    return functools.partial(parse, parsing_timeout=None)


@functools.lru_cache(maxsize=1024)  # G rollouts in a row have one gold
def _parse_gold(gold: str) -> tuple[Any, ...]:
    return _trusted(_parser()(_in_dollars(_cleaned(gold))))


def _parse_answer(answer: str) -> tuple[Any, ...]:
    """An expression is parsed whole; prose is searched for one (as an expression it would be a product of letters)."""
    cleaned = _cleaned(answer)
    whole = () if _PROSE.search(_TEXT_COMMAND.sub("", cleaned)) else _trusted(_parser()(_in_dollars(cleaned)))
    return whole or _trusted(_parser()(cleaned))


def _trusted(parsed: list[Any]) -> tuple[Any, ...]:
    """What Math-Verify parsed, unless it stopped in the middle: of ``1-1/`` it makes 1."""
    if parsed and isinstance(parsed[-1], str) and _HALF_EXPRESSION.search(parsed[-1]):
        return ()
    return tuple(parsed)


def _is_huge(value: Any) -> bool:
    """Whether computing it would take more than moments: towers of powers, factorials, long sums."""
    import sympy

    if not isinstance(value, sympy.Basic):
        return False
    for node in sympy.preorder_traversal(value):
        if isinstance(node, sympy.Pow):
            limit = MAX_SYMBOLIC_EXPONENT if node.base.free_symbols and node.base.args else MAX_EXPONENT
            if _magnitude(node.exp) > limit:
                return True
        elif isinstance(node, (sympy.factorial, sympy.factorial2, sympy.binomial)):
            if _magnitude(node.args[0]) > MAX_EXPONENT:
                return True
        elif isinstance(node, (sympy.Sum, sympy.Product)):
            bounds = [bound for limits in node.args[1:] for bound in limits.args[1:] if bound.is_finite is not False]
            if any(_magnitude(bound) > MAX_EXPONENT for bound in bounds):
                return True
    return False


def _magnitude(node: Any) -> float:
    """An upper bound of the absolute value of a numeric expression, never computing it; inf where it is hopeless."""
    import sympy

    try:
        if isinstance(node, sympy.Number):
            return abs(float(node))
        parts = [_magnitude(part) for part in node.args]
        if isinstance(node, sympy.Pow):
            return max(parts[0], 2.0) ** parts[1]
        if isinstance(node, sympy.Mul):
            return functools.reduce(lambda product, part: product * part, parts, 1.0)
        if isinstance(node, sympy.Add):
            return sum(parts)
        if isinstance(node, (sympy.factorial, sympy.factorial2)):
            return max(parts[0], 1.0) ** max(parts[0], 1.0)
        return max(parts, default=1.0)
    except OverflowError:
        return float("inf")


def _distance(gold: Any, answer: Any) -> float:
    """Difference of two numbers relative to the larger (at most 2); inf where one of them is not a number."""
    import sympy

    if not all(isinstance(value, sympy.Expr) and value.is_number for value in (gold, answer)):
        return float("inf")
    try:
        a, b = (complex(sympy.N(value, 15)) for value in (gold, answer))
    except (TypeError, ValueError, OverflowError):
        return float("inf")
    largest = max(abs(a), abs(b))
    return abs(a - b) / largest if largest else 0.0

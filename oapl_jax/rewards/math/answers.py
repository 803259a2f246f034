r"""Compares mathematical answers with gold answers by Math-Verify, after handling the inputs that it misjudges.

The answer is the last ``\boxed{}`` after the end of thinking, with the boxes that adjoin it: ``\boxed{1}, \boxed{2}``
is a list. Without a box it is what follows ``####`` in the last line, else the formula after the last "answer is" or
"answer:", else what Math-Verify finds in the last lines.

This runs in grading workers, so it does not import JAX, and imports Math-Verify only when an answer needs it. The
functions are pure, but hostile input can be slow: call them through ``pool.py``.
"""

import functools
import logging
import re
from typing import Any, NamedTuple

MAX_ANSWER_CHARACTERS = 1000
"""Longer boxed answers are not read; the longest gold answer of the data sets that we checked has 159."""
MAX_UNBOXED_CHARACTERS = 1500
"""An answer without a box is searched for in this many characters at the end of a response."""
MAX_DEPTH = 12
"""Most nested brackets; parsing 30 levels takes 2.6 s."""
MAX_EXPONENT = 10_000
"""Larger numeric exponents, factorials and numbers of terms are not computed."""
MAX_SYMBOLIC_EXPONENT = 100
"""Largest exponent of a sum with variables: comparing it expands the power."""
RELATIVE_TOLERANCE = 1e-4
"""Numbers that differ by more are unequal, even if Math-Verify, which rounds to decimal places, calls them equal."""
ROUNDING = 1e-12
"""Numbers that differ by less are equal if one of them is written with a decimal point."""

_END_OF_THINKING = "</think>"
_PLAIN_NUMBER = re.compile(r"-?(\d+|\d{1,3}(,\d{3})+)(\.\d+)?")
_DECIMAL_COMMA = re.compile(r"-?\d+,(\d{1,2}|\d{4,})")
_BOX_JOINT = re.compile(r"(?:\s|\\[,;:! ]|\\q?quad|\\text\{[^{}]{0,40}\}|[$,;.&]|\\[()\[\]]|and|or)*")
_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
"""The opening of a box, an escaped character (so that ``\\{`` is not a brace), or a brace."""
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mbox)\s*\{[^{}]*\}")
_PROSE = re.compile(r"[A-Za-z]{2,}\s+[A-Za-z]{2,}|[A-Za-z]{3,}.*\n|\n.*[A-Za-z]{3,}")
_ANSWER_IS = re.compile(r"answer(?:\s+is|:)\s*:?\s*(\S.*?)(?:\.(?!\d)|\n|$)", re.IGNORECASE)
_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{3,}")
_HALF_EXPRESSION = re.compile(r"[-+*/^=<>]\s*$")


class Judgement(NamedTuple):
    """Whether an answer is correct, and why."""

    is_correct: bool
    detail: str


def grade_answer(gold: str, response: str, where: str = "any") -> Judgement:
    """Judges a finished response against a gold answer.

    Args:
        gold: a number, bare LaTeX, or text with ``$...$`` or a box.
        response: the decoded response, thinking included.
        where: where the answer must be, see ``extract_answer``.

    Raises:
        ValueError: the gold answer does not parse; ``is_usable_gold`` checks that before a run.
    """
    answer = extract_answer(response, where)
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


def extract_answer(response: str, where: str = "any") -> str | None:
    r"""The text of the answer after the end of thinking, or None.

    Args:
        response: the decoded response, thinking included.
        where: ``boxed``: only in the last box; ``hash``: only after ``####`` in the last line; ``any``: in the last
            box, else after ``####``, else after "answer is", else in the last lines.
    """
    if "<think>" in response and _END_OF_THINKING not in response:
        return None
    text = response.rpartition(_END_OF_THINKING)[2]
    boxes = _boxes(text) if where != "hash" else []
    if boxes:
        answer = _last_boxes(text, boxes)
        return answer if answer.strip() and len(answer) <= MAX_ANSWER_CHARACTERS else None
    if where == "boxed":
        return None
    tail = text[-MAX_UNBOXED_CHARACTERS:]
    if len(tail) < len(text):
        tail = tail.partition("\n")[2] or tail  # a partial line could begin inside a formula
    last_line = tail.strip().rpartition("\n")[2]
    if "####" in last_line:
        return last_line.rpartition("####")[2].strip()
    if where == "hash":
        return None
    said = _ANSWER_IS.findall(tail)
    if said and not _WORD.search(_COMMAND.sub("", said[-1])):
        return said[-1]
    return tail.strip() or None


def vote(response: str) -> str | None:
    """The normalised answer of a response for majority votes, or None if it has no answer.

    Spaces, dollars and trailing zeros are removed; 1/2 and 0.5 stay different.
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
    """The gold answer in its column: all of it (``whole``), or the text after the last ``####`` (``last_hash``, GSM8K).

    Raises:
        ValueError: the rule is ``last_hash`` and there is no ``####``.
    """
    if rule == "whole":
        return answer.strip()
    _, mark, gold = answer.rpartition("####")
    if not mark:
        raise ValueError(f"the answer has no '####': {answer[-80:]!r}")
    return gold.strip().replace(",", "")


def is_usable_gold(gold: str) -> bool:
    """Whether answers can be compared with a gold answer; plain numbers are accepted without parsing."""
    if _is_plain_number(gold):
        return True
    if not gold.strip() or _is_too_nested(gold):
        return False
    return any(not isinstance(value, str) for value in _parse_gold(gold))


def _compare(gold: str, answer: str) -> Judgement:
    """Math-Verify's verdict, corrected for expressions that are too large and for differences that it overlooks."""
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
    # The order matters: the gold answer decides whether `x = 1` or `1` is expected.
    if not math_verify.verify(list(gold_values), list(answer_values), timeout_seconds=None):
        # In an exact comparison 11/33.0 is not 1/3.
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
    r"""Every closed outermost ``\boxed{...}`` or ``\fbox{...}`` as (start, end, content).

    This is one pass with a stack. A search from every box would take quadratic time on a text of open boxes.
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
    """Content of the last box, preceded by that of boxes separated from it only by a comma, `and` or the like."""
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
    r"""Text to compare as a string: without spaces, surrounding ``$`` and a final full stop."""
    text = re.sub(r"\\[,;:! ]|\s", "", text).replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
    return text.removesuffix(".").strip("$")


def _is_plain_number(text: str) -> bool:
    return _PLAIN_NUMBER.fullmatch(text.strip()) is not None and len(text) <= 40


def _with_point(number: str, other: str) -> str:
    """Replaces a decimal comma by a point if the other side has a point, so that ``1000,99`` is not read as a pair."""
    is_decimal = _DECIMAL_COMMA.fullmatch(number.strip()) and _is_plain_number(other) and "." in other
    return number.replace(",", ".") if is_decimal else number


def _exact(number: str) -> tuple[str, str]:
    """The digits before and after the point, without padding zeros; float() would lose digits of long numbers."""
    whole, _, decimals = number.strip().replace(",", "").partition(".")
    return whole.lstrip("-0"), decimals.rstrip("0")


def _is_too_nested(text: str) -> bool:
    depth = deepest = 0
    for character in text:
        depth += (character in "({[") - (character in ")}]")
        deepest = max(deepest, depth)
    return deepest > MAX_DEPTH


def _cleaned(text: str) -> str:
    r"""Removes what Math-Verify misreads: it drops ``\mathrm{e}`` as a unit, and ``\$`` ends a formula."""
    text = re.sub(r"\\(?:mathrm|operatorname)\{([a-z])\}", r"\1", text)
    text = re.sub(r"\\!\s*", "", text.replace(r"\$", "").replace(r"{,}", ",").replace("π", r"\pi "))
    return re.sub(r"(?<=\d)(?:\s|\\,|\\ )(?=\d{3}(?!\d))", "", text)


def _in_dollars(text: str) -> str:
    r"""Puts bare LaTeX into ``$...$``, without which it is not parsed; text with delimited formulas stays unchanged."""
    return text if re.search(r"\$|\\\(|\\\[|\\boxed", text) else f"${text}$"


# ---- expressions ----


@functools.cache
def _parser() -> Any:
    """Math-Verify's parser. Its warnings about a missing time limit are silenced; the pool has one."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    import math_verify

    parse: Any = math_verify.parse  # parsing_timeout=None is documented but not in the annotation
    return functools.partial(parse, parsing_timeout=None)


@functools.lru_cache(maxsize=1024)  # the G rollouts of a prompt share a gold answer
def _parse_gold(gold: str) -> tuple[Any, ...]:
    return _trusted(_parser()(_in_dollars(_cleaned(gold))))


def _parse_answer(answer: str) -> tuple[Any, ...]:
    """Parses an expression whole; prose is searched for one, since as an expression it would be a product of letters."""
    cleaned = _cleaned(answer)
    whole = () if _PROSE.search(_TEXT_COMMAND.sub("", cleaned)) else _trusted(_parser()(_in_dollars(cleaned)))
    return whole or _trusted(_parser()(cleaned))


def _trusted(parsed: list[Any]) -> tuple[Any, ...]:
    """What Math-Verify parsed, unless it stopped in the middle: it parses ``1-1/`` as 1."""
    if parsed and isinstance(parsed[-1], str) and _HALF_EXPRESSION.search(parsed[-1]):
        return ()
    return tuple(parsed)


def _is_huge(value: Any) -> bool:
    """Whether computing a value could take long: towers of powers, factorials, long sums."""
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
    """An upper bound of the absolute value of a numeric expression, without computing it; it can be inf."""
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
    """Difference of two numbers relative to the larger one (at most 2); inf if one of them is not a number."""
    import sympy

    if not all(isinstance(value, sympy.Expr) and value.is_number for value in (gold, answer)):
        return float("inf")
    try:
        a, b = (complex(sympy.N(value, 15)) for value in (gold, answer))
    except (TypeError, ValueError, OverflowError):
        return float("inf")
    largest = max(abs(a), abs(b))
    return abs(a - b) / largest if largest else 0.0

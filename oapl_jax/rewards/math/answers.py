r"""Whether a mathematical answer equals the gold one: the pipeline of a verdict, and its rules.

1. The answer is found in the response (``extraction.py``).
2. Equal texts are equal answers, in whatever form.
3. Both texts are parsed to their ends (``parser.py``). If one of them is no mathematics, they are compared as texts.
4. The trees are compared part by part (``comparison.py``), and their values exactly (``values.py``).
5. An answer that is equal has to be evaluated: pending arithmetic is wrong, and so is an expression of the prompt.

The rule that decided is in the verdict. This runs in grading workers, so it does not import JAX. The work of
a verdict is bounded by sizes that are known before it starts.
"""

import contextlib
import functools
import re
from typing import NamedTuple

from oapl_jax.rewards.math import comparison, extraction
from oapl_jax.rewards.math.extraction import extract_answer
from oapl_jax.rewards.math.notation import cleaned, spelling
from oapl_jax.rewards.math.parser import MAX_DEPTH, Node, NotMathematicsError, parse
from oapl_jax.rewards.math.values import TooLargeError, rational, variables

RIGHT = ("same text", "equal values")
"""The rules that decide that an answer is correct; ``_decide`` has the others."""
MAX_GOLD_CHARACTERS = 10_000
MAX_PROMPT_CHARACTERS = 8000
"""An expression is searched for in this many characters at the end of a prompt."""

_PLAIN_NUMBER = re.compile(r"-?(\d+|\d{1,3}(,\d{3})+)(\.\d+)?", re.ASCII)
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", re.ASCII)
_DECIMAL_COMMA = re.compile(r"(?<![\d.,])(\d+),(\d{2}|\d{4,})(?![\d,]|\.\d)", re.ASCII)
_FRACTION = re.compile(r"\\frac\{([^{}]*)\}\{([^{}]*)\}")


class Judgement(NamedTuple):
    """Whether an answer is correct, and the rule that decided."""

    is_correct: bool
    detail: str


def grade_answer(
    gold: str, response: str, where: str = "any", *, prompt: str = "", is_evaluated: bool = True
) -> Judgement:
    """Judges a finished response against a gold answer.

    Args:
        gold: a number, bare LaTeX, or text with ``$...$`` or a box; ValueError if ``is_usable_gold`` refuses it.
        response: the decoded response, thinking included.
        where: where the answer must be, see ``extract_answer``.
        prompt: an expression in it that is not evaluated is no answer.
        is_evaluated: whether pending arithmetic, like ``3 + 4`` for 7, is wrong.
    """
    if not is_usable_gold(gold):
        raise ValueError(f"the gold answer {gold!r} does not parse")
    answer = extract_answer(response, where)
    rule = "no answer" if answer is None else _decide(_unboxed(gold), answer, prompt, is_evaluated)
    return Judgement(rule in RIGHT, rule)


def _decide(gold: str, answer: str, prompt: str, is_evaluated: bool) -> str:
    if spelling(gold) == spelling(answer):
        return "same text"
    # A gold answer may be a chain of equations with a side that cannot be read: then the last equation counts.
    golds, answers = _readings(gold) or _readings("=".join(gold.split("=")[-2:])), _readings(answer)
    if not golds or not answers:
        return "different text"
    try:
        for gold_tree in golds:
            for tree in answers:
                if comparison.says(gold_tree, tree, is_evaluated=is_evaluated):
                    is_value = not comparison.is_number(tree) and not variables(gold_tree)
                    is_copied = is_value and rational(tree) is not None and _stands_in(answer, prompt)
                    return "an expression of the prompt" if is_copied else "equal values"
    except comparison.PendingError:
        return "pending arithmetic"
    except TooLargeError:
        return "too large to compute"
    except ArithmeticError:
        return "no known value"
    return "different values"


def vote(response: str) -> str | None:
    """The answer of a response for majority votes, without spaces, dollars and trailing zeros; 1/2 is not 0.5."""
    answer = extract_answer(response)
    return None if answer is None else _voted(answer)


@functools.lru_cache(maxsize=4096)
def _voted(answer: str) -> str:
    text = spelling(answer)
    if not _PLAIN_NUMBER.fullmatch(text):
        return text
    whole, _, decimals = text.replace(",", "").lstrip("-").partition(".")
    whole, decimals = whole.lstrip("0"), decimals.rstrip("0")
    return f"{'-' if text.startswith('-') and (whole or decimals) else ''}{whole or '0'}.{decimals}"


def response_with(answer: str, where: str) -> str:
    """A response that gives an answer where ``where`` expects it."""
    return f"#### {_unboxed(answer)}" if where == "hash" else rf"\boxed{{{_unboxed(answer)}}}"


def extract_gold(answer: str, rule: str) -> str:
    """The gold answer in its column: all of it (``whole``), or the text after the last ``####`` (``last_hash``, GSM8K)."""
    if rule == "whole":
        return answer.strip()
    _, mark, gold = answer.rpartition("####")
    if not mark:
        raise ValueError(f"the answer has no '####': {answer[-80:]!r}")
    return gold.strip().replace(",", "")


@functools.lru_cache(maxsize=1024)
def is_usable_gold(gold: str) -> bool:
    """Whether answers can be compared with a gold answer: it is neither blank nor too long, and all its brackets close."""
    text = _unboxed(gold)
    if len(text) > MAX_GOLD_CHARACTERS:
        return False
    depth = deepest = 0
    for brace in re.findall(r"\\.|[{}()]", text):
        depth += (brace in "{(") - (brace in "})")
        deepest = max(deepest, depth)
        if brace == "}" and depth < 0:
            return False
    is_closed = text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
    return bool(spelling(text)) and deepest <= MAX_DEPTH and is_closed


def _unboxed(gold: str) -> str:
    boxes, _ = extraction.find_boxes(gold)
    return extraction.last_boxes(gold, boxes) if boxes else gold


@functools.lru_cache(maxsize=1024)  # the G rollouts of a prompt share a gold answer
def _readings(text: str) -> tuple[Node, ...]:
    """The trees of a text. A comma may group digits, separate numbers, or be a decimal point (before 2 digits)."""
    text = cleaned(text)
    variants = [text]
    if not re.search(r"[(\[]|\\\{", text):  # in brackets commas separate
        variants.insert(0, _GROUPED.sub(lambda match: match[0].replace(",", ""), text))
        variants += [_DECIMAL_COMMA.sub(r"\1.\2", text)] * (text.count(",") == 1)
    trees = {}
    for variant in variants:
        with contextlib.suppress(NotMathematicsError):
            trees[parse(variant)] = None
    return tuple(trees)


def _stands_in(answer: str, prompt: str) -> bool:
    """Whether an expression stands in the prompt, whatever the spaces, brackets and signs of multiplication."""
    needle, hay = (_squashed(text) for text in (answer.rpartition("=")[2], prompt[-MAX_PROMPT_CHARACTERS:]))
    return bool(needle) and re.search(rf"(?<![\d.]){re.escape(needle)}(?!\d|\.\d)", hay) is not None


def _squashed(text: str) -> str:
    text, before = cleaned(text), None
    while text != before:
        before, text = text, _FRACTION.sub(r"\1/\2", text)
    return re.sub(r"[\s{}()[\]]", "", text.replace(r"\cdot", "*").replace(r"\div", "/"))

"""Rewards of the built-in tasks (``data/tasks.py``), from the text of the question and the response."""

import re
from collections.abc import Callable


def grade_chain(question: str, response: str) -> bool:
    """Whether the last character is the chain's final value; the running values before it do not count."""
    value = int(question[0])
    for operator, operand in re.findall(r"([-+*])(\d)", question):
        value = _apply(operator, value, int(operand)) % 10
    return response[-1:] == str(value)


def grade_countdown(question: str, response: str) -> bool:
    """Whether each step is true and uses a digit of the question once, and the last value is the target.

    The form is a digit, then two or three steps of operator, digit and two-digit value: ``3*721+425-124``.
    """
    digits, target = question.split(":")
    if not re.fullmatch(r"[0-9]([-+*][0-9][0-9]{2}){2,3}", response):
        return False
    free, value = list(digits), int(response[0])
    if response[0] not in free:
        return False
    free.remove(response[0])
    for operator, digit, claimed in re.findall(r"([-+*])(\d)(\d\d)", response):
        if digit not in free:
            return False
        free.remove(digit)
        value = _apply(operator, value, int(digit))
        if value != int(claimed):
            return False
    return value == int(target)


def grade_sums(question: str, response: str) -> bool:
    """Whether the response is the value of the question's last line in plain digits, with nothing but space around it."""
    *_, (left, operator, right) = re.findall(r"(\d+) ([-+*]) (\d+) =", question)
    return response.strip(" \n") == str(_apply(operator, int(left), int(right)))


def _apply(operator: str, left: int, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


TOY_GRADERS: dict[str, Callable[[str, str], bool]] = {
    "chain": grade_chain,
    "countdown": grade_countdown,
    "sums": grade_sums,
}
"""Reward functions by the names of their tasks: question and response to whether the response is correct."""

"""Reward functions as a user would write them (docs/rewards.md)."""

import math
import time

from oapl_jax.types import Grade, Prompt, Verdict


def shortness(prompt: Prompt, response: str) -> float:
    """Returns a number, which is the reward."""
    return 1.0 if len(response) <= len(prompt.answer) else 0.25


def graded(prompt: Prompt, response: str) -> Grade:
    """Returns a grade."""
    is_correct = response == prompt.answer and prompt.token_ids.tolist() == [0]
    return Grade(Verdict.CORRECT if is_correct else Verdict.WRONG, 2.0 * is_correct, "mine")


def broken(prompt: Prompt, response: str) -> float:
    """Fails in one of several ways."""
    if response == "nan":
        return math.nan
    if response == "late":
        time.sleep(60)
    raise KeyError(prompt.id)

"""Where a response ends: at tokens, and at strings in its text."""

import bisect
from collections.abc import Callable, Sequence

from oapl_jax.data.tokenizer import Tokenizer
from oapl_jax.rollouts.sampling import SamplingDistribution
from oapl_jax.types import FinishReason, Rollout

MARGIN = 8
"""Tokens decoded before those that may be a part of a stop string: the first of a decoded text may lose a space."""


class Stops:
    """The ends of the responses of one tokenizer and one distribution.

    Raises:
        ValueError: a stop token or a stop string that the tokenizer cannot produce.
    """

    def __init__(self, tokenizer: Tokenizer, distribution: SamplingDistribution):
        outside = [i for i in distribution.stop_token_ids if not 0 <= i < tokenizer.vocab_size]
        if outside:
            raise ValueError(
                f"stop_token_ids: {outside[0]} is no id of the tokenizer, which has 0 to {tokenizer.vocab_size - 1}"
            )
        ids = {*tokenizer.stop_ids, *distribution.stop_token_ids}
        for string in distribution.stop_strings:
            try:
                found = tokenizer.encode(string)
            except ValueError as error:
                raise ValueError(f"stop_strings: {string!r} can never be found: {error}") from error
            if len(found) == 1 and not tokenizer.decode(found):  # a special token, which no text shows
                ids.add(found[0])
        self.ids = tuple(sorted(ids))
        """All tokens that end a response."""
        self.vocab_size = tokenizer.vocab_size
        self.strings = distribution.stop_strings
        self.decode = tokenizer.decode
        self._is_raw = not tokenizer.has_chat_template

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of a response that is graded and logged: what is before its end."""
        ids = list(token_ids)
        if ids and ids[-1] in self.ids:
            ids.pop()
        return before_stop(self.decode(ids), self.strings)

    def problem(self, rollout: Rollout) -> str | None:
        """Why a response does not end at its first stop, where its ``finish_reason`` says so or it has one; else None."""
        num_tokens, length = len(rollout.token_ids), self.length(rollout.token_ids.tolist())
        if length is None and rollout.finish_reason is FinishReason.STOP:
            return "its finish_reason is stop, and it ends at no stop"
        if length is not None and length < num_tokens:
            return f"it has {num_tokens} tokens and goes on after its stop, token {length}"
        return None

    def length(self, token_ids: Sequence[int]) -> int | None:
        """Number of tokens of a response up to its first end, which belongs to it; None: it has none."""
        at_token = next((length for length, token in enumerate(token_ids, start=1) if token in self.ids), None)
        return stop_length(token_ids[:at_token], 0, self.strings, self.decode) or at_token

    def __str__(self) -> str:
        """For the start of a run: where responses end, and that prompts are not put into a chat template."""
        ends = " or ".join([f"token {', '.join(map(str, self.ids))}", *map(repr, self.strings)])
        raw = "; prompts are raw text: the tokenizer has no chat template" if self._is_raw else ""
        return f"end at {ends}{raw}"


def before_stop(text: str, strings: Sequence[str]) -> str:
    """The text up to the first stop string."""
    return text[: min((text.find(string) for string in strings if string in text), default=len(text))]


def stop_length(
    ids: Sequence[int], num_before: int, strings: Sequence[str], decode: Callable[[list[int]], str]
) -> int | None:
    """Number of tokens of a response up to the one that completes its first stop string; None: it has none.

    The first ``num_before`` tokens are known to have none.
    """
    if not strings:
        return None
    start = max(0, num_before - MARGIN - max(len(string.encode()) for string in strings))

    def has_stop(count: int) -> bool:
        text = decode(list(ids[start:count]))
        return any(string in text for string in strings)

    counts = range(num_before + 1, len(ids) + 1)
    if not counts or not has_stop(len(ids)):
        return None
    return counts[bisect.bisect_left(counts, True, key=has_stop)]  # what has one keeps it as it grows

"""The log-probabilities of single tokens, by the learner and by the sampler, of a few groups of some windows.

``diagnostics/token_logprobs.jsonl`` has a line for the last step of a window (``is_recorded``), with two groups of its
batch. The learner's values are those of the train step: by the parameters before the update that learned from the group.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from oapl_jax.io import json_lines
from oapl_jax.io.storage import SharedPath
from oapl_jax.io.trackers import Distributions, Sample
from oapl_jax.types import RolloutGroup

TOKEN_LOGPROBS_FILE = "diagnostics/token_logprobs.jsonl"
NUM_GROUPS = 2
"""Groups of a window."""
NUM_SAMPLES = 4
"""Responses of a group that a tracker shows."""
DENSE_WINDOWS = 64
"""Windows that are all recorded; of twice as many the second half by every second one, and so on."""
MOST_TOKENS = 1024
"""Of a response; the file has the first ones of a longer one."""
_DECIMALS = 6
_MOST_BYTES_OF_CHARACTER = 4
"""In UTF-8, and so the most tokens that a character is split into."""
_REPLACEMENT = "\ufffd"


class TokenLogprobs(NamedTuple):
    """Of a response, in nats, token by token."""

    tokens: list[str]
    """Decoded."""
    learner: list[float]
    sampler: list[float]


class GroupLogprobs(NamedTuple):
    """Of a group."""

    step: int
    """The learner step that learned from it."""
    rollouts: list[TokenLogprobs | None]
    """None for a rollout that is not usable."""


def is_recorded(version: int) -> bool:
    """Whether the window of a policy version is recorded: some 400 of 100,000, so that the file stays small."""
    return version % (1 << (version // DENSE_WINDOWS).bit_length()) == 0


def line(
    step: int,
    groups: Sequence[RolloutGroup],
    learner: Sequence[Sequence[Float[np.ndarray, "_R"]]],
    chosen: Sequence[int],
    decode: Callable[[Sequence[int]], str],
) -> dict[str, Any]:
    """The line of a step. ``learner`` has of each group the log-probabilities of its usable rollouts."""
    return {"step": step, "groups": {groups[i].id: _rollouts(groups[i], learner[i], decode) for i in chosen}}


def distributions(
    groups: Sequence[RolloutGroup], learner: Sequence[Sequence[Float[np.ndarray, "_R"]]], chosen: Sequence[int]
) -> Distributions:
    """What a tracker shows of a batch: values of all usable rollouts, and responses of the chosen groups."""
    usable = [item for group in groups for item in group.usable]
    pairs = zip(usable, itertools.chain.from_iterable(learner), strict=True)
    ratios = [of.astype(np.float64) - item.rollout.logprobs for item, of in pairs]
    histograms = {
        "rollouts/reward": np.array([item.grade.reward for item in usable]),
        "rollouts/response_tokens": np.array([len(item.rollout.token_ids) for item in usable]),
        "learner/token_log_ratio": np.concatenate(ratios),
        "learner/log_ratio": np.array([of_tokens.sum() for of_tokens in ratios]),
    }
    samples = [
        Sample(groups[i].prompt.text, item.text, item.grade.verdict.value, item.grade.reward)
        for i in chosen
        for item in groups[i].usable[:NUM_SAMPLES]
    ]
    return Distributions(histograms, samples)


def read(path: SharedPath, most_lines: int) -> dict[str, GroupLogprobs]:
    """The groups of at most ``most_lines`` + 1 windows, by id: lines at equal distances, and the newest.

    Raises:
        ValueError: a line that is needed is damaged.
    """
    kept, every, newest = list[dict[str, Any]](), 1, None
    for i, newest in enumerate(json_lines.stream(path)):
        if i % every == 0:
            kept.append(newest)
        if len(kept) > most_lines:
            kept, every = kept[::2], 2 * every
    if newest is not None and kept[-1] is not newest:
        kept.append(newest)
    return {name: group for found in kept for name, group in _groups(found, str(path)).items()}


def token_texts(ids: Sequence[int] | Int[np.ndarray, "_R"], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text of each token. Where several tokens make up a character, the last of them has it and the others ''."""
    texts, begun = list[str](), list[int]()
    for i in ids:
        begun.append(int(i))
        texts.append(decode(begun))
        if texts[-1].endswith(_REPLACEMENT) and len(begun) < _MOST_BYTES_OF_CHARACTER and len(texts) < len(ids):
            texts[-1] = ""
        else:
            begun.clear()
    return texts


def _rollouts(
    group: RolloutGroup, learner: Sequence[Float[np.ndarray, "_R"]], decode: Callable[[Sequence[int]], str]
) -> list[dict[str, Any] | None]:
    of_usable, found = iter(learner), list[dict[str, Any] | None]()
    for item in group.rollouts:
        if not item.is_usable:
            found.append(None)
            continue
        both = {"learner": next(of_usable), "sampler": item.rollout.logprobs}
        numbers = {name: [round(float(x), _DECIMALS) for x in of[:MOST_TOKENS]] for name, of in both.items()}
        found.append({"tokens": token_texts(item.rollout.token_ids[:MOST_TOKENS], decode), **numbers})
    return found


def _groups(found: dict[str, Any], where: str) -> dict[str, GroupLogprobs]:
    """The groups of a line that others may have written."""
    step = found["step"]
    try:
        return {
            str(name): GroupLogprobs(step, [None if item is None else _parse(item) for item in rollouts])
            for name, rollouts in found["groups"].items()
        }
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: step {step}: is damaged ({type(error).__name__}: {error!s:.80})") from None


def _parse(item: dict[str, Any]) -> TokenLogprobs:
    parsed = TokenLogprobs(
        [str(text) for text in item["tokens"]],
        [float(x) for x in item["learner"]],
        [float(x) for x in item["sampler"]],
    )
    if len({len(column) for column in parsed}) != 1 or not all(map(math.isfinite, parsed.learner + parsed.sampler)):
        raise ValueError("tokens, learner and sampler differ in length, or a number is not finite")
    return parsed

"""What a group must be to be trained on: the one check of what samplers, other programs and files hand in.

``import_rollouts`` calls the functions for a row. ``GroupCheck`` is for whole groups: the follower of the rollout log
makes one for the samplers of its run, ``audit`` for the groups that a run has trained on.
"""

import contextlib
import enum
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from oapl_jax.config.commands import TrainConfig
from oapl_jax.rollouts.buffer import Window
from oapl_jax.rollouts.grading import Advantages
from oapl_jax.rollouts.log import BatchRecord, RolloutLog, digest
from oapl_jax.rollouts.stops import Stops
from oapl_jax.types import FinishReason, GradedRollout, Prompt, Rollout, RolloutGroup, Verdict
from oapl_jax.untrusted import reading
from oapl_jax.untrusted.parquet import Limits

HIGHEST_LOGPROB, LOWEST_LOGPROB = 1e-4, -1e4
"""Nats. Rounding may lift a certain token above 0; no sampler draws a token below minus some hundreds."""
MOST_REWARD = 1e9
"""The square of a larger one leaves float32."""
ADVANTAGE_TOLERANCE = 1e-5
"""Of value and advantage, relative to the rewards: another program may compute in float32."""
ANY_TOKEN = 2**31
"""Size of a vocabulary that is not known."""
CHARACTER_BYTES, TOKEN_BYTES, ROW_BYTES = 4, 256, 2**16
"""Bytes that a character takes at most, a token with its text and log-probability, and the other cells of a row."""
MOST_AHEAD = 10_000
"""Shards that samplers may have claimed beyond those that are written."""


class BadRowError(ValueError):
    """What cannot be used: a reason of a few words, and what is wrong. All checks here raise it."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@contextlib.contextmanager
def _within(place: str) -> Iterator[None]:
    """Puts a place before what is wrong."""
    try:
        yield
    except BadRowError as error:
        raise BadRowError(error.reason, f"{place}{error}") from None


def token_ids(name: str, given: Any, vocab_size: int) -> Int[np.ndarray, "_T"]:
    """The token ids of a cell, of which there must be some, all of the vocabulary."""
    ids = np.asarray(given)
    if len(ids) == 0:
        raise BadRowError("empty prompt" if "prompt" in name else "empty response", f"{name} is empty")
    if not np.issubdtype(ids.dtype, np.integer):  # a null among integers makes them floats
        raise BadRowError("missing value", f"{name} has a null in it")
    if ids.min() < 0 or ids.max() >= vocab_size:
        worst = int(ids.max() if ids.max() >= vocab_size else ids.min())
        raise BadRowError("unknown token", f"{name} has {worst}; the vocabulary has ids 0 to {vocab_size - 1}")
    return ids.astype(np.int32, copy=False)


def logprobs(given: Any, length: int) -> Float[np.ndarray, "_T"]:
    """The log-probabilities of a response of ``length`` tokens."""
    with np.errstate(over="ignore"):
        found, problem = np.asarray(given, np.float32), None
    if len(found) != length:
        problem = f"{len(found)} log-probabilities for {length} tokens"
    elif not np.isfinite(found).all():
        problem = "a log-probability is not finite"
    elif found.max() > HIGHEST_LOGPROB:
        problem = f"a log-probability is {found.max():g}, above 0"
    elif found.min() < LOWEST_LOGPROB:
        problem = f"a log-probability is {found.min():g}, below {LOWEST_LOGPROB:g}, which no sampler draws"
    if problem is not None:
        raise BadRowError("bad log-probabilities", problem)
    return found


def reward(given: Any, bounds: tuple[float, float] | None) -> float:
    """The reward of a response with a verdict, within ``bounds`` (``offline.reward_range``)."""
    if given is None or not abs(given) <= MOST_REWARD:
        raise BadRowError("no reward", f"its reward is {given}")
    if bounds is not None and not bounds[0] <= given <= bounds[1]:
        problem = f"its reward {given} is outside offline.reward_range [{bounds[0]:g}, {bounds[1]:g}]"
        raise BadRowError("reward out of range", problem)
    return float(given)


def end(rollout: Rollout, stops: Stops | None) -> None:
    """The end of a response, which must be where the stops say; None: they are not known."""
    if stops is not None and (problem := stops.problem(rollout)) is not None:
        raise BadRowError("bad end", f"{problem}; see sampler.stop_strings and sampler.stop_token_ids")


def extra(given: Any) -> str:
    """The JSON object of the column ``extra``."""
    try:
        reading.parse_object(given, "extra")
    except (ValueError, TypeError):
        raise BadRowError("unreadable extra", f"extra is {given!r:.80}, no JSON object") from None
    return given


def one_of(kind: type[enum.StrEnum], name: str, value: Any) -> Any:
    """The member of an enumeration."""
    try:
        return kind(value)
    except ValueError:
        raise BadRowError("unknown word", f"{name} is {value!r:.80}, not one of {', '.join(list(kind))}") from None


class GroupCheck(NamedTuple):
    """What the groups of a run have to be."""

    config: TrainConfig
    stops: Stops | None
    """None: the tokenizer is not known, and neither are its ids and stops."""
    advantages: Advantages
    record: BatchRecord | None = None
    """What was trained on before a restart."""
    is_imported: bool = False
    """Whether the groups come from outside: of any size up to the run's, with any rewards."""

    @property
    def _is_free(self) -> bool:
        return self.is_imported or self.config.offline is not None

    def check(self, group: RolloutGroup, prompt: Prompt | None = None) -> None:
        """Checks one group, made of ``prompt``; the error names group and rollout."""
        with _within(f"group {group.id}"):
            self._check_group(group, prompt)

    def _check_group(self, group: RolloutGroup, prompt: Prompt | None) -> None:
        config, own = self.config, group.prompt
        size, whole = len(group.rollouts), config.sampler.group_size
        if size != whole and not (self._is_free and size < whole):
            raise BadRowError("group size", f": has {size} rollouts of {whole}")
        if prompt is not None and not (
            np.array_equal(own.token_ids, prompt.token_ids)
            and (own.id, own.text, own.answer) == (prompt.id, prompt.text, prompt.answer)
        ):
            raise BadRowError("another prompt", f": its prompt {own.id!r:.80} is not the run's {prompt.id!r:.80} there")
        for index, item in enumerate(group.rollouts):
            with _within(f", rollout {index}: "):
                self._check_rollout(own, item)
        advantages, value = self.advantages(own.id, group.rollouts)
        scale = max(1.0, *(abs(item.grade.reward) for item in group.rollouts))
        own_advantages = [item.advantage for item in group.rollouts]
        for name, given, right in (("value", [group.value], [value]), ("advantages", own_advantages, advantages)):
            if not np.allclose(given, right, rtol=0, atol=ADVANTAGE_TOLERANCE * scale, equal_nan=True):
                raise BadRowError("wrong advantage", f": its {name} {given!s:.80}; the rewards give {right!s:.80}")
        if self.record is not None and self.record.digest(group.id) not in (None, digest(group)):
            raise BadRowError("replaced group", ": is not the one that batches.jsonl has in a batch")

    def _check_rollout(self, prompt: Prompt, item: GradedRollout) -> None:
        config, rollout, grade = self.config, item.rollout, item.grade
        prompt_limit, limit = config.data.max_prompt_tokens, config.sampler.max_response_tokens
        if len(prompt.token_ids) > prompt_limit or len(rollout.token_ids) > limit:
            sizes = f"{len(prompt.token_ids)} prompt and {len(rollout.token_ids)} response tokens"
            raise BadRowError("too long", f"{sizes}; the run has at most {prompt_limit} and {limit}")
        vocab_size = ANY_TOKEN if self.stops is None else self.stops.vocab_size
        token_ids("prompt_token_ids", prompt.token_ids, vocab_size)
        token_ids("token_ids", rollout.token_ids, vocab_size)
        end(rollout, self.stops)
        if rollout.finish_reason is FinishReason.LENGTH and len(rollout.token_ids) < limit and not self._is_free:
            raise BadRowError("bad end", f"was cut at {len(rollout.token_ids)} tokens; the run cuts at {limit}")
        extra(item.extra)
        if item.is_usable:
            logprobs(rollout.logprobs, len(rollout.token_ids))
        if grade.verdict is not Verdict.INVALID:
            reward(grade.reward, None)
        elif not math.isnan(grade.reward):
            raise BadRowError("reward of an invalid verdict", f"its verdict is invalid, and its reward {grade.reward}")
        of_correct = None if self._is_free else _reward_of_correct(config, prompt)
        right = of_correct if grade.verdict is Verdict.CORRECT else 0.0
        if of_correct is not None and grade.verdict is not Verdict.INVALID and grade.reward != right:
            problem = f"its verdict is {grade.verdict}, its reward {grade.reward} and not {right}"
            raise BadRowError("wrong reward", problem)


def _reward_of_correct(config: TrainConfig, prompt: Prompt) -> float | None:
    """Reward of a correct response, where a wrong one has 0; None: rewards may be anything."""
    graded = config.data.graded(config.reward)
    data_set = prompt.id.partition("/")[0] if config.data.sets else ""
    if data_set not in graded:
        raise BadRowError("another prompt", f"its prompt {prompt.id!r:.80} is of no data set of the run")
    source, reward = graded[data_set]
    if source.task is not None:
        return 1.0
    (name, weight), *others = reward.functions.items()
    is_plain = not others and reward.format_pattern is None and reward.length_penalty == 0
    is_plain = is_plain and (name == "math" or (name == "code" and reward.code_reward == "all"))
    return weight if is_plain else None


class ShardCheck(NamedTuple):
    """Reads the shards that samplers write (``shards.py``), and lets nothing pass that the run did not ask for."""

    groups: GroupCheck
    prompts: Any
    """The run's prompt by its place in the stream: ``prompts[position]``."""

    def read(self, log: RolloutLog, window: Window, part: int) -> list[RolloutGroup]:
        """The groups of a shard of a window.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it cannot be read, or is not what was to be sampled; names the file.
        """
        version, path = window.policy_version, log.path(window.policy_version, part)
        size = self.groups.config.window.shard_groups
        if part > len(log.parts(version)) + MOST_AHEAD:
            raise ValueError(f"{path}: is no shard that a sampler can have claimed")
        indices = range(part * size, (part + 1) * size)
        prompts = [self.prompts[window.position(index)] for index in indices]
        groups = log.read_part(version, part, self._limits(prompts))
        if (found := sorted(group.index for group in groups)) != list(indices):
            shard = f"{indices.start} to {indices.stop - 1}"
            raise ValueError(f"{path}: has the groups {found!s:.80}; the shard is {shard}")
        for group, prompt in zip(sorted(groups, key=lambda group: group.index), prompts, strict=True):
            with _within(f"{path}: "):
                self.groups.check(group, prompt)
        return groups

    def _limits(self, prompts: Iterable[Prompt]) -> Limits:
        """A shard's rows, and far more bytes than they can have."""
        sampler, num_bytes = self.groups.config.sampler, 0
        for prompt in prompts:
            texts = len(prompt.id) + len(prompt.text) + len(prompt.answer)
            num_tokens = len(prompt.token_ids) + sampler.max_response_tokens
            num_bytes += CHARACTER_BYTES * texts + TOKEN_BYTES * num_tokens + ROW_BYTES
        return Limits(sampler.group_size * self.groups.config.window.shard_groups, sampler.group_size * num_bytes)

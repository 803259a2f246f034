"""The state of requests that are under way: their groups and their sequences."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Int

from oapl_jax.rollouts.sampling import Request
from oapl_jax.rollouts.stops import stop_length
from oapl_jax.sampler.engine import Decoded
from oapl_jax.types import FinishReason, Rollout

Tag = TypeVar("Tag")


@dataclasses.dataclass(eq=False)
class LiveGroup(Generic[Tag]):
    """A request some of whose rollouts have not ended."""

    request: Request[Tag]
    block: int
    """Groups of an earlier block start before it."""
    finished: dict[int, Rollout] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(eq=False)
class LiveSequence(Generic[Tag]):
    """One rollout that has not ended."""

    group: LiveGroup[Tag]
    index: int
    limit: int
    tokens: list[np.ndarray] = dataclasses.field(default_factory=list)
    logprobs: list[np.ndarray] = dataclasses.field(default_factory=list)
    num_tokens: int = 0
    slot: int | None = None
    """None: it waits for pages and a prefill."""
    pages: list[int] = dataclasses.field(default_factory=list)
    num_unread: int = 0
    """Chunks that decode it and have not been read."""
    started: int = -1
    """Order in which it began to decode; -1: it has a slot and has not yet."""
    has_ended: bool = False
    is_stopped: bool = False
    """A stop string has ended it."""

    @property
    def prompt_length(self) -> int:
        """P."""
        return len(self.group.request.prompt_token_ids)

    @property
    def next_write(self) -> int:
        """Position of the last token known, which the next step writes to the cache."""
        return self.prompt_length + max(self.num_tokens, 1) - 1

    @property
    def end(self) -> int:
        """First position beyond the limit."""
        return self.prompt_length + self.limit

    def prefix(self) -> Int[np.ndarray, "_P"]:
        """What has to be in the cache before it can go on: all but the last token."""
        return np.concatenate([self.group.request.prompt_token_ids, *self.tokens])[: self.next_write]

    def take(self, decoded: Decoded, row: int, decode: Callable[[list[int]], str] | None) -> bool:
        """Appends what a chunk has decoded in one of its rows, to the end of a stop string; whether that is the end."""
        is_valid, is_done = decoded.is_valid[row], bool(decoded.is_done[row])
        tokens, logprobs = decoded.tokens[row, is_valid], decoded.logprobs[row, is_valid]
        if strings := self.group.request.distribution.stop_strings:
            assert decode is not None
            length = stop_length(np.concatenate([*self.tokens, tokens]).tolist(), self.num_tokens, strings, decode)
            if length is not None:
                count = length - self.num_tokens
                tokens, logprobs, is_done, self.is_stopped = tokens[:count], logprobs[:count], True, True
        self.tokens.append(tokens)
        self.logprobs.append(logprobs)
        self.num_tokens += len(tokens)
        return is_done

    def rollout(self, stop_ids: Collection[int]) -> Rollout:
        """What it is when it has ended."""
        token_ids = np.concatenate(self.tokens).astype(np.int32)
        reason = FinishReason.STOP if self.is_stopped or token_ids[-1] in stop_ids else FinishReason.LENGTH
        return Rollout(token_ids, np.concatenate(self.logprobs), reason)

"""Continuous batching: which rollouts occupy which rows of an engine, and when they leave.

A group is admitted when enough rows are free; each row is freed as soon as its own rollout ends,
and a group is handed out the moment its last rollout ends.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

import jax
import numpy as np
from jaxtyping import Int

from oapl_jax.sampler.engine import Engine, Params
from oapl_jax.types import FinishReason, Rollout

Tag = TypeVar("Tag")


@dataclasses.dataclass(frozen=True)
class Request(Generic[Tag]):
    """G rollouts of one prompt."""

    tag: Tag
    """Whatever the caller knows the group by; comes back with its rollouts."""
    prompt_token_ids: Int[np.ndarray, "P"]
    num_rollouts: int
    seed: tuple[int, int, int]
    """Root seed, stream, index in it; see ``Engine.insert_rows``."""


@dataclasses.dataclass
class _LiveGroup(Generic[Tag]):
    request: Request[Tag]
    finished: dict[int, Rollout]


@dataclasses.dataclass
class _LiveRow(Generic[Tag]):
    group: _LiveGroup[Tag]
    rollout_index: int
    tokens: list[np.ndarray]
    logprobs: list[np.ndarray]


class Scheduler(Generic[Tag]):
    """Runs requests on an engine; owns the decode state. For one thread.

    Args:
        engine: the programs.
        device_lock: held while a program runs, where trainer and sampler share devices of a mesh:
            two programs with collectives, enqueued in different orders on different devices, would
            wait for each other for ever. ``contextlib.nullcontext()`` where that cannot happen.
    """

    def __init__(self, engine: Engine, device_lock: AbstractContextManager):
        self._engine, self._device_lock = engine, device_lock
        with self._device_lock:
            self._state = engine.init_decode_state()
        self._free = list(range(engine.num_rows))
        self._live: dict[int, _LiveRow[Tag]] = {}
        self.num_tokens = 0
        """Tokens drawn since the scheduler was made."""

    @property
    def is_idle(self) -> bool:
        """No rollout is in flight."""
        return not self._live

    def has_room(self, num_rollouts: int) -> bool:
        """Whether a group of this size can be admitted now."""
        return len(self._free) >= num_rollouts

    def admit(self, params: Params, request: Request[Tag]) -> None:
        """Prefills the prompt once and starts its rollouts.

        Raises:
            ValueError: for an empty or overlong prompt, or more rollouts than there are free rows.
        """
        if not 0 < request.num_rollouts <= len(self._free):
            raise ValueError(
                f"{request.num_rollouts} rollouts asked for, {len(self._free)} of {self._engine.num_rows} rows are free"
            )
        length = len(request.prompt_token_ids)
        padded = np.zeros(self._engine.padded_length(length), np.int32)
        padded[:length] = request.prompt_token_ids[: len(padded)]
        with self._device_lock:
            prefix = self._engine.prefill(params=params, padded_tokens=padded, true_length=length)
            rows = [self._free.pop() for _ in range(request.num_rollouts)]
            self._state = self._engine.insert_rows(
                prefix, self._state, np.array(rows), np.array(request.seed, np.uint32)
            )
            self._finish_on_device()
        group = _LiveGroup(request, {})
        for index, row in enumerate(rows):
            self._live[row] = _LiveRow(group, index, [], [])

    def step(self, params: Params) -> list[tuple[Tag, list[Rollout]]]:
        """Decodes one chunk; returns the groups that it finished."""
        with self._device_lock:
            self._state, decoded = self._engine.generate(params, self._state)
            tokens, logprobs, is_valid, is_done = jax.device_get(decoded)
            self._finish_on_device()
        self.num_tokens += int(is_valid.sum())
        finished = []
        for row, live in list(self._live.items()):
            live.tokens.append(tokens[row, is_valid[row]])
            live.logprobs.append(logprobs[row, is_valid[row]])
            if is_done[row] and self._free_row(row, live):
                rollouts = live.group.finished
                finished.append((live.group.request.tag, [rollouts[i] for i in range(len(rollouts))]))
        return finished

    def run(self, params: Params, requests: Iterable[Request[Tag]]) -> Iterator[tuple[Tag, list[Rollout]]]:
        """Runs all requests, yielding each as it ends; for evaluation and generation."""
        waiting = iter(requests)
        request = next(waiting, None)
        while request is not None or not self.is_idle:
            while request is not None and (self.has_room(request.num_rollouts) or self.is_idle):
                self.admit(params, request)
                request = next(waiting, None)
            yield from self.step(params)

    def abort(self) -> None:
        """Drops all rollouts in flight."""
        self._live.clear()
        self._free = list(range(self._engine.num_rows))
        with self._device_lock:
            self._state = self._engine.free(self._state)
            self._finish_on_device()

    def _free_row(self, row: int, live: _LiveRow[Tag]) -> bool:
        """Ends a row's rollout; True when it was the last of its group."""
        del self._live[row]
        self._free.append(row)
        token_ids = np.concatenate(live.tokens).astype(np.int32)
        reason = FinishReason.STOP if token_ids[-1] in self._engine.stop_ids else FinishReason.LENGTH
        live.group.finished[live.rollout_index] = Rollout(token_ids, np.concatenate(live.logprobs), reason)
        return len(live.group.finished) == live.group.request.num_rollouts

    def _finish_on_device(self) -> None:
        """Where devices are shared the program must have ended, not only been enqueued, when the lock is left."""
        if not isinstance(self._device_lock, contextlib.nullcontext):
            jax.block_until_ready(self._state)

"""Continuous batching for groups: which sequences are decoded, in which slots and pages, and when they leave.

A prompt is prefilled once for all its rollouts; they share its full pages, and each has its own copy of the last,
partial one. A rollout that ends frees its row for the next sequence, of whatever group. Sequences that are expected to
be long start first, because what starts last alone decides when all are done. When the pages run out, the sequence
that started last gives its pages up and waits; later its prompt and its tokens so far are prefilled again, and it goes
on where it was.

What a rollout says depends on its seed only, not on anything that is decided here.
"""

import bisect
import collections
import contextlib
import itertools
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

import jax
import numpy as np

from oapl_jax.rollouts.sampling import Request, SamplingDistribution, Stats
from oapl_jax.sampler.engine import Engine, Params, Prepared, Start
from oapl_jax.sampler.page_pool import PagePool
from oapl_jax.sampler.sequence import LiveGroup, LiveSequence
from oapl_jax.types import Rollout

Tag = TypeVar("Tag")

QUEUE = 4
"""The longest-first order is kept within blocks of this many times as many rollouts as there are rows, so that no
request waits for ever."""


class Scheduler(Generic[Tag]):
    """Runs requests on one replica of the policy; owns the decode state. For one thread.

    The programs have fixed shapes: prompts are prefilled one by one, and every chunk has all rows. Then not even the
    last bits of a log-probability depend on what else is decoded, unless the pages run out. The price is idle rows.

    ``device_lock`` is held while a program is enqueued, and on a CPU until it has ended, where trainer and sampler share
    devices of a mesh: two programs with collectives, enqueued in different orders on different devices, would wait for
    each other for ever. With ``chunks_ahead=1`` the next chunk is enqueued before the results of the last are read, so
    that the device never waits for the host; the default is 0 on a CPU, where the host is the device. Stop strings need
    ``decode``.
    """

    def __init__(
        self,
        engine: Engine,
        device_lock: AbstractContextManager,
        *,
        chunks_ahead: int | None = None,
        decode: Callable[[list[int]], str] | None = None,
    ):
        self._engine, self._device_lock, self._decode = engine, device_lock, decode
        self._is_cpu = engine.mesh.devices.flat[0].platform == "cpu"
        self._chunks_ahead = (0 if self._is_cpu else 1) if chunks_ahead is None else chunks_ahead
        with self._device_lock:
            self._state = engine.init_decode_state()
        self._pool = PagePool(engine.num_pages)
        self._free_slots = list(range(engine.num_slots - 1, -1, -1))
        self._waiting: list[list[LiveSequence[Tag]]] = []
        """Sequences without a slot, those that begin with the same tokens together, in the order of starting."""
        self._live: list[LiveSequence[Tag]] = []
        """Sequences with a slot."""
        self._chunks: collections.deque[tuple[list[LiveSequence[Tag]], jax.Array]] = collections.deque()
        """Calls of ``generate`` under way: their sequences, and what they return for ``Engine.unpack``."""
        self._starts = itertools.count()
        self._num_submitted = 0
        self._policy = Prepared(None, None, None)
        self._idle_since: float | None = None
        self.stats = Stats()

    @property
    def is_idle(self) -> bool:
        """No rollout is in flight or waits."""
        return not self._live and not self._waiting

    @property
    def wants_more(self) -> bool:
        """Fewer rollouts wait than there are rows: enough to choose the longest from."""
        return self.num_unfinished - self.num_live < self._engine.num_rows

    @property
    def num_live(self) -> int:
        """Rollouts that have a slot."""
        return len(self._live)

    @property
    def num_unfinished(self) -> int:
        """Rollouts that have not ended."""
        return len(self._live) + sum(map(len, self._waiting))

    def submit(self, request: Request[Tag]) -> None:
        """Puts a request in the queue.

        Raises:
            ValueError: it cannot be run on this engine; names the request and what is wrong.
        """
        limits = self._check(request)
        group = LiveGroup(request, self._num_submitted // (QUEUE * self._engine.num_rows))
        self._num_submitted += request.num_rollouts
        self._enqueue([LiveSequence(group, index, limit) for index, limit in enumerate(limits)])

    def step(self, params: Params) -> list[tuple[Tag, list[Rollout]]]:
        """Schedules and runs prefills and a chunk, reads what has run; returns the groups that are finished."""
        policy = self._prepare(params)
        self._start_waiting(policy)
        sequences, finished = self._schedule_chunk()
        if sequences:
            self._run_chunk(policy, sequences)
        while len(self._chunks) > (self._chunks_ahead if sequences else 0):
            finished += self._postprocess()
        return finished

    def abort(self) -> None:
        """Drops all requests and frees what they hold."""
        for sequence in list(self._live):
            sequence.has_ended = True
            self._release(sequence)
        self._waiting.clear()

    def warm_up(
        self,
        params: Params,
        prompt_lengths: Iterable[int],
        group_size: int,
        say: Callable[[str], None] = lambda message: None,
    ) -> None:
        """Compiles the programs that requests of these sizes need, by running them on nothing; says which."""
        engine, policy = self._engine, self._prepare(params)
        prompts = sorted(set(map(engine.padded_length, prompt_lengths)))
        tables = sorted({engine.padded_pages(n + 1) for n in range(engine.max_pages)})
        count = f"of {len(prompts) + len(tables)}"
        with self._device_lock:
            for number, padded in enumerate(prompts, 1):
                say(f"compiling sampler program {number} {count}: prompts of up to {padded} tokens")
                prefix = engine.prefill(policy, np.zeros(min(padded, engine.max_prompt_tokens), np.int32))
                start = self._empty_start(padded, group_size, SamplingDistribution())
                self._state = engine.insert(prefix, self._state, start)
            slots = np.full(engine.num_rows, engine.num_slots)
            for number, num_pages in enumerate(tables, len(prompts) + 1):
                say(
                    f"compiling sampler program {number} {count}: decoding at up to {num_pages * engine.page_size} tokens"
                )
                table = np.zeros((engine.num_rows, num_pages), np.int32)
                self._state, _ = engine.generate(policy, self._state, slots, table)
            jax.block_until_ready(self._state)

    def _check(self, request: Request[Tag]) -> list[int]:
        """The limit of each rollout."""
        engine, name = self._engine, f"request {request.tag!r}"
        if request.num_rollouts < 1:
            raise ValueError(f"{name}: {request.num_rollouts} rollouts asked for; at least 1")
        if not 0 < len(request.prompt_token_ids) <= engine.max_prompt_tokens:
            raise ValueError(
                f"{name}: prompt of {len(request.prompt_token_ids)} tokens; the limit is 1 to {engine.max_prompt_tokens}"
            )
        limits = engine.max_response_tokens if request.max_tokens is None else request.max_tokens
        limits = [limits] * request.num_rollouts if isinstance(limits, int) else list(limits)
        if len(limits) != request.num_rollouts or not all(0 < n <= engine.max_response_tokens for n in limits):
            raise ValueError(
                f"{name}: max_tokens={request.max_tokens}; one number for each of {request.num_rollouts} rollouts or for"
                f" all, from 1 to {engine.max_response_tokens}"
            )
        if request.needs_logprobs and request.distribution.temperature == 0:
            raise ValueError(
                f"{name}: temperature=0 has no log-probabilities to learn from; set needs_logprobs=False, or a"
                " temperature above 0"
            )
        if request.distribution.truncates and not engine.can_truncate:
            raise ValueError(f"{name}: {request.distribution} on an engine that was made with can_truncate=False")
        if request.distribution.stop_strings and self._decode is None:
            raise ValueError(f"{name}: {request.distribution} needs a scheduler that was given `decode`")
        if not set(request.distribution.stop_token_ids) <= set(engine.stop_ids):
            raise ValueError(
                f"{name}: {request.distribution} on an engine that was made with stop_ids={engine.stop_ids}"
            )
        return limits

    def _enqueue(self, sequences: list[LiveSequence[Tag]]) -> None:
        """Preempted ones (in the order of their first start) before new ones (of a block the longest first)."""

        def order(entry: list[LiveSequence[Tag]]) -> tuple[float, ...]:
            request = entry[0].group.request
            expected = max(sequence.limit for sequence in entry)
            if request.expected_tokens is not None:
                expected = min(expected, request.expected_tokens)
            is_new = entry[0].started < 0
            return (1, entry[0].group.block, -expected) if is_new else (0, entry[0].started)

        bisect.insort_right(self._waiting, sequences, key=order)

    def _prepare(self, params: Params) -> Prepared:
        """Prepares each policy version once; the one before is released first."""
        if params is not self._policy.params:
            self._policy = Prepared(None, None, None)
            with self._device_lock:
                self._policy = self._engine.prepare(params)
                self._finish_on_device(self._policy)
        return self._policy

    def _start_waiting(self, policy: Prepared) -> None:
        """Prefills what waits, while there are slots and pages, and rows that nothing with a slot could fill."""
        engine = self._engine
        while self._waiting and self._free_slots:
            if sum(not self._surely_ends(sequence) for sequence in self._live) >= engine.num_rows:
                return
            entry = self._waiting[0]
            prefix, num_full = entry[0].prefix(), entry[0].prompt_length // engine.page_size
            # Full pages of the prompt that another rollout of the group holds.
            shared = next((other.pages[:num_full] for other in self._live if other.group is entry[0].group), [])
            if not (started := self._take_pages(entry, len(prefix), shared)):
                return
            del entry[: len(started)]
            if not entry:
                del self._waiting[0]
            self._run_prefill(policy, prefix, started, len(shared))

    def _take_pages(self, entry: list[LiveSequence[Tag]], length: int, shared: list[int]) -> list[LiveSequence[Tag]]:
        """Gives pages and slots to as many of the sequences as there are pages for.

        Every live sequence may need another page in the next chunk; unless there are none, those are left free.
        """
        num_full, num_tail = length // self._engine.page_size, int(length % self._engine.page_size > 0)
        num_new = num_full - len(shared)
        room = self._pool.num_free - num_new - len(self._live)
        count = min(len(entry), room // (num_tail + 1), len(self._free_slots))
        if count < 1:
            if self._live or self._chunks:
                return []
            count = 1  # the engine has pages for one sequence of full length
        full = self._pool.share(shared) + self._pool.take(num_new)
        for i, sequence in enumerate(entry[:count]):
            sequence.pages = (full if i == 0 else self._pool.share(full)) + self._pool.take(num_tail)
            sequence.slot = self._free_slots.pop()
            self._live.append(sequence)
        return entry[:count]

    def _run_prefill(
        self, policy: Prepared, prefix: np.ndarray, sequences: list[LiveSequence[Tag]], num_shared: int
    ) -> None:
        """Prefills tokens and starts the sequences that go on from there, which share the first pages with others."""
        engine, request = self._engine, sequences[0].group.request
        num_full = len(prefix) // engine.page_size
        # The rest of a group, which waited for slots, runs the program of the whole group.
        num_sequences = max(len(sequences), min(request.num_rollouts, engine.num_slots))
        start = self._empty_start(engine.padded_length(len(prefix)), num_sequences, request.distribution)
        start.full_pages[num_shared:num_full] = sequences[0].pages[num_shared:num_full]
        for i, sequence in enumerate(sequences):
            start.slots[i], start.ends[i] = sequence.slot, sequence.end
            start.seeds[i] = (*request.seed, sequence.index)
            start.given[i] = sequence.tokens[-1][-1] if sequence.num_tokens else -1
            if len(prefix) % engine.page_size:
                start.tail_pages[i] = sequence.pages[-1]
        self._count_gap()
        with self._device_lock:
            self._state = engine.insert(engine.prefill(policy, prefix), self._state, start)
            self._finish_on_device(self._state)
        self.stats.prefill_tokens += len(prefix)

    def _empty_start(self, padded_length: int, num_sequences: int, distribution: SamplingDistribution) -> Start:
        engine = self._engine
        rows = 1 << (num_sequences - 1).bit_length()
        return Start(
            slots=np.full(rows, engine.num_slots, np.int32),
            seeds=np.zeros((rows, 4), np.uint32),
            ends=np.zeros(rows, np.int32),
            given=np.full(rows, -1, np.int32),
            distribution=engine.distributions([distribution] * rows),
            full_pages=np.full(padded_length // engine.page_size, engine.num_pages, np.int32),
            tail_pages=np.full(rows, engine.num_pages, np.int32),
        )

    def _schedule_chunk(self) -> tuple[list[LiveSequence[Tag]], list[tuple[Tag, list[Rollout]]]]:
        """The sequences of the next chunk, with pages for what it may write, and groups that were finished meanwhile.

        Where pages are short it reads the chunks in flight, and then preempts.
        """
        finished: list[tuple[Tag, list[Rollout]]] = []
        sequences = [s for s in self._live if s.started >= 0 and not self._surely_ends(s)]
        parked = [s for s in self._live if s.started < 0]
        for sequence in parked[: self._engine.num_rows - len(sequences)]:
            sequence.started = next(self._starts)
            sequences.append(sequence)
        sequences.sort(key=lambda sequence: sequence.started)
        for sequence in list(sequences):
            # A sequence without a slot was preempted for an older one, or has ended.
            while sequence.slot is not None and self._pages_missing(sequence) > self._pool.num_free:
                if self._chunks:
                    finished += self._postprocess()  # what has ended frees pages, and none in flight may be preempted
                else:
                    preempted = max(self._live, key=lambda s: (s.started < 0, s.started))
                    self._release(preempted)
                    self._enqueue([preempted])
                    self.stats.preemptions += 1
            if sequence.slot is not None:
                sequence.pages += self._pool.take(max(self._pages_missing(sequence), 0))
        return [s for s in sequences if s.slot is not None and not self._surely_ends(s)], finished

    def _pages_missing(self, sequence: LiveSequence[Tag]) -> int:
        """For every position that the next chunk may write; the last token of a response is not written."""
        last = sequence.next_write + (sequence.num_unread + 1) * self._engine.decode_steps
        return self._engine.pages_of(min(last, sequence.end - 1)) - len(sequence.pages)

    def _run_chunk(self, policy: Prepared, sequences: list[LiveSequence[Tag]]) -> None:
        """Enqueues a chunk of decode steps."""
        engine = self._engine
        num_pages = engine.padded_pages(max(len(sequence.pages) for sequence in sequences))
        slots = np.full(engine.num_rows, engine.num_slots, np.int32)
        table = np.zeros((engine.num_rows, num_pages), np.int32)
        for i, sequence in enumerate(sequences):
            slots[i] = sequence.slot or 0
            table[i, : len(sequence.pages)] = sequence.pages
            sequence.num_unread += 1
        self._count_gap()
        with self._device_lock:
            self._state, packed = engine.generate(policy, self._state, slots, table)
            packed.copy_to_host_async()
            self._finish_on_device(self._state)
        self._chunks.append((sequences, packed))

    def _postprocess(self) -> list[tuple[Tag, list[Rollout]]]:
        """Reads the oldest chunk and frees what has ended; returns the groups that it finished."""
        sequences, packed = self._chunks.popleft()
        decoded = self._engine.unpack(np.asarray(packed))
        self.stats.row_steps += self._engine.num_rows * decoded.num_steps
        self._idle_since = time.perf_counter() if not self._chunks and self._live else None
        finished = []
        for row, sequence in enumerate(sequences):
            sequence.num_unread -= 1
            if sequence.has_ended:
                continue
            num_before = sequence.num_tokens
            sequence.has_ended = sequence.take(decoded, row, self._decode)
            self.stats.live_row_steps += int(decoded.is_valid[row, 1:].sum())
            self.stats.tokens += sequence.num_tokens - num_before
            if sequence.has_ended:
                self._release(sequence)
                request, rollouts = sequence.group.request, sequence.group.finished
                rollouts[sequence.index] = sequence.rollout(self._engine.stop_ids)
                if len(rollouts) == request.num_rollouts:
                    finished.append((request.tag, [rollouts[i] for i in range(len(rollouts))]))
        return finished

    def _release(self, sequence: LiveSequence[Tag]) -> None:
        """Takes a sequence off its slot and its pages."""
        self._live.remove(sequence)
        self._free_slots.append(sequence.slot)  # pyright: ignore[reportArgumentType]
        self._pool.release(sequence.pages)
        sequence.slot, sequence.pages = None, []

    def _surely_ends(self, sequence: LiveSequence[Tag]) -> bool:
        """The unread chunks reach its limit, if nothing ended it before."""
        num_steps = sequence.num_unread * self._engine.decode_steps
        return num_steps > 0 and sequence.next_write + num_steps + 1 >= sequence.end

    def _count_gap(self) -> None:
        """Something is enqueued: the device waits no longer."""
        if self._idle_since is not None:
            self.stats.host_gap_seconds += time.perf_counter() - self._idle_since
            self._idle_since = None

    def _finish_on_device(self, result: Any) -> None:
        """On shared CPU devices a program must have ended, not only been enqueued, when the lock is left."""
        if self._is_cpu and not isinstance(self._device_lock, contextlib.nullcontext):
            jax.block_until_ready(result)

"""The sampler's side of a run: prompts -> rollouts -> grades -> rollout log and buffer, in threads.

thread     consumes                      produces                 waits for             is woken by
sampler    tickets, weights of a version finished rollouts        the window to want    open_window, stop
grader     finished rollouts             groups in log + buffer   finished rollouts     sampler, stop
learner    groups in the buffer          weights                  groups of a batch     grader
"""

import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float

from oapl_jax.rewards.grader import Grader
from oapl_jax.rollouts.buffer import GroupBuffer, Ticket, Window
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.sampling import Request, SamplingDistribution, Stats
from oapl_jax.rollouts.shards import ShardQueue
from oapl_jax.sampler.engine import Engine
from oapl_jax.sampler.replicas import Replicas
from oapl_jax.types import Grade, GradedRollout, Metrics, Prompt, Rollout, RolloutGroup, Verdict

POLL_SECONDS = 0.2
STOP_DEADLINE = 60.0
"""Seconds that ``stop`` waits for the chunk and the grades in flight."""

MAX_UNGRADED_GROUPS = 1024
"""Finished groups that may wait for the grader before the sampler waits too."""

DRAIN_SECONDS = 20.0
"""After ``stop``, for how long finished rollouts that still wait are graded and logged."""

MAX_REMEMBERED_PROMPTS = 2**16
"""Prompts whose response length is remembered: toy tasks have no end of them."""

MAX_GRADED_AT_ONCE = 32
"""Groups that are graded and written together: one file for many, yet one slow answer holds up only these."""


@runtime_checkable
class PromptStream(Protocol):
    """An endless, seeded stream of prompts with random access."""

    def __getitem__(self, position: int) -> Prompt: ...


@runtime_checkable
class RequestRunner(Protocol):
    """An engine of any kind that runs requests: ``Replicas``, or a foreign one."""

    stats: Stats

    @property
    def is_idle(self) -> bool:
        """Nothing is in flight or waits."""
        ...

    @property
    def wants_more(self) -> bool:
        """It could use another request."""
        ...

    @property
    def num_live(self) -> int:
        """Rollouts in flight."""
        ...

    def submit(self, request: Request) -> None:
        """Puts a request in the queue."""
        ...

    def step(self, params: Any) -> list[tuple[Any, list[Rollout]]]:
        """Goes on for a while, and returns the requests that have ended."""
        ...

    def abort(self) -> None:
        """Drops all requests."""
        ...

    def warm_up(self, params: Any, prompt_lengths: Iterable[int], group_size: int) -> Any:
        """Compiles what such requests need."""
        ...


class GroupMaker(NamedTuple):
    """What turns rollouts into a graded group: pure but for the grader."""

    decode: Callable[[list[int]], str]
    grader: Grader
    advantages: Callable[[Float[np.ndarray, "G"], Bool[np.ndarray, "G"]], Float[np.ndarray, "G"]]
    """Rewards of a group, and whether each response is correct, to advantages (the objective's)."""
    value: Callable[[Float[np.ndarray, "G"]], float]
    """Rewards of a group to V*(x)."""

    def __call__(self, items: Sequence[tuple[Ticket, Prompt, list[Rollout]]]) -> list[RolloutGroup]:
        """Decodes and grades the rollouts of several groups at once."""
        texts = [[self.decode(rollout.token_ids.tolist()) for rollout in rollouts] for _, _, rollouts in items]
        flat = [
            (prompt, text, rollout.finish_reason)
            for (_, prompt, rollouts), group_texts in zip(items, texts, strict=True)
            for text, rollout in zip(group_texts, rollouts, strict=True)
        ]
        grades = iter(self.grader.grade(flat))
        return [
            self.group(ticket, prompt, rollouts, group_texts, [next(grades) for _ in rollouts])
            for (ticket, prompt, rollouts), group_texts in zip(items, texts, strict=True)
        ]

    def group(
        self,
        ticket: Ticket,
        prompt: Prompt,
        rollouts: Sequence[Rollout],
        texts: Sequence[str],
        grades: Sequence[Grade],
    ) -> RolloutGroup:
        """V* and advantages over the rollouts whose verdict and log-probabilities can be used."""
        is_usable = np.array(
            [
                grade.verdict is not Verdict.INVALID
                and math.isfinite(grade.reward)
                and np.isfinite(rollout.logprobs).all()
                for grade, rollout in zip(grades, rollouts, strict=True)
            ]
        )
        advantages, value = np.full(len(rollouts), np.nan), math.nan
        if is_usable.any():
            rewards = np.array([grade.reward for grade in grades], np.float64)[is_usable]
            is_correct = np.array([grade.verdict is Verdict.CORRECT for grade in grades])[is_usable]
            advantages[is_usable], value = self.advantages(rewards, is_correct), self.value(rewards)
        graded = map(GradedRollout, rollouts, texts, grades, advantages.tolist())
        return RolloutGroup(ticket.index, ticket.policy_version, prompt, tuple(graded), value)


class Worker:
    """Fills the buffer for the current policy version until stopped; owns two threads.

    Args:
        engines: the sampler's programs, for each replica; or a foreign engine.
        prompts: the training prompts.
        make_groups: decodes and grades.
        buffer: says what to sample, takes what is finished.
        log: every finished group is in it before it is in the buffer. In a detached sampler a ``ShardQueue`` is both.
        sampling: the distribution.
        group_size: G.
        seed: root of all draws; group ``i`` of version ``v`` draws from ``(seed, v, i)``.
        device_lock: see ``Scheduler``.
        finish_old: groups in progress when new weights come are finished and logged with the old ones first.
    """

    def __init__(
        self,
        engines: Sequence[Engine] | RequestRunner,
        prompts: PromptStream,
        make_groups: GroupMaker,
        buffer: GroupBuffer | ShardQueue,
        log: RolloutLog | ShardQueue,
        *,
        sampling: SamplingDistribution,
        group_size: int,
        seed: int,
        device_lock: AbstractContextManager,
        finish_old: bool = False,
    ):
        self._finish_old = finish_old
        self._replicas: Any = (
            Replicas(engines, device_lock, fixed_shapes=True) if isinstance(engines, Sequence) else engines
        )
        self._prompts, self._make_groups, self._buffer, self._log = prompts, make_groups, buffer, log
        self._sampling, self._group_size, self._seed = sampling, group_size, seed
        self._mean_tokens: dict[str, float] = {}
        """Mean response length of a prompt when it was last sampled: what to expect of it now; of the newest prompts."""
        self._weights: tuple[int, Any] = (-1, None)
        self._finished: queue.Queue[tuple[Ticket, Prompt, list[Rollout]]] = queue.Queue(MAX_UNGRADED_GROUPS)
        self._stopping = threading.Event()
        self._drain_until = 0.0
        self._threads = [
            threading.Thread(target=self._guard, args=(loop,), name=name, daemon=True)
            for name, loop in (("sampler", self._sample_loop), ("grader", self._grade_loop))
        ]
        self._idle_seconds = 0.0
        self._last_report = (time.perf_counter(), Stats(), 0.0)

    def warm_up(self, params: Any, prompt_lengths: Iterable[int]) -> None:
        """Compiles what sampling prompts of these lengths needs; call before ``start``."""
        self._replicas.warm_up(params, prompt_lengths, self._group_size)

    def start(self) -> None:
        """Starts sampling; weights must have been set."""
        for thread in self._threads:
            thread.start()

    def begin(self, window: Window, params: Any) -> None:
        """The weights of a window; call before the buffer's ``open_window``."""
        self.set_weights(window.policy_version, params)

    def finish(self, policy_version: int) -> None:
        """Nothing: a run that is over stops its worker."""

    def set_weights(self, policy_version: int, params: Any) -> None:
        """Publishes weights, to be taken up at the end of the chunk in flight; call before ``open_window``."""
        self._weights = (policy_version, params)

    def stop(self, drain_seconds: float = DRAIN_SECONDS) -> None:
        """Ends both threads: the sampler's at the end of its chunk, the grader's when what is finished is in the log.

        Groups that were not finished, or not graded within ``drain_seconds``, are dropped; a resumed run samples the
        same ones again.

        Raises:
            TimeoutError: a thread does not end.
        """
        self._drain_until = time.monotonic() + drain_seconds
        self._stopping.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(STOP_DEADLINE)
            if thread.is_alive():
                raise TimeoutError(f"the {thread.name} thread did not end within {STOP_DEADLINE:g} s")

    @property
    def sums(self) -> tuple[int, float]:
        """Tokens drawn and seconds without work, since the start."""
        return self._replicas.stats.tokens, self._idle_seconds

    def report(self) -> Metrics:
        """Metrics since the last report."""
        now, stats, idle = time.perf_counter(), self._replicas.stats, self._idle_seconds
        then, before, idle_then = self._last_report
        self._last_report = (now, stats, idle)
        done = Stats(*[new - old for new, old in zip(astuple(stats), astuple(before), strict=True)])
        seconds = max(now - then, 1e-9)
        return {
            **({"sampler/slot_use": done.slot_use} if done.row_steps else {}),
            "sampler/tokens_per_second": done.tokens / seconds,
            "sampler/prefill_tokens_per_second": done.prefill_tokens / seconds,
            "sampler/live_rollouts": self._replicas.num_live,
            "sampler/preemptions": done.preemptions,
            "sampler/host_gap_seconds": done.host_gap_seconds,
            "sampler/idle_seconds": idle - idle_then,
        }

    def _guard(self, loop: Callable[[], None]) -> None:
        """A thread that dies tells the learner, which would wait for ever otherwise."""
        try:
            loop()
        except BaseException as error:
            self._buffer.fail(error)
            self._stopping.set()

    def _sample_loop(self) -> None:
        version, params = -1, None
        while not self._stopping.is_set():
            num_changes = self._buffer.num_changes
            is_old = self._weights[0] != version
            if is_old and (self._replicas.is_idle or not self._finish_old):
                version, params = self._weights
                self._replicas.abort()
                is_old = False
            self._admit(version)
            # Rollouts that the window no longer wants rest where they are: a group may yet prove
            # unusable, and then they go on.
            if not is_old and (self._replicas.is_idle or not self._buffer.wants_groups(version)):
                start = time.perf_counter()
                self._buffer.wait_for_change(num_changes, POLL_SECONDS)
                self._idle_seconds += time.perf_counter() - start
                continue
            for (ticket, prompt), rollouts in self._replicas.step(params):
                self._mean_tokens.pop(prompt.id, None)
                self._mean_tokens[prompt.id] = sum(len(r.token_ids) for r in rollouts) / len(rollouts)
                if len(self._mean_tokens) > MAX_REMEMBERED_PROMPTS:
                    del self._mean_tokens[next(iter(self._mean_tokens))]
                self._buffer.mark_sampled(ticket)
                self._hand_over((ticket, prompt, rollouts))
        self._replicas.abort()

    def _admit(self, version: int) -> None:
        while self._replicas.wants_more and (ticket := self._buffer.admit(version)) is not None:
            prompt = self._prompts[ticket.position]
            self._replicas.submit(
                Request(
                    (ticket, prompt),
                    prompt.token_ids,
                    self._group_size,
                    (self._seed, ticket.policy_version, ticket.index),
                    self._sampling,
                    expected_tokens=self._mean_tokens.get(prompt.id),
                )
            )

    def _hand_over(self, item: tuple[Ticket, Prompt, list[Rollout]]) -> None:
        """Queues a group for the grader; a slow grader slows the sampler down."""
        while True:
            with contextlib.suppress(queue.Full):
                self._finished.put(item, timeout=POLL_SECONDS)
                return
            if self._stopping.is_set():
                return

    def _grade_loop(self) -> None:
        while not self._stopping.is_set() or self._is_draining:
            items = self._drain()
            if not items:
                continue
            groups = self._make_groups(items)
            for version in sorted({group.policy_version for group in groups}):
                self._log.append([group for group in groups if group.policy_version == version])
            for group in groups:
                self._buffer.put(group)

    @property
    def _is_draining(self) -> bool:
        """After ``stop``: whether something finished may still come, and there is time for it."""
        may_come = self._threads[0].is_alive() or not self._finished.empty()
        return may_come and time.monotonic() < self._drain_until

    def _drain(self) -> list[tuple[Ticket, Prompt, list[Rollout]]]:
        """Finished rollouts that wait, at least one unless the wait is over."""
        try:
            items = [self._finished.get(timeout=POLL_SECONDS)]
        except queue.Empty:
            return []
        while not self._finished.empty() and len(items) < MAX_GRADED_AT_ONCE:
            items.append(self._finished.get_nowait())
        return items

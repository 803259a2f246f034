"""The loop of everything that samples: prompts to rollouts to graded groups, in two threads.

thread     takes                         makes                    waits for             is woken by
sampler    tickets, weights of a version finished rollouts        wanted groups         open_window, stop
grader     finished rollouts             groups in log + buffer   finished rollouts     sampler, stop
learner    groups in the buffer          weights                  groups of a batch     grader
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from oapl_jax.data.prompts import PromptSource
from oapl_jax.rollouts.buffer import GroupBuffer, Ticket
from oapl_jax.rollouts.grading import Grading
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.sampling import Request, Sampler, SamplingDistribution, Stats
from oapl_jax.rollouts.shards import ShardQueue
from oapl_jax.sources.turns import SamplerTurns
from oapl_jax.types import Metrics, Prompt, Rollout

POLL_SECONDS = 0.2
REST_SECONDS = 0.05
"""Longest sleep of the sampler's thread while nothing is wanted: then it looks whether somebody wants the sampler."""
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


class SamplingLoop:
    """Samples what a queue wants until stopped; owns two threads.

    ``groups`` says what to sample, and takes what is finished when ``log`` has it. Group ``i`` of version ``v`` draws
    from ``(seed, v, i)``. With ``finish_old`` the groups in flight when new weights come are finished with the old ones
    and logged first.
    """

    def __init__(
        self,
        turns: SamplerTurns,
        prompts: PromptSource | Sequence[Prompt],
        grading: Grading,
        groups: GroupBuffer | ShardQueue,
        log: RolloutLog | ShardQueue,
        *,
        distribution: SamplingDistribution,
        group_size: int,
        seed: int,
        finish_old: bool = False,
    ):
        self._turns, self._prompts, self._grading, self._groups, self._log = turns, prompts, grading, groups, log
        self._distribution, self._group_size, self._seed = distribution, group_size, seed
        self._finish_old = finish_old
        self._mean_tokens: dict[str, float] = {}
        """Mean response length of each prompt when it was last sampled, as a guess of its length now."""
        self._weights: tuple[int, Any] = (-1, None)
        self._finished: queue.Queue[tuple[Ticket, Prompt, list[Rollout]]] = queue.Queue(MAX_UNGRADED_GROUPS)
        self._stopping = threading.Event()
        self._drain_until = 0.0
        self._threads = [
            threading.Thread(target=self._guard, args=(loop,), name=name, daemon=True)
            for name, loop in (("sampler", self._sample_loop), ("grader", self._grade_loop))
        ]
        self._stats, self._num_live, self._idle_seconds = Stats(), 0, 0.0
        """Sums of this loop alone: evaluations use the same sampler."""
        self._work_seconds = {"sampler": 0.0, "grader": 0.0}
        """Of each thread."""
        self._last_report = (time.perf_counter(), Stats(), 0.0, dict(self._work_seconds))

    def set_weights(self, policy_version: int, weights: Any) -> None:
        """New weights, taken up at the end of the chunk in flight; call before the queue opens their window."""
        self._weights = (policy_version, weights)

    def start(self) -> None:
        """Starts sampling, if it has not started; weights must have been set."""
        if self._threads[0].ident is None:
            for thread in self._threads:
                thread.start()

    def stop(self, drain_seconds: float = DRAIN_SECONDS) -> None:
        """Ends both threads: the sampler's at the end of its chunk, the grader's when what is finished is in the log.

        Groups that were not finished, or not graded within ``drain_seconds``, are dropped.

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
        self._weights = (-1, None)

    @property
    def is_running(self) -> bool:
        """Whether the threads have been started and not stopped."""
        return self._threads[0].ident is not None and not self._stopping.is_set()

    @property
    def sums(self) -> tuple[int, float]:
        """Tokens drawn and seconds without work, since the start."""
        return self._stats.tokens, self._idle_seconds

    def report(self) -> Metrics:
        """Metrics since the last report."""
        now, stats, idle, work = time.perf_counter(), self._stats, self._idle_seconds, dict(self._work_seconds)
        then, before, idle_then, work_then = self._last_report
        self._last_report = (now, stats, idle, work)
        done = stats - before
        seconds = max(now - then, 1e-9)
        return {
            **({"sampler/slot_use": done.slot_use} if done.row_steps else {}),
            "sampler/tokens_per_second": done.tokens / seconds,
            "sampler/prefill_tokens_per_second": done.prefill_tokens / seconds,
            "sampler/live_rollouts": self._num_live,
            "sampler/preemptions": done.preemptions,
            "sampler/host_gap_seconds": done.host_gap_seconds,
            "sampler/idle_seconds": idle - idle_then,
            **{f"{name}/seconds": seconds - work_then[name] for name, seconds in work.items()},
        }

    def _guard(self, loop: Callable[[], None]) -> None:
        """A thread that dies says so to the learner, which would otherwise wait forever."""
        try:
            loop()
        except BaseException as error:
            self._groups.fail(error)
            self._stopping.set()

    def _sample_loop(self) -> None:
        while not self._stopping.is_set():
            with self._turns.take_when_unwanted() as sampler:
                self._sample(sampler)

    def _sample(self, sampler: Sampler) -> None:
        """One turn with the sampler, which ends when somebody else wants it and nothing is in flight."""
        version, before = -1, replace(sampler.stats)  # an engine may count on in the same object
        total = self._stats
        while not self._stopping.is_set():
            num_changes = self._groups.num_changes
            is_old = self._weights[0] != version
            if is_old and (sampler.is_idle or not self._finish_old):
                sampler.abort()
                version, weights = self._weights
                sampler.set_weights(weights)
                is_old = False
            is_wanted = self._turns.is_wanted
            if is_wanted and sampler.is_idle:
                return
            if not is_wanted:
                self._admit(sampler, version)
            # Rollouts that the window no longer wants rest where they are: a group may yet prove unusable, and then
            # they go on.
            if not (is_old or is_wanted) and (sampler.is_idle or not self._groups.wants_groups(version)):
                start = time.perf_counter()
                self._groups.wait_for_change(num_changes, REST_SECONDS)
                self._idle_seconds += time.perf_counter() - start
                continue
            start = time.perf_counter()
            finished = sampler.step()
            self._work_seconds["sampler"] += time.perf_counter() - start
            for (ticket, prompt), rollouts in finished:
                self._remember(prompt, rollouts)
                self._groups.mark_sampled(ticket)
                self._hand_over((ticket, prompt, rollouts))
            self._stats, self._num_live = total + (sampler.stats - before), sampler.num_live

    def _admit(self, sampler: Sampler, version: int) -> None:
        while sampler.wants_more and (ticket := self._groups.admit(version)) is not None:
            prompt = self._prompts[ticket.position]
            sampler.submit(
                Request(
                    (ticket, prompt),
                    prompt.token_ids,
                    self._group_size,
                    (self._seed, ticket.policy_version, ticket.index),
                    self._distribution,
                    expected_tokens=self._mean_tokens.get(prompt.id),
                )
            )

    def _remember(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> None:
        self._mean_tokens.pop(prompt.id, None)
        self._mean_tokens[prompt.id] = sum(len(rollout.token_ids) for rollout in rollouts) / len(rollouts)
        if len(self._mean_tokens) > MAX_REMEMBERED_PROMPTS:
            del self._mean_tokens[next(iter(self._mean_tokens))]

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
            start = time.perf_counter()
            groups = self._grading.groups(items)
            self._work_seconds["grader"] += time.perf_counter() - start
            for version in sorted({group.policy_version for group in groups}):
                self._log.append([group for group in groups if group.policy_version == version])
            for group in groups:
                self._groups.put(group)

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

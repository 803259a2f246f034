"""Windows that this process fills itself: a sampling loop beside the learner."""

import json
from collections.abc import Callable, Sequence

from oapl_jax.config.window import WindowConfig
from oapl_jax.io import storage
from oapl_jax.rollouts.buffer import GroupBuffer, Window
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.source import Taken, Weights, WindowPlan
from oapl_jax.sources.sampling_loop import SamplingLoop
from oapl_jax.types import Metrics, RolloutGroup

CARRIED_FILE = "carried.json"
"""Beside the rollouts of a version: which groups of the version before its window takes, and where its prompts begin."""


class BufferedSource:
    """What all sources with a window's buffer share."""

    def __init__(self, buffer: GroupBuffer, limits: WindowConfig):
        self._buffer, self._limits = buffer, limits

    def take(
        self, num_groups: int, is_cancelled: Callable[[], bool], recorded: Sequence[int] | None = None
    ) -> Taken | None:
        """See ``GroupBuffer.take``."""
        groups = self._buffer.take(num_groups, self._limits.deadline, is_cancelled, recorded)
        return Taken(groups, self._buffer.cursor, self._buffer.left_over) if groups else None

    def report(self) -> Metrics:
        """``window/ready_groups`` and, since the run's process started, ``window/dropped_groups``."""
        return {"window/ready_groups": self._buffer.num_ready, "window/dropped_groups": self._buffer.num_dropped}


class LocalSource(BufferedSource):
    """A ``GroupSource``: the loop's groups go to the log and to the window's buffer, from which the learner takes."""

    def __init__(self, loop: SamplingLoop, buffer: GroupBuffer, log: RolloutLog, limits: WindowConfig):
        super().__init__(buffer, limits)
        self._loop, self._log = loop, log

    def open_window(self, window: Window, weights: Weights, taken: Sequence[Sequence[int]]) -> WindowPlan:
        """Groups of this version that a killed run has logged are used again."""
        carried: dict[int, RolloutGroup] = {}
        if self._limits.max_version_lag:
            window, carried = self._carry(window)
        self._loop.set_weights(window.policy_version, weights.sampler)
        logged = self._log.read(window.policy_version)
        self._buffer.open_window(window, logged, taken, carried)
        self._loop.start()
        return WindowPlan(self._limits.sync_every, window=window)

    def _carry(self, window: Window) -> tuple[Window, dict[int, RolloutGroup]]:
        """The window without the prompts of the groups that are carried into it, and these by place in the stream.

        Which groups these are depends on timing. So it is recorded before the window begins, and a restart takes them
        again from the log of the version before.

        Raises:
            ValueError: the log lacks one of them.
        """
        path, before = self._log.folder(window.policy_version) / CARRIED_FILE, window.policy_version - 1
        ready = self._buffer.ready if self._buffer.policy_version == before else {}
        window = window.without(ready)
        places = [[position, group.index] for position, group in ready.items()]
        new = {"start_position": window.start_position, "asked_again": window.asked_again, "carried": places}
        storage.create(path, json.dumps(new).encode() + b"\n")
        record = storage.read_object(path)
        window = window._replace(start_position=record["start_position"], asked_again=tuple(record["asked_again"]))
        groups, wanted = {group.index: group for group in ready.values()}, dict(record["carried"])
        if not groups.keys() >= set(wanted.values()):
            groups = {group.index: group for group in self._log.read(before)}
        if lacking := sorted(set(wanted.values()) - groups.keys()):
            raise ValueError(
                f"{path}: the rollout log has no group {lacking[0]} of version {before}; put its files back"
            )
        return window, {position: groups[index] for position, index in wanted.items()}

    def report(self) -> Metrics:
        """``sampler/*`` and ``window/*``."""
        return {**self._loop.report(), **super().report()}

    def finish(self) -> None:
        """Stops sampling: nothing is wanted any longer."""
        self._loop.stop()

    close = finish

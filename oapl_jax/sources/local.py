"""Windows that this process fills itself: a sampling loop beside the learner."""

from collections.abc import Callable, Sequence

from oapl_jax.config.window import WindowConfig
from oapl_jax.rollouts.buffer import GroupBuffer, Window
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.source import Taken, Weights, WindowPlan
from oapl_jax.sources.sampling_loop import SamplingLoop
from oapl_jax.types import Metrics


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
        self._loop.set_weights(window.policy_version, weights.sampler)
        logged = self._log.read(window.policy_version)
        self._buffer.open_window(window, logged=logged, batches=taken)
        self._loop.start()
        return WindowPlan(self._limits.sync_every)

    def report(self) -> Metrics:
        """``sampler/*`` and ``window/*``."""
        return {**self._loop.report(), **super().report()}

    def finish(self) -> None:
        """Stops sampling: nothing is wanted any longer."""
        self._loop.stop()

    close = finish

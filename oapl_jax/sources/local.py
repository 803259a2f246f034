"""Windows that this process fills itself: a sampling loop beside the learner."""

from collections.abc import Callable, Sequence

from oapl_jax.rollouts.buffer import GroupBuffer, Window
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.rollouts.source import Taken, Weights, WindowPlan
from oapl_jax.sources.sampling_loop import SamplingLoop
from oapl_jax.types import Metrics


class LocalSource:
    """A ``GroupSource``: the loop's groups go to the log and to the window's buffer, from which the learner takes.

    Args:
        loop: samples what ``buffer`` wants.
        buffer: of the window.
        log: of the run.
        sync_every: learner steps of a window.
        deadline: seconds that ``take`` waits.
    """

    def __init__(self, loop: SamplingLoop, buffer: GroupBuffer, log: RolloutLog, sync_every: int, deadline: float):
        self._loop, self._buffer, self._log = loop, buffer, log
        self._sync_every, self._deadline = sync_every, deadline

    def open_window(self, window: Window, weights: Weights, taken: Sequence[Sequence[int]]) -> WindowPlan:
        """Groups of this version that a killed run has logged are used again."""
        self._loop.set_weights(window.policy_version, weights.sampler)
        logged = self._log.read(window.policy_version)
        self._buffer.open_window(window, logged=logged, batches=taken)
        self._loop.start()
        return WindowPlan(self._sync_every)

    def take(
        self, num_groups: int, is_cancelled: Callable[[], bool], recorded: Sequence[int] | None = None
    ) -> Taken | None:
        """See ``GroupBuffer.take``."""
        return take(self._buffer, num_groups, self._deadline, is_cancelled, recorded)

    def report(self) -> Metrics:
        """``sampler/*`` and ``window/*``."""
        return {**self._loop.report(), **describe(self._buffer)}

    def finish(self) -> None:
        """Stops sampling: nothing is wanted any longer."""
        self._loop.stop()

    def close(self) -> None:
        """Stops sampling."""
        self._loop.stop()


def take(
    buffer: GroupBuffer,
    num_groups: int,
    deadline: float,
    is_cancelled: Callable[[], bool],
    recorded: Sequence[int] | None,
) -> Taken | None:
    """The groups of the next batch from a window's buffer; None when the wait was cancelled."""
    groups = buffer.take(num_groups, deadline, is_cancelled, recorded)
    return Taken(groups, buffer.cursor, buffer.left_over) if groups else None


def describe(buffer: GroupBuffer) -> Metrics:
    """``window/ready_groups`` and, since the run's process started, ``window/dropped_groups``."""
    return {"window/ready_groups": buffer.num_ready, "window/dropped_groups": buffer.num_dropped}

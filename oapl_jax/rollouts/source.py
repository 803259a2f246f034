"""The contract between the training loop and whoever fills its windows with groups.

A window is the time between two weight syncs. Implementations are in ``sources/``: threads of this process, a log that
other processes write, rounds of finished data.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from oapl_jax.rollouts.buffer import Window
from oapl_jax.types import Metrics, RolloutGroup


class Weights(NamedTuple):
    """The policy at the start of a window, twice."""

    learner: Any
    """Parameters on the trainer's mesh."""
    sampler: Any
    """The same in the sampler's precision and sharding; they stay as they are until the next window."""


class WindowPlan(NamedTuple):
    """What a source says of the window that it has opened."""

    num_steps: int
    """Learner steps until the next sync: the paper's L."""
    epoch_steps: int | None = None
    """Each time this many steps are over, the model is evaluated and written as a folder; None: never."""
    is_last: bool = False
    """No window comes after this one."""
    is_next_slow: bool = False
    """The next window takes long to open: the run is saved before."""
    expected_steps: int | None = None
    """Learner steps of this window and of those to come, as far as the source knows."""
    window: Window | None = None
    """The window, where it asks other prompts than it was to: some have groups already (``window.max_version_lag``)."""

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch is over after this step of the window, counted from 1."""
        return self.epoch_steps is not None and step % self.epoch_steps == 0


class Taken(NamedTuple):
    """The groups of one batch, and where the next window begins should no other batch follow."""

    groups: list[RolloutGroup]
    cursor: int
    """Index in the window after the last group that was taken."""
    left_over: list[int] = []  # noqa: RUF012 - never changed
    """Positions in the prompt stream that the next window asks first, because this one passed them by."""


@runtime_checkable
class GroupSource(Protocol):
    """Fills windows with graded groups. The loop calls one method at a time, from one thread."""

    def open_window(self, window: Window, weights: Weights, taken: Sequence[Sequence[int]]) -> WindowPlan:
        """Begins a window: the sampler gets its weights, groups of older versions are dropped, or carried into it.

        ``taken``: after a restart, the indices of the groups of each batch that was trained on in this window.

        Raises:
            ValueError: the window cannot be filled; says why.
            PreemptedError: SIGTERM came while the window was prepared.
        """
        ...

    def take(
        self, num_groups: int, is_cancelled: Callable[[], bool], recorded: Sequence[int] | None = None
    ) -> Taken | None:
        """The groups of the next batch, as soon as they are there; None when ``is_cancelled`` said so meanwhile.

        ``recorded``: indices of the groups that this batch had before a restart, and gets again.

        Raises:
            TimeoutError: they do not come in time; says what was waited for.
            RuntimeError: the sampler has failed.
        """
        ...

    def report(self) -> Metrics:
        """Metrics since the last report."""
        ...

    def finish(self) -> None:
        """The run is over, and no other window comes."""
        ...

    def close(self) -> None:
        """Ends threads; may be called at any time, and twice."""
        ...

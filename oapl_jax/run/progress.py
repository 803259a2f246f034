"""How far a run has come, besides its arrays; saved with every checkpoint."""

import dataclasses
from typing import Any


@dataclasses.dataclass
class RunProgress:
    """Plain numbers, which a checkpoint holds as JSON."""

    step: int = 0
    policy_version: int = 0
    window_step: int = 0
    """Learner step at which the window opened."""
    window_position: int = 0
    """Position in the prompt stream of the window's first group."""
    asked_again: list[int] = dataclasses.field(default_factory=list)
    """Positions in the prompt stream of the window's first groups, where an earlier window passed them by."""
    cursor: int = 0
    """Index in the window after the last group that was consumed."""
    left_over: list[int] = dataclasses.field(default_factory=list)
    """Positions that the next window has to ask again: see ``GroupBuffer.left_over``."""
    num_dropped: int = 0
    """Groups dropped at syncs."""
    num_rollouts: int = 0
    """Rollouts trained on."""
    seconds: float = 0.0
    """Time spent, all restarts together."""
    before: dict[str, float] = dataclasses.field(default_factory=dict)
    """pass@k before step 1."""
    best: dict[str, float] = dataclasses.field(default_factory=dict)
    """``step`` and ``value`` of the best evaluation by ``checkpoint.keep_best``, and how many later ones are no better."""
    saved_versions: list[int] = dataclasses.field(default_factory=list)
    """Policy versions of the newest checkpoints, as many as are kept."""
    epochs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Offline: round, epoch, step, folder of the model and evaluation of each epoch that is over."""

    def next_window(self, policy_version: int) -> None:
        """Opens a window here, after the last group that was consumed."""
        self.policy_version, self.window_step = policy_version, self.step
        self.window_position += max(0, self.cursor - len(self.asked_again))
        self.asked_again, self.left_over, self.cursor = self.left_over, [], 0

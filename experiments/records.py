"""What the files of a run say: pass@k of each evaluation; entropy, and the sampler's difference, of each step."""

import pathlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from experiments.grid import Moment
from oapl_jax.evaluation.passk import pass_at_ks
from oapl_jax.io import json_lines
from oapl_jax.io.metrics import METRICS_FILE, read_metrics
from oapl_jax.io.run_dir import EVALUATIONS_FILE

ENTROPY, LOG_RATIO = "learner/sequence_entropy", "learner/log_ratio_abs"
SHARE = 10
"""A mean of the entropy is over this part of the steps."""


class Record(NamedTuple):
    """A run as its files say."""

    steps: Int[np.ndarray, "E"]
    """Steps after which it was evaluated."""
    rollouts: Int[np.ndarray, "E"]
    """Rollouts that it had learned from by then."""
    pass_at: list[Float[np.ndarray, "K"]]
    """pass@1, pass@2, ... of each evaluation, over the prompts of this record."""
    entropies: Float[np.ndarray, "T"]
    """Nats a response, of each step."""
    mismatches: Float[np.ndarray, "W"]
    """Mean |log pi - log pi_sampler| of a response, in nats, of the steps with the weights that the sampler has."""

    def value(self, metric: str, moment: Moment) -> float:
        """A metric at a moment; NaN where the run has none."""
        if metric == "entropy":
            return self._entropy(moment)
        values = self.curve(metric)
        if moment == "best":
            return float(np.nanmax(values[1:] if len(values) > 1 else values))
        return float(values[self._index(moment)])

    def curve(self, metric: str) -> Float[np.ndarray, "E"]:
        """``pass@k`` at each evaluation; NaN where it has fewer than k samples."""
        k = int(metric.removeprefix("pass@"))
        return np.array([values[k - 1] if len(values) >= k else np.nan for values in self.pass_at])

    def _index(self, moment: Moment) -> int:
        if moment in ("start", "final"):
            return 0 if moment == "start" else -1
        end = self.steps[-1] / (2 if moment == "middle" else 3)
        return int(np.flatnonzero(self.steps <= end)[-1])

    def _entropy(self, moment: Moment) -> float:
        part = max(len(self.entropies) // SHARE, 1)
        at = {"start": self.entropies[:part], "final": self.entropies[-part:]}
        if moment not in at:
            raise ValueError(f"at={moment}: entropy has {', '.join(at)}")
        return float(np.mean(at[moment]))


def read(folder: pathlib.Path, batch_rollouts: int, prompts: slice) -> Record:
    """The record of a run, over some of its held-out prompts.

    Raises:
        OSError, ValueError: a file is missing or is not what a run writes.
    """
    evaluations, metrics = json_lines.read(folder / EVALUATIONS_FILE), read_metrics(folder / METRICS_FILE)
    if not evaluations:
        raise ValueError(f"{folder / EVALUATIONS_FILE}: no evaluation")
    pass_at = []
    for line in evaluations:
        graded, correct = np.array(line["graded"][prompts]), np.array(line["correct"][prompts])
        pass_at.append(pass_at_ks(graded, correct, int(graded.min())).mean(axis=0))
    steps = np.array([line["step"] for line in evaluations])
    entropies = np.array([line[ENTROPY] for line in metrics if ENTROPY in line])
    mismatches = np.array([line[LOG_RATIO] for line in metrics if line.get("window/lag") == 0])
    return Record(steps, steps * batch_rollouts, pass_at, entropies, mismatches)

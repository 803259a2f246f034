"""The metrics file of a run.

Every metric is a number under an ``area/name``; docs/metrics.md describes each of them.
"""

import math

from oapl_jax.io import json_lines
from oapl_jax.io.storage import SharedPath
from oapl_jax.io.trackers import Distributions, Tracker
from oapl_jax.types import Metrics

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Writes each step's metrics to ``RUN/metrics.jsonl``, and to a tracker where there is one.

    A context manager; metrics.jsonl is complete after every ``write``, so a killed run loses none. A tracker in an object
    store is complete after every ``flush``: steps after it are lost at a kill, and written by the resumed run.
    """

    def __init__(self, run_dir: SharedPath, tracker: Tracker | None = None, *, resume_step: int = -1):
        """Opens the file of a run, and takes over the tracker.

        Lines of steps after ``resume_step`` are removed, because the run writes them again; -1: all lines.

        Raises:
            ValueError: metrics.jsonl is damaged.
        """
        self._lines, _ = json_lines.open_lines(run_dir / METRICS_FILE, lambda step: step <= resume_step)
        self._tracker = tracker

    def write(self, step: int, metrics: Metrics, distributions: Distributions | None = None) -> None:
        """Appends one line. Values become Python floats here, so device arrays are waited for."""
        values = {name: float(value) for name, value in metrics.items()}
        # JSON has no NaN: null is what every reader understands.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._lines.append({"step": step, **finite})
        if self._tracker is not None:
            self._tracker.write(step, values, distributions)

    def flush(self) -> None:
        """Before a checkpoint."""
        if self._tracker is not None:
            self._tracker.flush()

    def close(self) -> None:
        """Closes the tracker."""
        if self._tracker is not None:
            self._tracker.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: SharedPath) -> list[Metrics]:
    """The lines of a metrics.jsonl, null as NaN; see ``json_lines.read``."""
    return [
        {name: math.nan if value is None else value for name, value in record.items()}
        for record in json_lines.read(path)
    ]

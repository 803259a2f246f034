"""The metrics file of a run.

Every metric is a number under an ``area/name``; docs/metrics.md describes each of them.
"""

import json
import math
import pathlib
from typing import Any

from oapl_jax.config.run import LoggingConfig
from oapl_jax.io import json_lines, trackers
from oapl_jax.types import Metrics

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Writes each step's metrics to ``RUN/metrics.jsonl``, and to TensorBoard and W&B where wanted.

    A context manager; the files are complete after every ``write``, so a killed run loses none.
    """

    def __init__(
        self,
        run_dir: pathlib.Path,
        logging: LoggingConfig,
        *,
        resume_step: int | None = None,
        config: dict[str, Any] | None = None,
    ):
        """Opens the files of a run; W&B shows ``config``.

        Lines of steps after ``resume_step`` are removed, because the resumed run writes them again; None: all lines.

        Raises:
            ValueError: wandb is wanted and not installed, or metrics.jsonl is damaged.
        """
        self._path = run_dir / METRICS_FILE
        last_kept = -1 if resume_step is None else resume_step
        project = logging.wandb_project
        self._wandb = None if project is None else trackers.start_wandb(project, run_dir, config)
        json_lines.keep(self._path, lambda step: step <= last_kept)
        self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard = trackers.start_tensorboard(run_dir, last_kept + 1) if logging.tensorboard else None

    def write(self, step: int, metrics: Metrics) -> None:
        """Appends one line. Values become Python floats here, so device arrays are waited for."""
        values = {name: float(value) for name, value in metrics.items()}
        # JSON has no NaN: null is what every reader understands.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log({"step": step, **values})

    def close(self) -> None:
        """Closes every file; W&B uploads what is left."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: pathlib.Path) -> list[Metrics]:
    """The lines of a metrics.jsonl, null as NaN; see ``json_lines.read``."""
    return [
        {name: math.nan if value is None else value for name, value in record.items()}
        for record in json_lines.read(path)
    ]

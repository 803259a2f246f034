"""The metrics file of a run.

Every metric is a number under an ``area/name``; docs/metrics.md describes each of them.
"""

import math
import pathlib
import tempfile
from typing import Any

from oapl_jax.config.run import LoggingConfig
from oapl_jax.io import json_lines, storage, trackers
from oapl_jax.io.storage import SharedPath
from oapl_jax.types import Metrics

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Writes each step's metrics to ``RUN/metrics.jsonl``, and to TensorBoard and W&B where wanted.

    A context manager; metrics.jsonl is complete after every ``write``, so a killed run loses none. So are TensorBoard's
    files on a disk. In an object store they are complete after every ``flush``: steps after it are lost at a kill, and
    written by the resumed run.
    """

    def __init__(
        self,
        run_dir: SharedPath,
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
        last_kept = -1 if resume_step is None else resume_step
        project, self._run_dir = logging.wandb_project, run_dir
        self._wandb = None if project is None else trackers.start_wandb(project, run_dir, config)
        self._lines, _ = json_lines.open_lines(run_dir / METRICS_FILE, lambda step: step <= last_kept)
        self._scratch = None if storage.is_local(run_dir) else tempfile.TemporaryDirectory(prefix="oapl-tensorboard-")
        self._has_tensorboard = logging.tensorboard
        self._tensorboard = self._start_tensorboard(last_kept + 1)

    def write(self, step: int, metrics: Metrics) -> None:
        """Appends one line. Values become Python floats here, so device arrays are waited for."""
        values = {name: float(value) for name, value in metrics.items()}
        # JSON has no NaN: null is what every reader understands.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._lines.append({"step": step, **finite})
        if self._tensorboard is None:
            self._tensorboard = self._start_tensorboard(step)
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log({"step": step, **values})

    def flush(self) -> None:
        """In an object store: puts the TensorBoard file there; the next line begins another one."""
        if self._scratch is None or self._tensorboard is None:
            return
        self._tensorboard.close()
        self._tensorboard = None
        written = pathlib.Path(self._scratch.name) / trackers.TENSORBOARD_FOLDER
        storage.put_folder(written, self._run_dir / trackers.TENSORBOARD_FOLDER)
        storage.remove(written)

    def _start_tensorboard(self, first_step: int) -> Any:
        folder = self._run_dir if self._scratch is None else pathlib.Path(self._scratch.name)
        return trackers.start_tensorboard(pathlib.Path(str(folder)), first_step) if self._has_tensorboard else None

    def close(self) -> None:
        """Closes every file; W&B uploads what is left."""
        self.flush()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._scratch is not None:
            self._scratch.cleanup()
        if self._wandb is not None:
            self._wandb.finish()

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

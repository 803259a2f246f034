"""Trackers: what shows a run outside of its own files. TensorBoard, Weights & Biases, trackio.

Each gets the metrics of every step under the names of docs/metrics.md, the config as hyperparameters, and histograms
and samples of the windows that ``rollouts/diagnostics.py`` records. A resumed run goes on with the tracker's run; its id
is in ``RUN/tracker_id.txt``.
"""

import importlib
import pathlib
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Shaped

from oapl_jax.config.config_file import flat
from oapl_jax.config.run import RunConfig
from oapl_jax.io import storage
from oapl_jax.io.storage import SharedPath
from oapl_jax.io.terminal import visible

TENSORBOARD_FOLDER = "tensorboard"
ID_FILE = "tracker_id.txt"
HISTOGRAM = "_histogram"
"""Suffix of a metric's name for its distribution: a tracker has one kind of value under a name."""
SAMPLES = "rollouts/samples"
"""The name of the samples."""
RESULTS = ("evaluation/pass@1", "rollouts/reward")
"""Metrics that TensorBoard shows beside the hyperparameters of runs."""


class Sample(NamedTuple):
    """A response that was learned from."""

    prompt: str
    response: str
    verdict: str
    reward: float


class Distributions(NamedTuple):
    """What a batch has beside numbers."""

    histograms: Mapping[str, Shaped[np.ndarray, "_N"]]
    """The values whose mean is the metric of this name."""
    samples: Sequence[Sample]


@runtime_checkable
class Tracker(Protocol):
    """What shows a run."""

    def write(self, step: int, metrics: Mapping[str, float], distributions: Distributions | None) -> None:
        """Takes a step's metrics; of most steps these are all."""
        ...

    def flush(self) -> None:
        """A checkpoint is about to be saved: what was written has to survive."""
        ...

    def close(self) -> None:
        """The end of the process's run."""
        ...


def start(run_dir: SharedPath, config: RunConfig, first_step: int, settings: dict[str, Any]) -> Tracker | None:
    """The tracker that ``run.tracker`` names; None: none.

    ``first_step`` is written first: a resumed run writes steps again that were after its checkpoint. ``settings`` are the
    config, shown as hyperparameters.

    Raises:
        ValueError: its library is not installed.
    """
    if config.tracker is None:
        return None
    if config.tracker == "tensorboard":
        return TensorBoard(run_dir, first_step, settings)
    return HostedRun(config.tracker, config.project, run_dir, settings)


class TensorBoard:
    """Event files in the run directory. In an object store each flush puts one there, and the next step begins another."""

    def __init__(self, run_dir: SharedPath, first_step: int, settings: dict[str, Any]):
        self._run_dir, self._settings = run_dir, settings
        self._scratch = None if storage.is_local(run_dir) else tempfile.TemporaryDirectory(prefix="oapl-tensorboard-")
        self._writer = self._start(first_step)

    def write(self, step: int, metrics: Mapping[str, float], distributions: Distributions | None) -> None:
        """As ``Tracker``; complete on the disk when it returns."""
        if self._writer is None:
            self._writer = self._start(step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        if distributions is not None:
            for name, values in distributions.histograms.items():
                self._writer.add_histogram(name + HISTOGRAM, values, step)
            self._writer.add_text(SAMPLES, "\n".join(map(_markdown, distributions.samples)), step)
        self._writer.flush()

    def flush(self) -> None:
        """As ``Tracker``."""
        if self._scratch is None or self._writer is None:
            return
        self._writer.close()
        self._writer = None
        written = self._folder
        storage.put_folder(written, self._run_dir / TENSORBOARD_FOLDER)
        storage.remove(written)

    def close(self) -> None:
        """As ``Tracker``."""
        self.flush()
        if self._writer is not None:
            self._writer.close()
        if self._scratch is not None:
            self._scratch.cleanup()

    @property
    def _folder(self) -> pathlib.Path:
        return pathlib.Path(str(self._run_dir) if self._scratch is None else self._scratch.name) / TENSORBOARD_FOLDER

    def _start(self, first_step: int) -> Any:
        """An event file; later steps of former ones are hidden."""
        # Imported here because it takes more than a second, which reading metrics need not pay.
        import tensorboardX
        from tensorboardX.summary import hparams

        # The suffix keeps the files of two starts within one second apart.
        writer = tensorboardX.SummaryWriter(
            str(self._folder), purge_step=first_step, filename_suffix=f".from-{first_step}"
        )
        assert writer.file_writer is not None  # it writes
        shown = {
            key: value if isinstance(value, bool | str | float | int) else str(value)
            for key, value in flat(self._settings).items()
        }
        for summary in hparams(shown, dict.fromkeys(RESULTS))[:2]:  # the third is for the end of a run
            writer.file_writer.add_summary(summary)
        return writer


class HostedRun:
    """A run of Weights & Biases or of trackio, which has the same interface."""

    def __init__(self, library: str, project: str, run_dir: SharedPath, settings: dict[str, Any]):
        """Begins it, or goes on with the one of this run directory."""
        try:
            self._library: Any = importlib.import_module(library)
        except ImportError as error:
            raise ValueError(
                f"run.tracker={library}: {error}; pip install 'oapl-jax[{library}]', or choose another one"
            ) from error
        storage.create(run_dir / ID_FILE, uuid.uuid4().hex[:12].encode())
        run_id, name = storage.read(run_dir / ID_FILE).decode(), run_dir.name
        self._is_wandb = library == "wandb"
        if self._is_wandb:
            folder = str(run_dir) if storage.is_local(run_dir) else tempfile.gettempdir()
            options: dict[str, Any] = {"id": run_id, "name": name, "dir": folder}
        else:  # it knows a run by its name, and would log the use of the machine in a thread of its own
            options = {"name": f"{name}-{run_id}", "embed": False, "auto_log_cpu": False, "auto_log_gpu": False}
        self._run = self._library.init(project=project, config=settings, resume="allow", **options)
        if self._is_wandb:  # its own step cannot go back, which that of a resumed run does
            self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float], distributions: Distributions | None) -> None:
        """As ``Tracker``."""
        values: dict[str, Any] = dict(metrics)
        if distributions is not None:
            for name, of in distributions.histograms.items():
                values[name + HISTOGRAM] = self._library.Histogram(of.tolist())
            rows = [list(sample) for sample in distributions.samples]
            values[SAMPLES] = self._library.Table(columns=list(Sample._fields), data=rows)
        if self._is_wandb:
            self._run.log({"step": step, **values})
        else:
            self._run.log(values, step=step)

    def flush(self) -> None:
        """As ``Tracker``: the library writes in a process or thread of its own."""

    def close(self) -> None:
        """As ``Tracker``; waits until all is written or sent."""
        self._run.finish()


def _markdown(sample: Sample) -> str:
    """A sample for TensorBoard, its texts as they are."""
    blocks = (
        (f"**{sample.verdict}, reward {sample.reward:g}**", sample.prompt),
        ("**response**", sample.response),
    )
    return "\n".join(f"{title}\n\n    {visible(text).replace(chr(10), chr(10) + '    ')}\n" for title, text in blocks)

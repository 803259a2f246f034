"""What a run says of itself while it lasts: metric files, the progress bar, timers, the non-finite guard.

Every metric is a number under an ``area/name``; docs/metrics.md describes each of them.
"""

import collections
import contextlib
import importlib
import json
import math
import os
import pathlib
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import rich.console
import rich.progress

from oapl_jax.types import Metrics, RunError

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

# The columns of a progress line: metric, label, decimals.
_SHOWN = (
    ("rollouts/reward", "reward", 2),
    ("rollouts/pass_rate", "pass", 2),
    ("window/lag", "lag", 0),
    ("learner/residual", "residual", 3),
)
_SHOWN_WITHOUT_ROLLOUTS = (("learner/loss", "loss", 3),)
_SECONDS_BETWEEN_LINES = (2.0, 60.0)


class MetricsWriter:
    """Writes each step's metrics to ``RUN/metrics.jsonl``, and to TensorBoard and W&B where wanted.

    A context manager; the files are complete after every ``write``, so a killed run loses none.
    """

    def __init__(
        self,
        run_dir: pathlib.Path,
        *,
        resume_step: int | None = None,
        tensorboard: bool = True,
        wandb_project: str | None = None,
        config: dict[str, Any] | None = None,
    ):
        """Opens the files of a run.

        Args:
            run_dir: where the run lives.
            resume_step: the last step that is kept; what was written of later ones is removed, because the
                resumed run writes them again. None: the run starts at the beginning and so does its file.
            tensorboard: write event files to ``RUN/tensorboard``.
            wandb_project: Weights & Biases project, or None.
            config: the resolved config, shown by W&B.

        Raises:
            ValueError: ``wandb_project`` is set and wandb is not installed, or metrics.jsonl is damaged.
        """
        self._path = run_dir / METRICS_FILE
        last_kept = -1 if resume_step is None else resume_step
        self._wandb = None if wandb_project is None else _start_wandb(wandb_project, run_dir, config)
        _drop_later_steps(self._path, last_kept)
        self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard = _start_tensorboard(run_dir, last_kept + 1) if tensorboard else None

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
    """The lines of a metrics.jsonl, null as NaN. A last line that a crash tore in two is left out.

    Raises:
        ValueError: any other line is not a metrics line; it is named.
    """
    return [record for _, record in _read_lines(path)]


class Progress:
    """Shows how a run goes: a live bar on a terminal, plain lines elsewhere (CI logs, pods, notebooks).

    Plain lines are at least 2 seconds apart, up to a minute in long runs; the last step always has one.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        enabled: bool = True,
        live: bool | None = None,
        stream: Any = None,
        unit: str = "step",
    ):
        """Prepares the display.

        Args:
            total_steps: learner steps in all, those before a resume included.
            enabled: False silences ``update``; notes are printed all the same.
            live: a bar that moves; None: when the stream is a terminal.
            stream: text file to print to; None: standard output.
            unit: what is counted.
        """
        self._total, self._unit = total_steps, unit
        self._stream = sys.stdout if stream is None else stream
        self._live = enabled and (self._stream.isatty() if live is None else live)
        self._enabled = enabled
        self._shown: Metrics = {}
        self._first: tuple[int, float] | None = None
        self._last_line = -math.inf
        self._bar = _make_bar(self._stream) if self._live else None
        self._task = self._bar.add_task("", total=total_steps, shown="", left="") if self._bar else None

    def expect(self, total_steps: int) -> None:
        """Corrects the number of steps in all."""
        self._total = total_steps
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=total_steps)

    def update(self, step: int, metrics: Metrics) -> None:
        """Says that learner step ``step`` (counted from 1) is done. Metrics that are missing keep their value."""
        if not self._enabled:
            return
        self._shown.update(metrics)
        now = time.monotonic()
        # The first step compiles: the pace is measured from its end.
        self._first = self._first or (step, now)
        shown, left = _describe(self._shown), _time_left(self._first, (step, now), self._total)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, shown=" ".join(shown), left=left)
        elif step >= self._total or now - self._last_line >= self._pause(now):
            self._last_line = now
            width = len(str(self._total))
            self._print("  ".join([f"{self._unit} {step:{width}}/{self._total}", *shown, left]))

    def note(self, message: str) -> None:
        """Prints one line that stays, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False, soft_wrap=True)
        else:
            self._print(message)

    def _pause(self, now: float) -> float:
        shortest, longest = _SECONDS_BETWEEN_LINES
        elapsed = 0.0 if self._first is None else now - self._first[1]
        return min(longest, max(shortest, elapsed / 50))

    def _print(self, line: str) -> None:
        print(line.rstrip(), file=self._stream, flush=True)

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


class Stopwatch:
    """Adds up seconds by name, from any thread.

    >>> stopwatch = Stopwatch()
    >>> with stopwatch("learner/wait_seconds"):
    ...     pass
    >>> list(stopwatch.collect())
    ['learner/wait_seconds']
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = collections.defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times the block, an exception in it included."""
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._seconds[name] += time.perf_counter() - start

    def collect(self) -> dict[str, float]:
        """The sums since the last call."""
        with self._lock:
            seconds, self._seconds = dict(self._seconds), collections.defaultdict(float)
        return seconds


class NonFiniteError(RunError):
    """A metric that must be a number is NaN or infinite: the run cannot go on."""

    def __init__(self, step: int, name: str, value: float):
        self.step, self.name, self.value = step, name, value
        super().__init__(
            f"{name} is {value} at step {step}; the run stops here and its last checkpoint is kept.\n"
            "  What to do: start again from that checkpoint with a lower learner.learning_rate or learner.clip_norm,"
            " or a higher objective.beta2;\n"
            "  learner/grad_norm and learner/log_ratio_min in metrics.jsonl show whether it came gradually;"
            " model.compute_dtype=float32 rules out overflow."
        )


def check_finite(step: int, metrics: Metrics, names: Iterable[str]) -> None:
    """Raises NonFiniteError for the first of ``names`` whose value is NaN or infinite."""
    for name in names:
        value = float(metrics[name])
        if not math.isfinite(value):
            raise NonFiniteError(step, name, value)


def _read_lines(path: pathlib.Path) -> list[tuple[str, Metrics]]:
    """Each line with its record."""
    *complete, last = path.read_text(encoding="utf-8").split("\n")
    parsed = []
    for number, line in enumerate([*complete, last] if last else complete, start=1):
        try:
            parsed.append((line, _parse(line)))
        except ValueError as error:
            if number > len(complete):
                break  # no newline after it: the process was killed while it wrote
            raise ValueError(f"{path}: line {number} is not a line of metrics ({error}): {line[:80]!r}") from None
    return parsed


def _parse(line: str) -> Metrics:
    record = json.loads(line)
    if not isinstance(record, dict) or "step" not in record:
        raise ValueError("no step")
    return {name: math.nan if value is None else value for name, value in record.items()}


def _drop_later_steps(path: pathlib.Path, last_kept: int) -> None:
    """Rewrites the file without later steps and without a torn last line; a crash leaves the old or the new one."""
    if not path.exists():
        return
    kept = [line for line, record in _read_lines(path) if record["step"] <= last_kept]
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _start_tensorboard(run_dir: pathlib.Path, first_step: int) -> Any:
    # Imported here because it takes more than a second, which reading metrics need not pay.
    import tensorboardX

    # The suffix keeps the files of two starts within one second apart.
    folder, suffix = str(run_dir / TENSORBOARD_FOLDER), f".from-{first_step}"
    return tensorboardX.SummaryWriter(folder, purge_step=first_step, filename_suffix=suffix)


def _start_wandb(project: str, run_dir: pathlib.Path, config: dict[str, Any] | None) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(
            f"logging.wandb_project={project!r}: {error}; pip install 'oapl-jax[wandb]', or set it to null"
        ) from error
    # The id is kept with the run, so that a resumed run continues the same W&B run.
    id_file = run_dir / "wandb_id.txt"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:12])
    run = wandb.init(
        project=project, id=id_file.read_text(), resume="allow", name=run_dir.name, dir=str(run_dir), config=config
    )
    # W&B's own step cannot go back, which a resumed run does.
    run.define_metric("*", step_metric="step")
    return run


def _make_bar(stream: Any) -> rich.progress.Progress:
    column = rich.progress.TextColumn
    return rich.progress.Progress(
        column("{task.completed}/{task.total}"),
        rich.progress.BarColumn(bar_width=None),
        column("{task.fields[shown]} {task.fields[left]}", markup=False),
        console=rich.console.Console(file=stream, force_terminal=True),
        expand=True,
    )


def _describe(metrics: Metrics) -> list[str]:
    """One word group a column; together with step and time left they fit 80 characters."""
    columns = [column for column in _SHOWN if column[0] in metrics]
    columns = columns or [column for column in _SHOWN_WITHOUT_ROLLOUTS if column[0] in metrics]
    words = [f"{label} {float(metrics[name]):.{decimals}f}" for name, label, decimals in columns]
    if "learner/tokens_per_second" in metrics:
        words.append(f"{_short(float(metrics['learner/tokens_per_second']))} tok/s")
    return words


def _short(value: float) -> str:
    for limit, divisor, suffix in ((1e3, 1, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M")):
        if abs(value) < limit:
            return f"{value / divisor:.{0 if divisor == 1 else 1}f}{suffix}"
    return f"{value:.1e}"


def _time_left(first: tuple[int, float], last: tuple[int, float], total: int) -> str:
    steps, seconds = last[0] - first[0], last[1] - first[1]
    if steps <= 0:
        return "left -:--"
    left = round(seconds / steps * (total - last[0]))
    hours, minutes, seconds = left // 3600, left // 60 % 60, left % 60
    return f"left {hours}:{minutes:02}:{seconds:02}" if hours else f"left {minutes}:{seconds:02}"

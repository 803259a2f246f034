"""The report of a run: a self-contained HTML file, and its curves as a picture.

``python -m oapl_jax report RUN_DIR`` reads the run directory and writes ``report.html`` and ``curves.png`` into it.
Training calls ``write_report`` when it ends. The report of an unfinished or incomplete run says what is missing, and
which files of the rollout log cannot be read.
"""

import base64
import dataclasses
import io
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from oapl_jax.evaluation.plots import BLUE, GREEN, GREY, ORANGE, STYLE, log_axis
from oapl_jax.io import storage
from oapl_jax.io.metrics import METRICS_FILE, read_metrics
from oapl_jax.io.storage import SharedPath
from oapl_jax.io.terminal import visible
from oapl_jax.rollouts.log import RolloutLog
from oapl_jax.types import Metrics, RolloutGroup, RunError

REPORT_FILE = "report.html"
CURVES_FILE = "curves.png"

_GRID = {"left": 0.05, "right": 0.985, "bottom": 0.05, "top": 0.945, "wspace": 0.2, "hspace": 0.48}
"""Fixed: a layout that is computed draws everything twice."""
_SYNC = "#B9BEC6"
_STYLE: Any = STYLE | {
    "axes.edgecolor": GREY,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}
_SAMPLED_GROUPS = 2
_LONGEST_TEXT = 3000


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The contents of a run directory; a missing file leaves its field empty."""

    name: str
    config: str
    lines: list[Metrics]
    summary: dict[str, Any]
    samples: list[tuple[str, RolloutGroup]]
    """Groups of rollouts to show, from the first and the newest window, which the text names."""
    damaged: list[str]
    """Why rollouts of these windows could not be read."""


def write_report(run_dir: SharedPath) -> SharedPath:
    """Writes ``curves.png`` and ``report.html`` into the run directory and returns the path of the report.

    Raises:
        RunError: a file of the run is damaged, or the report cannot be written.
    """
    try:
        record = read_run(run_dir)
        picture = draw_curves(record)
        storage.replace(run_dir / CURVES_FILE, picture)
        storage.replace(run_dir / REPORT_FILE, visible(_render(record, picture)).encode())
    except Exception as error:  # whatever is in the files
        reason = str(error).partition("\n")[0]
        raise RunError(f"{run_dir}: no report was written: {type(error).__name__}: {reason}") from error
    return run_dir / REPORT_FILE


def read_run(run_dir: SharedPath) -> RunRecord:
    """Reads config.yaml, metrics.jsonl, summary.json and a few rollouts."""
    config, summary = run_dir / "config.yaml", run_dir / "summary.json"
    damaged: list[str] = []
    return RunRecord(
        name=run_dir.resolve().name,
        config=storage.read(config).decode("utf-8-sig") if storage.exists(config) else "",
        lines=read_metrics(run_dir / METRICS_FILE),
        summary=storage.read_object(summary) if storage.exists(summary) else {},
        samples=_read_samples(RolloutLog(run_dir / "rollouts"), damaged),
        damaged=damaged,
    )


def draw_curves(record: RunRecord) -> bytes:
    """Draws all panels as one PNG: results, fit of the regression, and progress of the run."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(13.5, 9.6), dpi=140)
        num_syncs = _series(record, "sync/seconds")[0].size
        for axes, (title, unit, draw) in zip(figure.subplots(3, 3, gridspec_kw=_GRID).flat, _PANELS, strict=True):
            axes.set_title(title, pad=22)
            unit = unit.format(num_syncs=num_syncs)
            axes.text(0, 1.035, unit, transform=axes.transAxes, color="#5B616B", fontsize=9)
            draw(axes, record)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_reward(axes: Axes, record: RunRecord) -> None:
    reward, pass_rate = (_series(record, f"rollouts/{name}")[1] for name in ("reward", "pass_rate"))
    names = {"reward": "rollouts/reward", "pass rate": "rollouts/pass_rate"}
    is_one = np.array_equal(reward, pass_rate)
    _draw_series(axes, record, {"reward (1 if correct)": "rollouts/reward"} if is_one else names)


def _draw_held_out(axes: Axes, record: RunRecord) -> None:
    """Evaluations during training, and those before and after it, which are in the summary."""
    ends = [
        {"step": step} | {f"evaluation/{name}": value for name, value in record.summary.get(when, {}).items()}
        for when, step in (("before", 0), ("after", record.summary.get("steps", 0)))
    ]
    names = {f"k = {k}": f"evaluation/pass@{k}" for k in (1, 4, 16)}
    whole = dataclasses.replace(record, lines=ends + record.lines)
    _draw_series(axes, whole, names, smooth=False, ylim=(0, 1.02), marker="o", markersize=4)


def _draw_pass_at_k(axes: Axes, record: RunRecord) -> None:
    curves = {when: _by_k(record.summary.get(when, {})) for when in ("before", "after")}
    for (when, by_k), color in zip(curves.items(), (GREY, BLUE), strict=True):
        if by_k:
            axes.plot(list(by_k), list(by_k.values()), "o-", color=color, markersize=4, label=when)
    if not axes.has_data():
        return _say_missing(axes, "summary.json")
    log_axis(axes, sorted({k for by_k in curves.values() for k in by_k}))
    axes.set_xlabel("k, samples per prompt")
    axes.set_ylim(0, 1.02)
    return _legend(axes)


def _draw_residual(axes: Axes, record: RunRecord) -> None:
    names = {"residual": "learner/residual", "advantage": "learner/advantage_abs"}
    _draw_series(axes, record, names, ylim=(0, None))


def _draw_log_ratio(axes: Axes, record: RunRecord) -> None:
    # A running mean would hide the drop to zero at each sync.
    names = {"mean": "learner/log_ratio", "mean |·|": "learner/log_ratio_abs"}
    _draw_series(axes, record, names, smooth=False, linewidth=1.2)
    if axes.has_data():
        axes.axhline(0, color=GREY, linewidth=0.8)


def _draw_time(axes: Axes, record: RunRecord) -> None:
    names = {"whole step": "learner/seconds", "waiting for rollouts": "learner/wait_seconds"}
    seconds = _series(record, "learner/seconds")[1]
    # The first step compiles, so it is left out of the scale.
    top = float(np.quantile(seconds[1:] if seconds.size > 1 else seconds, 0.98)) if seconds.size else 0
    _draw_series(
        axes, record, names, smooth=False, ylim=(0, 1.5 * top or None) if seconds.size else None, linewidth=1.2
    )


def _lines(names: dict[str, str], **options: Any) -> Callable[[Axes, RunRecord], None]:
    return lambda axes, record: _draw_series(axes, record, names, **options)


_LENGTHS = {"training": "rollouts/response_tokens", "held-out": "evaluation/response_tokens"}
_LAG = "learner steps since the sync; syncs: {num_syncs}"
_PANELS: tuple[tuple[str, str, Callable[[Axes, RunRecord], None]], ...] = (
    ("Reward of training rollouts", "mean over a batch", _draw_reward),
    ("Held-out pass@k", "share of prompts", _draw_held_out),
    ("Held-out pass@k, before and after", "share of prompts", _draw_pass_at_k),
    ("Residual of the regression", "mean |·|, reward units", _draw_residual),
    ("Log-ratio, learner to sampler", "nats per response", _draw_log_ratio),
    ("Entropy of the policy", "nats per token", _lines({"entropy": "learner/entropy"})),
    ("Lag of the sampler", _LAG, _lines({"lag": "window/lag"}, smooth=False)),
    ("Response length", "tokens", _lines(_LENGTHS)),
    ("Time of a learner step", "seconds", _draw_time),
)


def _draw_series(
    axes: Axes, record: RunRecord, names: dict[str, str], smooth: bool = True, ylim: Any = None, **options: Any
) -> None:
    """Draws lines over learner steps; a smoothed line is a running mean over the pale original."""
    for (label, name), color in zip(names.items(), (BLUE, ORANGE, GREEN), strict=False):
        steps, values = _series(record, name)
        if smooth and values.size >= 3:
            axes.plot(steps, values, color=color, alpha=0.22, linewidth=1)
            values = _running_mean(values)
        marker = {"marker": "o", "markersize": 4} if 0 < values.size < 3 else {}
        if values.size:
            axes.plot(steps, values, color=color, label=label, **(marker | options))
    if not axes.has_data():
        return _say_missing(axes, ", ".join(names.values()))
    axes.set_xlabel("learner step")
    axes.set_ylim(ylim)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    for step in _series(record, "sync/seconds")[0]:
        axes.axvline(step, color=_SYNC, linewidth=1, zorder=0.5)
    return _legend(axes) if len(axes.get_legend_handles_labels()[0]) > 1 else None


def _legend(axes: Axes) -> None:
    """Puts the legend beside the unit, above the data."""
    axes.legend(loc="lower right", bbox_to_anchor=(1.01, 0.995), ncols=3, handlelength=1.1, columnspacing=1.1)


def _say_missing(axes: Axes, what: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, f"not recorded\n{what}", transform=axes.transAxes, ha="center", va="center", color=GREY)


def _series(record: RunRecord, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of a metric, in the order of the steps."""
    found = {line["step"]: line[name] for line in record.lines if math.isfinite(line.get(name, math.nan))}
    steps = sorted(found)
    return np.array(steps, float), np.array([found[step] for step in steps], float)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over about a thirtieth of the run; the window is shorter at the ends."""
    half = values.size // 60
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(values.size)
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, values.size)
    return (sums[high] - sums[low]) / (high - low)


def _by_k(pass_at_k: dict[str, float]) -> dict[int, float]:
    return {int(name.removeprefix("pass@")): value for name, value in pass_at_k.items() if name.startswith("pass@")}


def _read_samples(log: RolloutLog, damaged: list[str]) -> list[tuple[str, RolloutGroup]]:
    """A few groups of the oldest and of the newest file that can be read; why others cannot goes to ``damaged``."""
    files = [(version, part) for version in log.versions() for part in log.parts(version)]
    found: dict[str, list[RolloutGroup]] = {}
    for label, end in (("first window", 0), ("newest window", -1)):
        while files and label not in found:
            file = files.pop(end)
            try:
                found[label] = log.read_part(*file)[:_SAMPLED_GROUPS]
            except Exception as error:  # a file may be damaged in any way, and the page has more than its rollouts
                path = f"{log.path(*file)}: "
                damaged.append(path + str(error).removeprefix(path))
    return [(label if len(found) > 1 else "", group) for label, groups in found.items() for group in groups]


def _shorten(text: str) -> str:
    if len(text) <= _LONGEST_TEXT:
        return text
    half = _LONGEST_TEXT // 2
    return f"{text[:half]}\n… {len(text) - 2 * half:,} characters omitted …\n{text[-half:]}"


def _render(record: RunRecord, picture: bytes) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"number": _number, "duration": _duration, "shortened": _shorten}
    template = environment.from_string(pathlib.Path(__file__).with_name("report.html.jinja").read_text("utf-8"))
    before, after = (_by_k(record.summary.get(when, {})) for when in ("before", "after"))
    return template.render(
        run=record,
        before=before,
        after=after,
        ks=sorted(before | after),
        last_step=int(record.lines[-1]["step"]) if record.lines else None,
        picture=base64.b64encode(picture).decode(),
    )


def _number(value: float | None, decimals: int = 3) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:,.{decimals}f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"

"""Plots of scores: pass@k over k, differences from a baseline, and pass@k over the versions of a run; their style."""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

from oapl_jax.evaluation.scores import Score, Value, shown_ks
from oapl_jax.io import storage
from oapl_jax.io.storage import SharedPath
from oapl_jax.io.terminal import visible

PASS_FILE, DIFFERENCE_FILE, VERSIONS_FILE = "passk.png", "difference.png", "versions.png"

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8F98")
BLUE, ORANGE, GREEN, *_, GREY = COLOURS
"""The palette of Okabe and Ito, which colour-blind people can distinguish, and a grey."""

STYLE: Any = {
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E8EB",
    "legend.frameon": False,
    "text.parse_math": False,
}
"""Parameters for ``matplotlib.rc_context``."""

_MARKERS = "osD^vPX"
_COLUMNS = 3


def draw_pass(path: SharedPath, scores: Sequence[Score]) -> None:
    """Draws pass@k over k: a panel for each benchmark and the average, a line with its interval for each policy."""
    curves = {(item.benchmark, item.label): item.of("pass") for item in scores}
    _draw(path, curves, "pass@k: chance that one of k samples is correct; band: 95 % over problems")


def draw_differences(path: SharedPath, comparisons: Sequence[Score]) -> None:
    """Draws the paired difference of pass@k from the baseline, over k."""
    curves = {(item.benchmark, item.label): list(item.values) for item in comparisons}
    title = f"pass@k minus that of {name(comparisons[0].baseline)}; band: 95 %, paired over problems"
    _draw(path, curves, title, is_difference=True)


def draw_versions(path: SharedPath, scores: Mapping[int, Sequence[Score]]) -> None:
    """Draws pass@1 and pass@k of the largest k over the versions of a run: a panel for each benchmark."""
    benchmarks = list(dict.fromkeys(item.benchmark for members in scores.values() for item in members))
    title = "pass@k over the versions of the run; bars: 95 % over problems"
    with _panels(path, benchmarks, title) as (_, panels):
        for axes, benchmark in zip(panels, benchmarks, strict=True):
            found = {
                v: item.of("pass") for v, members in scores.items() for item in members if item.benchmark == benchmark
            }
            ks = sorted({1, min(values[-1].k for values in found.values())})
            for k, colour, marker in zip(ks, COLOURS, _MARKERS, strict=False):
                values = [members[k - 1] for members in found.values()]
                mean = np.array([value.value for value in values])
                error = np.array([[v.value - v.low for v in values], [v.high - v.value for v in values]])
                axes.errorbar(
                    list(found), mean, np.maximum(error, 0), label=f"k = {k}", color=colour, marker=marker, capsize=3
                )
            axes.set_xlabel("step or policy version")
            axes.legend()


def _draw(
    path: SharedPath, curves: dict[tuple[str, str], list[Value]], title: str, *, is_difference: bool = False
) -> None:
    benchmarks, labels = (list(dict.fromkeys(key[i] for key in curves)) for i in (0, 1))
    with _panels(path, benchmarks, title) as (figure, panels):
        for axes, benchmark in zip(panels, benchmarks, strict=True):
            for i, label in enumerate(labels, start=is_difference):  # the baseline has the first colour
                if curves.get((benchmark, label)):
                    _curve(axes, curves[benchmark, label], label, i)
            max_k = max(value.k for (shown, _), values in curves.items() for value in values if shown == benchmark)
            log_axis(axes, [2**i for i in range(max_k.bit_length())])
            axes.set_xlabel("k")
            if is_difference:
                axes.axhline(0, color="#4A4F57", linewidth=1)
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 4))


def _curve(axes: Axes, values: Sequence[Value], label: str, i: int) -> None:
    """Draws a line with markers at the powers of two."""
    ks, colour = [value.k for value in values], COLOURS[i % len(COLOURS)]
    marks = [i for i, k in enumerate(ks) if k in shown_ks(ks[-1])]
    axes.plot(
        ks,
        [value.value for value in values],
        label=name(label),
        color=colour,
        marker=_MARKERS[i % len(_MARKERS)],
        markevery=marks,
        markersize=4.5,
        linestyle="-" if i < len(COLOURS) else "--",
    )
    axes.fill_between(ks, [v.low for v in values], [v.high for v in values], color=colour, alpha=0.14, linewidth=0)


@contextlib.contextmanager
def _panels(path: SharedPath, benchmarks: Sequence[str], title: str) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure with one panel for each benchmark, which is saved when they are drawn."""
    columns = min(len(benchmarks), _COLUMNS)
    rows = -(-len(benchmarks) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(4.6 * columns, 6.4), 3.6 * rows + 0.9), dpi=140, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for panel in axes[len(benchmarks) :]:
            panel.remove()
        for panel, benchmark in zip(axes, benchmarks, strict=False):
            panel.set_title(name(benchmark))
            panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        yield figure, axes[: len(benchmarks)]
        content = io.BytesIO()
        figure.savefig(content, format="png")
        storage.replace(path, content.getvalue())


def name(text: str) -> str:
    """A label, a title: its end left out where it is long; matplotlib hides what begins with an underscore."""
    shown = visible(text).replace("\n", " ")
    return (" " if shown[:1] in ("", "_") else "") + (shown if len(shown) < 50 else f"{shown[:48]}…")


def log_axis(axes: Axes, ks: Sequence[int]) -> None:
    """A logarithmic axis of k with ticks at these values."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda k, _: f"{k:g}"))

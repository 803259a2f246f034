"""The main curves of a run as one PNG, for notebooks and README files."""

import io
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from oapl_jax.evaluation.plots import COLOURS, GREY, STYLE
from oapl_jax.report.curves import PANELS, PICTURED, Metrics, Panel

_STYLE: Any = STYLE | {"axes.edgecolor": GREY, "legend.fontsize": 9, "lines.linewidth": 1.6}
_SYNC, _UNIT = "#D5D8DD", "#5B616B"
_MOST_SYNCS = 100
_GRID = {"left": 0.05, "right": 0.985, "bottom": 0.05, "top": 0.965, "wspace": 0.18, "hspace": 0.32}
"""Fixed: a layout that is computed draws everything twice."""


def draw(metrics: Metrics) -> bytes:
    """A panel for each of the first ``PICTURED`` of the page; grey lines are syncs, unless they would fill it."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(13.5, 9.6), dpi=140)
        for axes, panel in zip(figure.subplots(3, 3, gridspec_kw=_GRID).flat, PANELS[:PICTURED], strict=True):
            axes.set_title(f"{panel.title}, {panel.unit}", fontsize=10)
            _draw(axes, panel, metrics)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw(axes: Axes, panel: Panel, metrics: Metrics) -> None:
    for (label, name), colour in zip(panel.metrics.items(), COLOURS, strict=False):
        if name in metrics.curves:
            points = metrics.curves[name].points()
            axes.plot(
                points["x"],
                points["y"],
                color=colour,
                label=label,
                marker="o" if len(points["x"]) < 30 else "",
                markersize=4,
            )
    if not axes.has_data():
        axes.set_axis_off()
        axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=_UNIT)
        return
    axes.set_xlabel("learner step")
    for step in metrics.syncs if len(metrics.syncs) <= _MOST_SYNCS else ():
        axes.axvline(step, color=_SYNC, linewidth=1, zorder=0.5)
    if len(axes.lines) > 1:
        axes.legend()

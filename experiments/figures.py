"""Figures of a grid: learning curves, and pass@k over k, as means over runs with their standard errors."""

import pathlib
from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from experiments.claims import Pair
from experiments.grid import Figure
from experiments.records import Record
from oapl_jax.evaluation.plots import COLOURS, STYLE, log_axis
from oapl_jax.evaluation.scores import shown_ks


def draw(path: pathlib.Path, figure: Figure, records: Mapping[str, Mapping[Pair, Record]]) -> bool:
    """Draws a figure of the arms that have runs; returns whether there is one."""
    arms = [name for name in figure.arms if records[name]]
    if not arms:
        return False
    with matplotlib.rc_context(STYLE):
        canvas = Canvas(figsize=(6.4, 4.0), dpi=140, layout="constrained")
        axes = canvas.subplots()
        axes.set_title(figure.title)
        for colour, name in zip(COLOURS, arms, strict=False):
            members = list(records[name].values())
            if figure.kind == "curve":
                x, lines = _curves(members, figure.metric)
            else:
                num = min(len(member.pass_at[-1]) for member in members)
                x, lines = np.arange(num) + 1, np.array([member.pass_at[-1][:num] for member in members])
            _band(axes, x, lines, colour, name)
        if figure.kind == "curve":
            axes.set_xlabel("rollouts learned from")
            axes.set_ylabel("nats a response" if figure.metric == "entropy" else f"held-out {figure.metric}")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")
        else:
            starts = [member for name in arms for member in records[name].values()]
            num = min(len(member.pass_at[0]) for member in starts)
            lines = np.array([member.pass_at[0][:num] for member in starts])
            _band(axes, np.arange(num) + 1, lines, COLOURS[-1], "before training")
            log_axis(axes, [k for k in shown_ks(num) if k.bit_count() == 1])
            axes.set_xlabel("k")
            axes.set_ylabel("held-out pass@k")
        axes.legend()
        canvas.savefig(path)
    return True


def _curves(members: list[Record], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Rollouts, and a line for each run; the entropy as means over thirty parts of the steps."""
    if metric != "entropy":
        return members[0].rollouts, np.array([member.curve(metric) for member in members])
    parts = [np.array_split(member.entropies, 30) for member in members]
    x = np.linspace(0, members[0].rollouts[-1], 31)
    return (x[1:] + x[:-1]) / 2, np.array([[part.mean() for part in member] for member in parts])


def _band(axes: Axes, x: np.ndarray, lines: np.ndarray, colour: str, label: str) -> None:
    mean = lines.mean(axis=0)
    axes.plot(x, mean, color=colour, label=label)
    if len(lines) > 1:
        error = lines.std(axis=0, ddof=1) / np.sqrt(len(lines))
        axes.fill_between(x, mean - error, mean + error, color=colour, alpha=0.16, linewidth=0)

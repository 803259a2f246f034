"""The style of all plots."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from oapl_jax.io.terminal import visible

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

"""The style of all plots."""

from typing import Any

BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, GREY = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7"),
    *("#E69F00", "#56B4E9", "#8A8F98"),
)
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
}
"""Parameters for ``matplotlib.rc_context``."""

"""Style of all pictures of the bench."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from snapengine.report.plots import GREY

# Okabe and Ito's palette: told apart with any colour vision.
OURS, FLOOR, OTHER, FOURTH = "#0072B2", "#D55E00", "#009E73", "#CC79A7"


def new_figure(width: float, height: float, title: str) -> Figure:
    """A figure with a title."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=GREY)
    return figure


def clean(axes: Axes, grid: str) -> None:
    """Remove top and right borders, and add a light grid."""
    axes.grid(axis=grid, color="#dddddd", linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)

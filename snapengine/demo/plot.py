"""The picture of the demo: image size and time over the write rate, by both methods. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from snapengine.demo.rows import Row
from snapengine.options import WRITE_TRACKING
from snapengine.report.plots import GREY, MIB, STYLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def tick(row: Row) -> float:
    """The key of the row's place on the axis: all runs at full speed share one tick."""
    return math.inf if row.at_most else row.write_rate


def tick_label(row: Row) -> str:
    """A write rate as a tick label: ``0``, ``2k``, ``40k``, ``max (1.2M)``."""
    rate = row.write_rate
    text = (
        f"{rate / 1e6:.1f}M" if rate >= 999_500 else f"{rate / 1e3:.3g}k" if rate >= 1000 else f"{rate:.0f}"
    )
    return f"max\n({text})" if row.at_most else text


def _lines(axes: Axes, rows: Sequence[Row], ticks: dict[float, str], values: Sequence[float]) -> None:
    """One line per method over evenly spaced rates; a hollow marker where the capture gave up."""
    places = {rate: place for place, rate in enumerate(ticks)}
    for method, (color, marker) in STYLES.items():
        points = [
            (places[tick(row)], value, row.completed)
            for row, value in zip(rows, values, strict=True)
            if row.result.method == method
        ]
        if not points:
            continue
        xs, ys, done = zip(*points, strict=True)
        axes.plot(xs, ys, color=color, linewidth=2, zorder=2)
        for x, y, completed in points:
            axes.plot(x, y, marker, color=color, markerfacecolor=color if completed else "white",
                      markersize=8, markeredgewidth=2, zorder=3)  # fmt: skip
        axes.annotate(method, (xs[-1], ys[-1]), xytext=(10, 0), textcoords="offset points",
                      color=color, va="center", fontweight="bold", annotation_clip=False)  # fmt: skip
        if not all(done):
            x, y = next((x, y) for x, y, completed in points if not completed)
            axes.annotate("gave up: no image", (x, y), xytext=(-10, 6), textcoords="offset points",
                          color=color, ha="right", va="bottom")  # fmt: skip


def _nonzero_line(axes: Axes, rows: Sequence[Row], ticks: dict[float, str]) -> None:
    """The least size of an image at each rate: the bytes that were not zero at T."""
    nonzero = {tick(row): row.result.nonzero_bytes / MIB for row in rows}
    # The two methods save different instants; that of write tracking is nearer to the start.
    nonzero |= {
        tick(row): row.result.nonzero_bytes / MIB for row in rows if row.result.method == WRITE_TRACKING
    }
    values = [nonzero[rate] for rate in ticks]
    axes.plot(values, color=GREY, linestyle="--", linewidth=1.5, zorder=2.5)
    axes.annotate("memory that is not zero", (0, values[0]), xytext=(0, -6), textcoords="offset points",
                  color=GREY, va="top")  # fmt: skip


def _frame(axes: Axes, ticks: dict[float, str], title: str, ylabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=13)
    axes.set_xticks(range(len(ticks)), list(ticks.values()))
    axes.set_xlabel("pages that the guest writes per second")
    axes.set_ylabel(ylabel)
    axes.set_xlim(-0.3, len(ticks) - 0.7)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.08)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw(rows: Sequence[Row], path: str, subtitle: str = "") -> None:
    """Draw `rows` into `path`; the suffix selects the format (PNG, SVG, PDF)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    ticks = {tick(row): tick_label(row) for row in reversed(rows)}  # the first of two rates with one tick
    ticks = dict(reversed(ticks.items()))
    # The rectangle leaves room for the labels at the ends of the lines.
    figure = Figure(figsize=(11, 8), layout=ConstrainedLayoutEngine(rect=(0, 0, 0.97, 1)))
    FigureCanvasAgg(figure)  # no window system, and no global state of pyplot
    size, time = figure.subplots(2, 1)

    _lines(size, rows, ticks, [row.result.image_bytes / MIB for row in rows])
    _nonzero_line(size, rows, ticks)
    _frame(size, ticks, "Size of the image", "MiB written")

    _lines(time, rows, ticks, [row.result.duration_ns / 1e9 for row in rows])
    _frame(time, ticks, "Time until the image was complete or the capture gave up", "seconds")
    if subtitle:
        figure.suptitle(subtitle, x=0.01, ha="left", fontsize=11, color=GREY)
    figure.savefig(path, dpi=110)

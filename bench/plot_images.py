"""Image size over write rate; a panel per sink rate, a line per method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from plotkit import clean, new_figure

from snapengine.options import METHODS, MIB, WRITE_TRACKING
from snapengine.report.plots import STYLES
from snapengine.result import COMPLETED


def rate_label(rate: int | None) -> str:
    """Pages per second, short."""
    return "max" if rate is None else f"{rate // 1000}k" if rate else "0"


def by_rate(info: dict[str, Any]) -> float:
    """A sort key: "max" is last."""
    return math.inf if info["write_rate"] is None else info["write_rate"]


def ratio_of(info: dict[str, Any]) -> float:
    """Image / bytes that are not zero."""
    (ratio,) = info["samples"][f"{info['method'].replace('-', '_')}_ratio"]
    return float(ratio)


def draw_line(axes: Axes, infos: Sequence[dict[str, Any]], method: str, rates: Sequence[float]) -> None:
    """One method at one sink rate; a hollow marker where it gave up."""
    color, marker = STYLES[method]
    rows = sorted((info for info in infos if info["method"] == method), key=by_rate)
    if not rows:
        return
    xs, ratios = [rates.index(by_rate(info)) for info in rows], [ratio_of(info) for info in rows]
    axes.plot(xs, ratios, color=color, linewidth=2, zorder=2)
    for x, info in zip(xs, rows, strict=True):
        face = color if info["status"] == COMPLETED else "white"
        axes.plot(x, ratio_of(info), marker, color=color, markerfacecolor=face, markersize=8,
                  markeredgewidth=2, zorder=3)  # fmt: skip
    place = {"xytext": (-2, -18)} if method == WRITE_TRACKING else {"xytext": (-12, 6)}
    axes.annotate(method, (xs[-1], ratios[-1]), color=color, ha="right", textcoords="offset points",
                  fontweight="bold", **place)  # fmt: skip
    end = f"{ratios[-1]:.3f}" if ratios[-1] < 1.1 else f"{ratios[-1]:.1f}"
    axes.annotate(end, (xs[-1], ratios[-1]), xytext=(9, 0), color=color, va="center",
                  textcoords="offset points", annotation_clip=False)  # fmt: skip


def draw_images(infos: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the picture into `path`."""
    sinks = sorted({info["sink_rate"] for info in infos}, key=lambda rate: -(rate or math.inf))
    rates = sorted({*map(by_rate, infos)})
    ticks = [rate_label(None if rate == math.inf else int(rate)) for rate in rates]
    size = infos[0]["size"] // MIB
    title = f"Size of the image of a guest with {size} MiB (hollow: gave up, no image)"
    figure = new_figure(4.2 * len(sinks), 4.6, title)
    panels = figure.subplots(1, len(sinks), sharey=True, squeeze=False)[0]
    for axes, sink in zip(panels, sinks, strict=True):
        for method in METHODS:
            draw_line(axes, [info for info in infos if info["sink_rate"] == sink], method, rates)
        axes.set_title(f"sink: {f'{sink // MIB} MiB/s' if sink else 'no limit'}", loc="left", fontsize=12)
        axes.set_yscale("log", base=2)
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set_xlim(-0.3, len(ticks) - 0.4)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        clean(axes, "y")
    panels[0].set_ylim(0.8, max(2.0, max(ratio_of(info) for info in infos) * 1.3))
    panels[0].set_ylabel("image / bytes that are not zero")
    figure.supxlabel("pages that the guest writes per second", fontsize=10)
    figure.savefig(path, dpi=110)

"""Histogram of the writer's stalls after T, and the floor's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plotkit import FLOOR, OURS, clean, new_figure
from writerkit import quantile

from snapengine.base.units import format_ns
from snapengine.options import MIB

LABELS = {
    "ours": ("ours, as the writer measures it", OURS),
    "floor": ("floor: one blocked handler per core", FLOOR),
}
BUCKETS_PER_STEP = 1.125  # 8 buckets per power of two: the largest ratio of two neighbours


def shares(histogram: dict[int, int]) -> tuple[list[float], list[float]]:
    """Edges and heights of a step line; a height is a share of all values."""
    total = sum(histogram.values())
    edges, heights = [], []
    for floor, count in sorted(histogram.items()):
        if edges and floor > edges[-1] * BUCKETS_PER_STEP * 1.01:  # empty buckets between
            edges.append(edges[-1] * BUCKETS_PER_STEP)
            heights.append(0.0)
        edges.append(float(floor))
        heights.append(count / total)
    return edges, heights


def draw_stalls(infos: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a panel per guest size. Both axes are logarithmic, so that the few long stalls show."""
    infos = sorted(infos, key=lambda info: info["size"])
    title = "How long a write waits while a snapshot is saved (shares of all stalls, after T)"
    figure = new_figure(5.6 * len(infos), 4.6, title)
    panels = figure.subplots(1, len(infos), sharey=True, sharex=True, squeeze=False)[0]
    for axes, info in zip(panels, infos, strict=True):
        for name, (label, color) in LABELS.items():
            histogram = {int(floor): count for floor, count in info["histograms"][name]}
            if not histogram:
                continue
            edges, heights = shares(histogram)
            axes.step(edges, heights, where="post", color=color, linewidth=1.5, label=label)
            p99 = quantile(histogram, 0.99)
            axes.axvline(p99, color=color, linewidth=1, linestyle=":")
            place = (p99, 0.97 if name == "ours" else 0.90)
            axes.annotate(f" p99 {format_ns(p99)}", place, xycoords=("data", "axes fraction"), color=color,
                          fontsize=9)  # fmt: skip
        axes.set_title(f"guest of {info['size'] // MIB} MiB", loc="left", fontsize=12)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: format_ns(round(value)))
        clean(axes, "both")
    panels[0].set_ylabel("share of stalls")
    panels[0].legend(frameon=False, fontsize=9, loc="upper right", bbox_to_anchor=(1.0, 0.86))
    figure.supxlabel("time of one write", fontsize=10)
    figure.savefig(path, dpi=110)

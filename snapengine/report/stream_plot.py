"""The picture of an analysis: how often pages were sent, and the sizes. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from snapengine.base.units import format_size
from snapengine.report.plots import GREY, MIB, STYLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from snapengine.qemu.analyze import Analysis

BLUE, ORANGE = (color for color, _ in STYLES.values())
BINS_MAX = 24


def bins(times_sent: dict[int, int]) -> dict[str, int]:
    """The histogram with at most 24 bars: what was sent more often is one bar."""
    if len(times_sent) <= BINS_MAX:
        return {str(times): pages for times, pages in times_sent.items()}
    items = sorted(times_sent.items())
    shown = dict((str(times), pages) for times, pages in items[: BINS_MAX - 1])
    return shown | {f"≥ {items[BINS_MAX - 1][0]}": sum(pages for _, pages in items[BINS_MAX - 1 :])}


def size_rows(analysis: Analysis) -> list[tuple[str, int]]:
    """(what, bytes): the stream, and the images."""
    names = {"none": "image"}
    images = [(names.get(way, f"image, {way}"), size) for way, size in analysis.image_bytes.items()]
    return [("stream", analysis.stream_bytes), *images]


def _bare(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=13)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw(analysis: Analysis, path: str) -> None:
    """Draw the analysis into `path`; the suffix says the form (PNG, SVG, PDF)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    often, sizes = figure.subplots(2, 1, height_ratios=(3, 2))

    counts = bins(analysis.times_sent)
    bars = often.bar(list(counts), list(counts.values()), color=BLUE)
    often.bar_label(bars, [f"{count:,}".replace(",", " ") for count in counts.values()], color=GREY)
    often.set_yscale("log")
    often.set_ylim(0.5, max(counts.values()) * 3)
    often.set_xlabel("times that a page is in the stream")
    often.set_ylabel("pages")
    _bare(often, f"{Path(path).stem}: pages by how often they were sent")

    rows = size_rows(analysis)[::-1]
    bars = sizes.barh([what for what, _ in rows], [size / MIB for _, size in rows],
                      color=[BLUE] * (len(rows) - 1) + [ORANGE])  # fmt: skip
    sizes.bar_label(bars, [format_size(size) for _, size in rows], padding=4, color=GREY)
    sizes.set_xlabel("MiB")
    _bare(sizes, "Size")
    figure.savefig(path, dpi=110)

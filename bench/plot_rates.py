"""Copy rate over the size of the memory; time per page over pages per call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from plotkit import FLOOR, FOURTH, OTHER, OURS, clean, new_figure

from snapengine.base.units import format_size

LINES = {"capture_ns": ("ours: arming, saving, release", OURS), "memcpy_ns": ("memcpy, one thread", FLOOR)}
PAGE = 4096
BATCHES = {"1_page": 1, "16_pages": 16, "64_pages": 64, "512_pages": 512, "64_mib": 16384}
CALLS = {"protect": OURS, "unprotect": FLOOR, "vm_read": OTHER}
NAMES = {"protect": "protect", "unprotect": "un-protect", "vm_read": "process_vm_readv, with the copy"}


def _line(axes: Axes, points: Sequence[tuple[int, list[float]]], label: str, color: str) -> None:
    """A line of medians over the range of the rounds."""
    places, rounds = [place for place, _ in points], [values for _, values in points]
    axes.plot(places, [median(values) for values in rounds], "o-", color=color, label=label)
    lowest, highest = [min(values) for values in rounds], [max(values) for values in rounds]
    axes.fill_between(places, lowest, highest, color=color, alpha=0.15, linewidth=0)


def draw_sizes(info: dict[str, Any], path: Path) -> None:
    """Draw the copy rates of captures and memcpy over size."""
    sizes = sorted(int(length) for length in info["by_size"])
    figure = new_figure(7, 4.6, "Copy rate of idle memory into the null sink (medians, ranges)")
    axes = figure.subplots()
    for name, (label, color) in LINES.items():
        rates = [[length / taken for taken in info["by_size"][str(length)][name]] for length in sizes]
        _line(axes, list(zip(sizes, rates, strict=True)), label, color)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [format_size(length) for length in sizes])
    axes.set_ylim(bottom=0)
    axes.set_ylabel("GB/s")
    axes.set_xlabel("size of the memory")
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    clean(axes, "y")
    figure.savefig(path, dpi=110)


def page_costs(samples: dict[str, list[float]], call: str) -> list[tuple[int, list[float]]]:
    """(Pages per call, nanoseconds per page in each round) for the samples that exist."""
    found = []
    for name, pages in BATCHES.items():
        if f"{call}_{name}_ns" in samples:
            found.append((pages, [ns / pages for ns in samples[f"{call}_{name}_ns"]]))
        elif f"{call}_{name}_rate" in samples:
            found.append((pages, [PAGE * 1e9 / rate for rate in samples[f"{call}_{name}_rate"]]))
    return found


def draw_batches(samples: dict[str, list[float]], path: Path) -> bool:
    """Draw time per page over pages per call. Returns False if `samples`, of all floors, have none."""
    lines = {call: costs for call in CALLS if (costs := page_costs(samples, call))}
    if not lines:
        return False
    figure = new_figure(7, 4.6, "Time per 4 KiB page over pages per call (medians, ranges)")
    axes = figure.subplots()
    for call, costs in lines.items():
        _line(axes, costs, NAMES[call], CALLS[call])
    for word, marker in (("protect", "s"), ("unprotect", "D")):
        values = samples.get(f"{word}_huge_page_ns")
        if values:
            label = f"{NAMES[word]}, in huge pages"
            axes.plot(512, median(values) / 512, marker, color=FOURTH, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({pages for costs in lines.values() for pages, _ in costs})
    axes.set_xticks(ticks, [str(pages) for pages in ticks])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("pages per call")
    axes.set_ylabel("ns per page")
    axes.legend(frameon=False, fontsize=9)
    clean(axes, "both")
    figure.savefig(path, dpi=110)
    return True

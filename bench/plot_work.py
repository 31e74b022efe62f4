"""Writes of the guest per 10 ms around a snapshot: by our engine, and by fork and copy-on-write."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from plotkit import FLOOR, OURS, clean, new_figure

from snapengine.options import MIB

PANELS = {
    "attach": ("ours, attached, into a tmpfs", OURS),
    "fork": ("fork and copy-on-write, the child writes the file", FLOOR),
}


def draw_work(info: dict[str, Any], path: Path) -> None:
    """Draw the last round, a panel per way."""
    title = f"Pages that a guest of {info['size'] // MIB} MiB writes, per 10 ms, at full speed over all of it"
    figure = new_figure(9, 5.6, title)
    panels = figure.subplots(len(PANELS), 1, sharex=True, sharey=True)
    for axes, (name, (label, color)) in zip(panels, PANELS.items(), strict=True):
        work = info["work"][name]
        times, ended = [at / 1e9 for at in work["at_ns"]], work["ended_ns"] / 1e9
        axes.step(times[:-1], work["writes"][:-1], where="post", color=color, linewidth=1)
        axes.axvspan(0, ended, color="#eeeeee", zorder=0)
        lost = median(info["samples"][f"{name}_lost_ns"]) / 1e6
        title = f"{label}: {ended:.2f} s (grey); work of {lost:.0f} ms lost (median)"
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("pages in 10 ms")
        clean(axes, "y")
    panels[-1].set_xlabel("seconds since the snapshot began")
    figure.savefig(path, dpi=110)

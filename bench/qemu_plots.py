"""Draw what `make bench-qemu` measured: `python bench/qemu_plots.py [FILE.json [DIRECTORY]]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from plotkit import clean, new_figure
from qemu_names import BACKGROUND, MAIN, OURS, WAYS

from snapengine.options import MIB

# Okabe and Ito's palette; ours in blues and green.
COLORS = dict(
    zip(WAYS, ("#D55E00", "#E69F00", "#CC79A7", "#0072B2", "#56B4E9", "#000000", "#009E73"), strict=True)
)
MARKERS = dict(zip(WAYS, "sDvoP^X", strict=True))
PARTS = {"stop": "#999999", "device_state": "#E69F00", "arm": "#0072B2", "cont": "#56B4E9"}
BIN_S = 0.01
Info = dict[str, Any]


def draw_images(infos: Sequence[Info], path: Path) -> None:
    """Image size over hot set: a panel per sink rate, a line per way."""
    infos = [info for info in infos if info["huge"]]
    sinks, hots = sorted({info["sink_rate"] for info in infos}), sorted({info["hot"] for info in infos})
    title = "Image of a running QEMU machine (hollow: gave up, no image)"
    figure = new_figure(4.6 * len(sinks) + 2, 4.6, title)
    panels = figure.subplots(1, len(sinks), sharey=True, squeeze=False)[0]
    for axes, sink in zip(panels, sinks, strict=True):
        for way in WAYS:
            points = [
                (hots.index(info["hot"]), info["runs"][way])
                for info in infos
                if info["sink_rate"] == sink and way in info["runs"]
            ]
            if not points:
                continue
            sizes = [median(run["image_bytes"] for run in runs) / MIB for _, runs in points]
            axes.plot([x for x, _ in points], sizes, color=COLORS[way], label=way)
            for (x, runs), size in zip(points, sizes, strict=True):
                face = COLORS[way] if all(run["completed"] for run in runs) else "white"
                axes.plot(x, size, MARKERS[way], color=COLORS[way], markerfacecolor=face, markersize=7)
        axes.set_title(f"sink: {f'{sink // MIB} MiB/s' if sink else 'no limit'}", loc="left", fontsize=12)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xticks(range(len(hots)), [f"{hot // MIB}" for hot in hots])
        clean(axes, "y")
    panels[0].set_ylabel("image, MiB")
    figure.supxlabel("hot set, MiB", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def draw_work(info: Info, path: Path) -> None:
    """Writes of the guest per 10 ms around a snapshot by QEMU and by our engine, on the same axes."""
    figure = new_figure(9, 5.6, f"Pages the guest writes, per 10 ms; hot set {info['hot'] // MIB} MiB")
    panels = figure.subplots(2, 1, sharex=True, sharey=True)
    for axes, way in zip(panels, (BACKGROUND, OURS), strict=True):
        runs = sorted(info["runs"][way], key=lambda run: run["total_ns"])
        run = runs[len(runs) // 2]
        before, during = run["bins_before"], run["bins"]
        times = [BIN_S * (at - len(before)) for at in range(len(before) + len(during))]
        pages = [rate * BIN_S for rate in (*before, *during)]
        axes.step(times, pages, where="post", color=COLORS[way], linewidth=1)
        axes.axvspan(0, run["total_ns"] / 1e9, color="#eeeeee", zorder=0)
        axes.set_title(f"{way}: {run['total_ns'] / 1e9:.1f} s (grey)", loc="left", fontsize=11)
        axes.set_ylim(bottom=0)
        clean(axes, "y")
    panels[1].set_xlabel("seconds since the snapshot began")
    figure.savefig(path, dpi=110)


def draw_stops(infos: Sequence[Info], path: Path) -> None:
    """How long the guest was stopped, by way, and the parts of our stop."""
    title = "How long the guest was stopped (medians; hot set 127 MiB, sink without limit)"
    figure = new_figure(11, 3.8, title)
    left, right = figure.subplots(1, 2)
    main = next(info for info in infos if info["huge"])
    for way, runs in reversed(main["runs"].items()):
        stops = [run["stop_ns"] / 1e6 for run in runs if run["completed"] and run["stop_ns"] is not None]
        if stops:
            left.barh(way, median(stops), color=COLORS[way])
            left.annotate(f"{median(stops):.1f}", (median(stops), way), xytext=(4, 0), va="center",
                          textcoords="offset points")  # fmt: skip
    left.set_xscale("log")
    left.set_xlabel("ms, by QEMU's account")
    for info in infos:
        at, label = 0.0, f"ours, {'huge' if info['huge'] else '4 KiB'} pages"
        for part, color in PARTS.items():
            spent = median(run["stop_parts_ns"][part] / 1e6 for run in info["runs"][OURS])
            right.barh(label, spent, left=at, color=color, label=part if info is main else None)
            at += spent
    right.set_xlabel("ms, by our clock")
    right.legend(frameon=False, fontsize=9)
    for axes in (left, right):
        clean(axes, "x")
    figure.savefig(path, dpi=110)


def main(source: str = "build/bench-qemu.json", directory: str = "build/bench") -> None:
    """Draw every picture that there is data for."""
    infos = [bench["extra_info"] for bench in json.loads(Path(source).read_text())["benchmarks"]]
    judged = [info for info in infos if info["hot"] == MAIN and not info["sink_rate"]]
    room = Path(directory)
    room.mkdir(parents=True, exist_ok=True)
    draw_images(infos, room / "qemu-images.png")
    if any(info["huge"] for info in judged):
        draw_work(next(info for info in judged if info["huge"]), room / "qemu-work.png")
        draw_stops(judged, room / "qemu-stops.png")
    print(*sorted(room.glob("qemu-*.png")), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

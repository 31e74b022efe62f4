"""Print what `make bench-peers` measured: `python bench/peer_report.py [build/bench-peers.json]`.

First every way over the sinks, then what must be reached.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from report import GIB, Figure, figure_table, make_table
from rich.console import Console
from rich.table import Table

from snapengine.base.units import format_ns, format_size
from snapengine.options import MIB

OURS, QEMU, FORKD = "ours", "qemu-shape", "forkd-shape"
Run = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Must:
    """A figure of each round: of our run and the peer's of the same round."""

    peer: str
    name: str
    must: str
    limit: float
    value: Callable[[Run, Run], float]
    at_least: bool = False


MUSTS = (
    Must(QEMU, "rate / QEMU-shape's", "≥ 6", 6, lambda ours, peer: peer["total_ns"] / ours["total_ns"], True),
    Must(QEMU, "stall p99 / QEMU-shape's", "≤ 1", 1,
         lambda ours, peer: ours["stall_p99_ns"] / max(peer["stall_p99_ns"], 1)),
    Must(FORKD, "longest stall / forkd-shape's", "≤ 0.02", 0.02,
         lambda ours, peer: ours["stall_longest_ns"] / max(peer["stall_longest_ns"], 1)),
    Must(FORKD, "  ours without the wait for T", "≤ 0.02", 0.02,
         lambda ours, peer: ours["stall_longest_after_t_ns"] / max(peer["stall_longest_ns"], 1)),
)  # fmt: skip


def judged(infos: Sequence[dict[str, Any]]) -> list[Figure]:
    """What must be reached, for each sink."""
    found = []
    for info in infos:
        for must in MUSTS:
            pairs = zip(info["runs"][OURS], info["runs"][must.peer], strict=True)
            values = [must.value(ours, peer) for ours, peer in pairs]
            name = f"{must.name} ({info['sink']})"
            full = info["size"] >= GIB
            found.append(Figure(name, must.must, values, "ratio", must.limit, must.at_least, full_size=full))
    return found


def middle(runs: Sequence[Run], name: str) -> float:
    """The median over the rounds."""
    return median(run[name] for run in runs)


def spread_text(runs: Sequence[Run], name: str) -> str:
    """Median and range of a time."""
    values = [run[name] for run in runs]
    return f"{format_ns(median(values))} [{format_ns(min(values))} .. {format_ns(max(values))}]"


def way_table(info: dict[str, Any]) -> Table:
    """Medians of every way into one sink."""
    table = make_table(
        f"\n{format_size(info['size'])} into {info['sink']} (medians, and ranges; stalls are the writer's)",
        "way", "n", "MiB/s", "time", "stalls", "p50", "p99", "longest", "after T", "(before)", "work lost",
        "image",
    )  # fmt: skip
    for way, runs in info["runs"].items():
        rate = info["size"] / MIB / (middle(runs, "total_ns") / 1e9)
        stalls, longest = (
            [format_ns(round(middle(runs, f"stall_{name}_ns"))) for name in names]
            for names in (("p50", "p99"), ("longest_after_t", "longest_before"))
        )
        table.add_row(
            way, str(len(runs)), f"{rate:.0f}", spread_text(runs, "total_ns"),
            f"{middle(runs, 'stalls'):.0f}", *stalls, spread_text(runs, "stall_longest_ns"), *longest,
            format_ns(round(middle(runs, "lost_ns"))), format_size(round(middle(runs, "image_bytes"))),
        )  # fmt: skip
    return table


def main(path: str = "build/bench-peers.json") -> None:
    """The command."""
    run = json.loads(Path(path).read_text())
    infos = [bench["extra_info"] for bench in run["benchmarks"]]
    console = Console(width=None if sys.stdout.isatty() else 150, markup=False)
    cpu = run["machine_info"].get("cpu", {})
    loads = ", ".join(f"{info['load'][0]:.1f}" for info in infos)
    console.print(
        f"{cpu.get('brand_raw', 'unknown CPU')}, {cpu.get('count', '?')} CPUs, load {loads}", highlight=False
    )
    for table in (*map(way_table, infos), figure_table(judged(infos))):
        console.print(table, highlight=False)
    console.print("Stock QEMU itself: make bench-qemu.", highlight=False)


if __name__ == "__main__":
    main(*sys.argv[1:])

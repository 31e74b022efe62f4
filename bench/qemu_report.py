"""Print what `make bench-qemu` measured: `python bench/qemu_report.py [build/bench-qemu.json]`.

First every way over hot set and sink rate, then what the stops were spent on, then what must be reached.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from qemu_names import BACKGROUND, OURS
from report import GIB, Figure, figure_table, make_table
from rich.console import Console
from rich.table import Table

from snapengine.base.units import format_ns, format_size
from snapengine.options import MIB

MAIN = 127 * MIB
Run = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Must:
    """A figure of each round at the hot set that is judged, without a limit of the sink."""

    name: str
    must: str
    limit: float
    unit: str
    value: Callable[[Run, Run], float]
    """Of our run and QEMU's background-snapshot of the same round."""
    huge: bool = True


def quotient(sample: str) -> Callable[[Run, Run], float]:
    """Ours by QEMU's; what is less than the samples can tell counts as that: 1 ms (or 1 byte)."""
    least = 1e6 if sample.endswith("_ns") else 1.0
    return lambda ours, other: max(ours[sample], least) / max(other[sample], least)


MUSTS = (
    Must("time / background-snapshot's", "≤ 0.2", 0.2, "ratio", quotient("total_ns")),
    Must("  aimed at", "≤ 0.1", 0.1, "ratio", quotient("total_ns")),
    Must("guest's lost work / its", "≤ 0.2", 0.2, "ratio", quotient("lost_ns")),
    Must("guest's longest gap / its", "≤ 1", 1, "ratio", quotient("gap_ns")),
    Must("image / its", "≤ 1", 1, "ratio", quotient("image_bytes")),
    Must("guest stopped, huge pages", "≤ 5 ms", 5e6, "ns", lambda ours, _: ours["stop_ns"]),
    Must("guest stopped, 4 KiB pages", "≤ 30 ms", 30e6, "ns", lambda ours, _: ours["stop_ns"], huge=False),
)


def judged(infos: Sequence[dict[str, Any]]) -> list[Figure]:
    """All that must be reached, as far as the run has it."""
    found = []
    for must in MUSTS:
        for info in infos:
            if (info["hot"], info["sink_rate"], info["huge"]) == (MAIN, 0, must.huge):
                pairs = zip(info["runs"][OURS], info["runs"][BACKGROUND], strict=True)
                values = [must.value(ours, other) for ours, other in pairs]
                full = info["size"] >= GIB
                found.append(Figure(must.name, must.must, values, must.unit, must.limit, full_size=full))
    return found


def middle(runs: Sequence[Run], name: str) -> float | None:
    """The median of the runs that have it."""
    values = [run[name] for run in runs if run.get(name) is not None]
    return median(values) if values else None


def time_text(value: float | None) -> str:
    """Nanoseconds, or a dash."""
    return "-" if value is None else format_ns(round(value))


def gap_text(value: float | None) -> str:
    """A gap; the guest's counter is read once a millisecond."""
    return "< 1 ms" if value is not None and value < 1e6 else time_text(value)


def way_table(infos: Sequence[dict[str, Any]]) -> Table:
    """Medians of every way, a group of lines per hot set, sink and kind of page."""
    table = make_table(
        "\nEvery way (medians)", "hot MiB, sink MiB/s: way", "n", "image", "time", "guest stopped",
        "pages/s before", "during", "work lost", "longest gap", "(before)",
    )  # fmt: skip
    for info in infos:
        pages = "" if info["huge"] else ", 4 KiB pages"
        table.add_row(f"{info['hot'] // MIB}, {info['sink_rate'] // MIB or 'free'}{pages}")
        for way, runs in info["runs"].items():
            rates = [middle(runs, name) or 0.0 for name in ("rate_before", "rate_during")]
            done = all(run["completed"] for run in runs)
            table.add_row(
                f"  {way}", str(len(runs)), format_size(round(middle(runs, "image_bytes") or 0)),
                time_text(middle(runs, "total_ns")) if done else "gave up",
                time_text(middle(runs, "stop_ns")) if done else "-",
                f"{rates[0]:.0f}", f"{rates[1] / rates[0]:.0%}", time_text(middle(runs, "lost_ns")),
                gap_text(middle(runs, "gap_ns")), gap_text(middle(runs, "gap_before_ns")),
            )  # fmt: skip
    return table


def stop_table(infos: Sequence[dict[str, Any]]) -> Table:
    """What our stops were spent on, of every round."""
    names = ("stop", "device_state", "arm", "cont", "guest")
    table = make_table("\nParts of the stop, ours (by our clock; guest: by QEMU's)", "hot MiB: pages", *names)
    for info in infos:
        for run in info["runs"].get(OURS, []):
            parts = run["stop_parts_ns"]
            share = f"{run['huge_share']:.0%} in huge pages"
            label = f"{info['hot'] // MIB}: {share}"
            table.add_row(label, *(time_text(parts.get(name)) for name in names))
    return table


def main(path: str = "build/bench-qemu.json") -> None:
    """The command."""
    run = json.loads(Path(path).read_text())
    infos = [bench["extra_info"] for bench in run["benchmarks"]]
    console = Console(width=None if sys.stdout.isatty() else 140, markup=False)
    cpu, first = run["machine_info"].get("cpu", {}), infos[0]
    loads = [info["load"][0] for info in infos]
    console.print(
        f"{cpu.get('brand_raw', 'unknown CPU')}, {cpu.get('count', '?')} CPUs, load {min(loads):.1f} to "
        f"{max(loads):.1f}; QEMU {first['version']}, {first['accel']}, guest {format_size(first['size'])}",
        highlight=False,
    )
    for table in (way_table(infos), stop_table(infos), figure_table(judged(infos))):
        console.print(table, highlight=False)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Print what `make bench` measured: `python bench/report.py [--json] [build/bench.json]`.

First the figures that the project must reach, then the image sizes, then every sample with its floors.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from snapengine.options import DIRTY_LOGGING, MIB, WRITE_TRACKING
from snapengine.units import format_count, format_ns, format_size

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure that must be reached; `values` has one entry per round or capture."""

    name: str
    must: str
    values: list[float]
    unit: str
    limit: float
    at_least: bool = False
    full_size: bool = True
    every: bool = False
    """Each value must reach the limit, not only the median."""

    @property
    def met(self) -> str:
        """``"yes"``, ``"no"``, ``"median only"``, or ``"-"`` where the run was too small to tell."""
        if not self.full_size or not self.values:
            return "-"
        good = [value >= self.limit if self.at_least else value <= self.limit for value in self.values]
        if all(good):
            return "yes"
        middle = median(self.values)
        reached = middle >= self.limit if self.at_least else middle <= self.limit
        return "median only" if reached and not self.every else "no"


def figures(benches: Sequence[dict[str, Any]]) -> list[Figure]:
    """All that must be reached, as far as the run has it."""
    return [
        *image_figures(benches),
        *sample_figures({bench["name"]: bench["extra_info"] for bench in benches}),
    ]


def image_figures(benches: Sequence[dict[str, Any]]) -> list[Figure]:
    """The image against the memory that is not zero."""
    infos = [bench["extra_info"] for bench in benches if bench["group"] == "images"]
    tracking = [info for info in infos if info["method"] == WRITE_TRACKING]
    if not tracking:
        return []
    full = tracking[0]["size"] >= 64 * MIB
    pages = [info["duplicate_pages"] for info in tracking]
    ratios = [info["ratio"] for info in tracking]
    return [
        Figure(
            "image / non-zero bytes, all rates", "≤ 1.005", ratios, "ratio", 1.005, full_size=full, every=True
        ),
        Figure("pages saved twice, all rates", "0", pages, "count", 0, every=True),
    ]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A figure that is a sample of a bench; judged only if the bench ran at `full_size` or more."""

    bench: str
    sample: str
    name: str
    must: str
    limit: float
    full_size: int
    at_least: bool = False


_WRITER, _COPY = "bench_full_speed_writer", "bench_copy"
_WANTED = (
    Wanted(f"{_WRITER}[anon]", "capture_ns", "1 GiB, writer at full speed, tmpfs", "≤ 1.0 s", 1e9, GIB),
    Wanted(f"{_WRITER}[memfd]", "capture_ns", "  the same, memfd", "≤ 1.0 s", 1e9, GIB),
    Wanted(
        f"{_WRITER}[anon]",
        "grown_over_limit_bytes",
        "  engine's memory - its limit",
        "≤ 32 MiB",
        32 * MIB,
        GIB,
    ),
    Wanted(
        f"{_COPY}_own_buffer", "memcpy_ratio", "memcpy / idle, null sink: own buffer", "≥ 0.5", 0.5, GIB, True
    ),
    Wanted(
        f"{_COPY}_guest[anon]", "memcpy_ratio", "  other process, private memory", "≥ 0.5", 0.5, GIB, True
    ),
    Wanted(f"{_COPY}_guest[memfd]", "memcpy_ratio", "  other process, memfd", "≥ 0.5", 0.5, GIB, True),
    Wanted("bench_stalls", "throttled_p99_ratio", "stall p99, sink 50 MiB/s / no limit", "≤ 2", 2, 128 * MIB),
    Wanted("bench_sparse", "arm_ns", "64 GiB sparse, 256 MiB written: arming", "< 50 ms", 50e6, 64 * GIB),
    Wanted("bench_sparse", "tables_added_bytes", "  page tables added", "< 16 MiB", 16 * MIB, 64 * GIB),
    Wanted("bench_injection[1]", "injection_stop_ns", "attach: one thread stands", "≤ 0.5 ms", 5e5, GIB),
    Wanted("bench_injection[3]", "injection_stop_ns", "  the same, 3 busy threads", "≤ 0.5 ms", 5e5, GIB),
    Wanted("bench_attach_arm", "arm_ratio", "  arming / the bare ioctls", "≤ 1.3", 1.3, GIB),
    Wanted("bench_lost_work", "attach_ns", "  1 GiB, writer at full speed, tmpfs", "≤ 1.2 s", 1.2e9, GIB),
    Wanted("bench_lost_work", "lost_ratio", "  work lost / by fork and copy-on-write", "≤ 1.5", 1.5, GIB),
)


def sample_figures(infos: dict[str, dict[str, Any]]) -> list[Figure]:
    """The figures that are samples of a bench."""
    found = []
    for wanted in _WANTED:
        info = infos.get(wanted.bench, {})
        values = info.get("samples", {}).get(wanted.sample)
        if values:
            found.append(
                Figure(
                    wanted.name, wanted.must, values, unit_of(wanted.sample), wanted.limit, wanted.at_least,
                    full_size=info["size"] >= wanted.full_size,
                )
            )  # fmt: skip
    return found


def unit_of(sample: str) -> str:
    """The unit that the name of a sample ends with."""
    unit = sample.rsplit("_", 1)[-1]
    return unit if unit in ("ns", "bytes", "rate", "ratio") else "count"


_FORMATS: dict[str, Callable[[float], str]] = {
    "ns": format_ns,
    "bytes": format_size,
    "rate": lambda value: f"{value / 1e9:.1f} GB/s",
    "ratio": lambda value: f"{value:.4f}" if 0.99 < value < 1.01 else f"{value:.2f}",
    "count": format_count,
}


def spread(values: Sequence[float], unit: str) -> tuple[str, str]:
    """Median, and [min .. max]."""
    show = _FORMATS[unit]
    return show(median(values)), f"[{show(min(values))} .. {show(max(values))}]"


def make_table(title: str, *columns: str) -> Table:
    """A table without lines; all columns but the first to the right."""
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def figure_table(found: Sequence[Figure]) -> Table:
    """What must be reached, and what was."""
    table = make_table("\nWhat it must reach", "figure", "must", "median", "[min .. max]", "n", "met")
    for figure in found:
        count = str(len(figure.values))
        table.add_row(figure.name, figure.must, *spread(figure.values, figure.unit), count, figure.met)
    return table


def rate_text(rate: int | None) -> str:
    """Pages a second."""
    return "max" if rate is None else format_count(rate)


def image_table(benches: Sequence[dict[str, Any]]) -> Table:
    """Image sizes over write rate and sink rate, the two methods beside each other."""
    columns = ("writes/s", "sink MiB/s", "tracking", "logging", "twice", "rounds", "stop", "logging's end")
    table = make_table("\nImage / non-zero bytes", *columns)
    infos = [bench["extra_info"] for bench in benches if bench["group"] == "images"]
    by_place: dict[Any, dict[str, Any]] = {}
    for info in infos:
        by_place.setdefault((info["write_rate"], info["sink_rate"]), {})[info["method"]] = info
    for (write_rate, sink_rate), methods in by_place.items():
        tracking, logging = methods.get(WRITE_TRACKING), methods.get(DIRTY_LOGGING)
        if not tracking or not logging:
            continue
        table.add_row(
            rate_text(write_rate), str(sink_rate // MIB or "free"), f"{tracking['ratio']:.4f}",
            f"{logging['ratio']:.3f}", format_count(logging["duplicate_pages"]), str(logging["rounds"]),
            format_ns(logging["stop_ns"]), logging["status"],
        )  # fmt: skip
    return table


def sample_table(benches: Sequence[dict[str, Any]]) -> Table:
    """Every sample."""
    table = make_table(
        "\nAll samples, with the floors of the same run", "bench", "sample", "median", "[min .. max]"
    )
    for bench in benches:
        name = bench["name"].removeprefix("bench_")
        for sample, values in bench["extra_info"].get("samples", {}).items():
            label = sample.removesuffix("_" + unit_of(sample)).replace("_", " ")
            table.add_row(name, label, *spread(values, unit_of(sample)))
            name = ""
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Print what the bench measured.")
    parser.add_argument("file", nargs="?", default="build/bench.json", type=Path)
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON list")
    args = parser.parse_args(arguments)
    run = json.loads(args.file.read_text())
    found = figures(run["benchmarks"])
    if args.json:
        json.dump([asdict(figure) | {"met": figure.met} for figure in found], sys.stdout, indent=1)
        print()
        return 0
    console = Console(width=None if sys.stdout.isatty() else 130, markup=False)
    cpu = run["machine_info"].get("cpu", {})
    console.print(f"{cpu.get('brand_raw', 'unknown CPU')}, {cpu.get('count', '?')} CPUs", highlight=False)
    tables = [image_table(run["benchmarks"]), sample_table(run["benchmarks"]), figure_table(found)]
    for table in (table for table in tables if table.row_count):
        console.print(table, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Print what was measured: `python bench/report.py [--all] [--json] [FILE.json ...]`.

One table of the figures that must be reached, each with the floor of the same run; with --all the image
sizes and every sample, too. Without a file: what `make bench` wrote, and `make bench-peers` if it ran.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from rows import GIB, Figure, figure_table, make_table, show, spread, unit_of
from wanted import image_figures, sample_figures

from snapengine.base.units import format_count, format_ns
from snapengine.options import DIRTY_LOGGING, MIB, WRITE_TRACKING

__all__ = ["GIB", "Figure", "figure_table", "figures", "make_table", "show"]
DEFAULTS = (Path("build/bench.json"), Path("build/bench-peers.json"))


def figures(benches: Sequence[dict[str, Any]]) -> list[Figure]:
    """All that must be reached, as far as the runs have it."""
    found = [
        *image_figures(benches),
        *sample_figures({bench["name"]: bench["extra_info"] for bench in benches}),
    ]
    peers = [bench["extra_info"] for bench in benches if bench["group"] == "peers"]
    if peers:
        from peer_report import judged  # it imports this module's table

        found += judged(peers)
    return found


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


def to_json(found: Sequence[Figure]) -> list[dict[str, Any]]:
    """The rows for programs."""
    return [
        asdict(figure) | {"met": figure.met, "median": median(figure.values), "floor_ratios": figure.ratios}
        for figure in found
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Print what the bench measured.")
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--all", action="store_true", help="image sizes and all samples, too")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON list")
    args = parser.parse_args(arguments)
    files = args.files or [path for path in DEFAULTS if path.exists()]
    if not files:
        parser.error(f"there is no {DEFAULTS[0]}: run `make bench`")
    runs = [json.loads(path.read_text()) for path in files]
    benches = [bench for run in runs for bench in run["benchmarks"]]
    found = figures(benches)
    if args.json:
        json.dump(to_json(found), sys.stdout, indent=1)
        print()
        return 0
    console = Console(width=None if sys.stdout.isatty() else 190, markup=False)
    cpu = runs[0]["machine_info"].get("cpu", {})
    tables = [image_table(benches), sample_table(benches)] if args.all else []
    for table in [*(table for table in tables if table.row_count), figure_table(found)]:
        console.print(table, highlight=False)
    console.print(f"{cpu.get('brand_raw', 'unknown CPU')}, {cpu.get('count', '?')} CPUs", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())

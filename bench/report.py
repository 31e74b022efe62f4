"""Print what `make bench`, `make bench-qemu` and `make bench-peers` measured.

The last table shows the goals: limit, median, range over the rounds, and the floor of the same run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from figures import DEFAULTS, Run, join_runs, read_run
from goals import judge, to_json
from rich.console import Console
from tables import figure_table, goal_table, image_table, peer_table, qemu_table, stop_table

EXAMPLES = """\
examples:
  python bench/report.py                          everything that was measured last
  python bench/report.py build/bench-qemu.json    QEMU machines only
  python bench/report.py --all                    also image sizes and every figure
  python bench/report.py --json | jq '.goals[] | select(.met == "no")'
  python bench/report.py bench/history/2026-11-25-walk-serves-faults.json
"""
WIDTH = 190  # of output that is not a terminal


def facts_text(run: Run) -> str:
    """What was measured, and where."""
    machine = run.machine
    cpu = f"{machine['cpu'] or 'unknown CPU'}, {machine['cpus']} CPUs, Linux {machine['kernel']}"
    qemu = {f"QEMU {bench.facts['version']} ({bench.facts['accel']})" for bench in run.find("bench_qemu")}
    loads = [bench.facts["load"] for bench in run.benches if "load" in bench.facts]
    load = [f"load {min(loads):.1f} to {max(loads):.1f}"] if loads else []
    return "; ".join([f"{run.date}, commit {run.commit}", cpu, *sorted(qemu), *load])


def run_json(run: Run) -> dict[str, Any]:
    """The figures of a run for programs."""
    benches = {bench.name: asdict(bench) for bench in run.benches}
    head = {"date": run.date, "commit": run.commit, "machine": run.machine}
    return head | {"goals": [to_json(verdict) for verdict in judge(run)], "benches": benches}


def print_run(run: Run, console: Console, everything: bool) -> None:
    """The tables that the run has figures for."""
    tables = [image_table(run), figure_table(run)] if everything else []
    tables += [peer_table(run), qemu_table(run), stop_table(run), goal_table(judge(run))]
    for table in (table for table in tables if table.row_count):
        console.print(table, highlight=False)
    console.print(facts_text(run), highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="bench/report.py", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    defaults = ", ".join(map(str, DEFAULTS))
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help=f"default: those of {defaults}")
    parser.add_argument("--all", action="store_true", help="also print image sizes and every figure")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    args = parser.parse_args(arguments)
    files = args.files or [path for path in DEFAULTS if path.exists()]
    if not files:
        parser.error(f"nothing was measured: there is no {defaults}; run `make bench`")
    try:
        run = join_runs([read_run(path) for path in files])
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if args.json:
        json.dump(run_json(run), sys.stdout, indent=1)
        print()
    else:
        console = Console(width=None if sys.stdout.isatty() else WIDTH, markup=False)
        print_run(run, console, args.all)
    return 0


if __name__ == "__main__":
    sys.exit(main())

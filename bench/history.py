"""Keep what was measured for a change that claims a gain, and compare over the changes.

    python bench/history.py add NAME [FILE.json ...]    a compact file in bench/history/
    python bench/history.py show SAMPLE [BENCH]         its medians over the entries

An entry holds when, which commit, which kernel and CPU, and of each sample the median, least, largest and
count: nothing that names a host, a user or a path.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from report import DEFAULTS
from rich.console import Console
from rows import make_table, show, unit_of

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "bench/history"
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,60}")


def commit() -> str:
    """The commit that was measured, with ``+`` if the tree had changes."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")


def summary(values: Sequence[float]) -> dict[str, float]:
    """Four numbers instead of all."""
    return {"median": median(values), "min": min(values), "max": max(values), "n": len(values)}


def samples_of(info: dict[str, Any]) -> dict[str, list[float]]:
    """A bench's samples; of one that compares ways, each way's figures as ``way.figure``."""
    found = dict(info.get("samples", {}))
    for way, runs in info.get("runs", {}).items():
        for name in runs[0] if runs else ():
            values = [run[name] for run in runs if type(run.get(name)) in (int, float)]
            if values:
                found[f"{way}.{name}"] = values
    return found


def entry(name: str, runs: Sequence[dict[str, Any]], commit_id: str) -> dict[str, Any]:
    """What is kept of the runs."""
    cpu = runs[0]["machine_info"].get("cpu", {})
    benches: dict[str, Any] = {}
    for bench in (bench for run in runs for bench in run["benchmarks"]):
        samples = samples_of(bench["extra_info"])
        if samples:
            benches[bench["name"]] = {
                "size": bench["extra_info"].get("size"),
                "samples": {sample: summary(values) for sample, values in samples.items() if values},
            }
    return {
        "name": name,
        "date": runs[0]["datetime"][:10],
        "commit": commit_id,
        "kernel": platform.release(),
        "cpu": cpu.get("brand_raw", "unknown"),
        "cpus": cpu.get("count"),
        "benches": benches,
    }


def add(name: str, files: Sequence[Path], folder: Path = FOLDER) -> Path:
    """Write an entry; raises ValueError for a name that is no plain word, FileExistsError if it is taken."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r}: small letters, digits and hyphens only")
    made = entry(name, [json.loads(path.read_text()) for path in files], commit())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{made['date']}-{name}.json"
    with open(path, "x", encoding="utf-8") as file:
        file.write(json.dumps(made, indent=1) + "\n")
    return path


def rows_of(sample: str, bench: str = "", folder: Path = FOLDER) -> list[tuple[str, ...]]:
    """(Date, name, commit, bench, median, spread, n) of every entry that has the sample, oldest first."""
    found = []
    for path in sorted(folder.glob("*.json")):
        kept = json.loads(path.read_text())
        for name, values in kept["benches"].items():
            if sample in values["samples"] and bench in name:
                one, unit = values["samples"][sample], unit_of(sample)
                span = f"{show(one['min'], unit)} .. {show(one['max'], unit)}"
                place = (kept["date"], kept["name"], kept["commit"], name)
                found.append((*place, show(one["median"], unit), span, str(one["n"])))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Figures of the changes that claim a gain.")
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="keep what was measured")
    adding.add_argument("name", help="what the change is: small letters, digits, hyphens")
    adding.add_argument("files", nargs="*", type=Path)
    showing = commands.add_parser("show", help="one sample over the entries")
    showing.add_argument("sample", help="such as capture_ns")
    showing.add_argument("bench", nargs="?", default="", help="a part of the bench's name")
    args = parser.parse_args(arguments)
    if args.command == "add":
        print(add(args.name, args.files or [path for path in DEFAULTS if path.exists()]))
        return 0
    found = rows_of(args.sample, args.bench)
    if not found:
        print(f"no entry has the sample {args.sample}", file=sys.stderr)
        return 1
    columns = ("date", "change", "commit", "bench", "median", "min .. max", "n")
    table = make_table(args.sample, *columns)
    for row in found:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160, markup=False).print(table, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())

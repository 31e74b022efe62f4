"""Keep the figures of a change that claims a gain, and compare two sets of figures.

An entry of bench/history/ holds the date, the commit, facts of the machine (CPU, kernel, memory), and of each
figure the median, range, count, unit, floor and ratio to the floor. It names no host, user or path.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from figures import DEFAULTS, Figure, Run, join_runs, label_of, read_run
from rich.console import Console
from rich.table import Table
from tables import make_table, show, show_range

FOLDER = Path(__file__).resolve().parent / "history"
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,60}")
INNERMOST = re.compile(r"\{[^{}]*\}")
WIDTH = 160  # of output that is not a terminal
EXAMPLES = """\
examples:
  python bench/history.py add fewer-faults
  python bench/history.py list
  python bench/history.py compare two-step-arming-and-fewer-faults walk-serves-faults
  python bench/history.py compare walk-serves-faults build/bench.json --match capture_ns
"""


def _short(value: Any) -> Any:
    """A fraction with nine digits; a whole number as it is."""
    if not isinstance(value, float) or value.is_integer():
        return int(value) if isinstance(value, float) else value
    return float(f"{value:.9g}")


def entry_text(run: Run) -> str:
    """An entry as JSON, one line for each figure."""
    benches = {
        bench.name: {
            "facts": bench.facts,
            "figures": {sample: _figure_json(figure) for sample, figure in bench.figures.items()},
        }
        for bench in run.benches
        if bench.figures
    }
    head = {"name": run.name, "date": run.date, "commit": run.commit, "machine": run.machine}
    text = json.dumps(head | {"benches": benches}, indent=1)
    return INNERMOST.sub(lambda found: "{" + " ".join(found[0][1:-1].split()) + "}", text) + "\n"


def _figure_json(figure: Figure) -> dict[str, Any]:
    return {key: _short(value) for key, value in asdict(figure).items() if value not in ("", None)}


def add(name: str, files: Sequence[Path], folder: Path = FOLDER) -> Path:
    """Write an entry; raises ValueError for a name that is no plain word, FileExistsError if it is taken."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r}: small letters, digits and hyphens only")
    run = join_runs([read_run(path) for path in files])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    machine = run.machine | {"memory_bytes": memory}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{run.date}-{name}.json"
    with open(path, "x", encoding="utf-8") as file:
        file.write(entry_text(replace(run, name=name, machine=machine)))
    return path


def find(name: str, folder: Path = FOLDER) -> Run:
    """The entry of that name, or the run of a file; raises ValueError if there is neither."""
    for path in folder.glob("*.json"):
        run = read_run(path)
        if run.name == name:
            return run
    if not Path(name).is_file():
        raise ValueError(f"{name}: neither an entry of bench/history/ nor a file; `list` prints the entries")
    return read_run(Path(name))


def common_figures(old: Run, new: Run, match: str = "") -> Iterator[tuple[str, str, Figure, Figure]]:
    """(Bench, sample, old figure, new figure) of what both have, if ``bench.sample`` contains `match`."""
    benches = {bench.name: bench for bench in new.benches}
    for bench in (bench for bench in old.benches if bench.name in benches):
        found = benches[bench.name].figures
        for sample, figure in bench.figures.items():
            if sample in found and match in f"{bench.name}.{sample}":
                yield bench.name.removeprefix("bench_"), sample, figure, found[sample]


def compare_table(old: Run, new: Run, match: str = "") -> Table:
    """Medians and ranges side by side, and the quotient of the medians."""
    columns = ("bench", "figure", "old", "min .. max", "new", "min .. max", "new / old")
    table = make_table(f"{old.name} ({old.commit}) and {new.name} ({new.commit})", *columns)
    for bench, sample, before, after in common_figures(old, new, match):
        quotient = f"{after.median / before.median:.2f}" if before.median else "-"
        cells = (text for one in (before, after) for text in (show(one.median, one.unit), show_range(one)))
        table.add_row(bench, label_of(sample), *cells, quotient)
    return table


def list_table(folder: Path = FOLDER) -> Table:
    """The entries, oldest first."""
    table = make_table("Entries", "name", "date", "commit", "benches", "figures", "kernel", "CPU")
    for run in (read_run(path) for path in sorted(folder.glob("*.json"))):
        counts = len(run.benches), sum(len(bench.figures) for bench in run.benches)
        machine = run.machine["kernel"], run.machine["cpu"]
        table.add_row(run.name, run.date, run.commit, *map(str, counts), *map(str, machine))
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench/history.py", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    adding = commands.add_parser("add", help="write an entry")
    adding.add_argument("name", help="what changed: small letters, digits and hyphens")
    defaults = ", ".join(map(str, DEFAULTS))
    adding.add_argument("files", nargs="*", type=Path, metavar="FILE", help=f"default: those of {defaults}")
    comparing = commands.add_parser("compare", help="print the figures of two entries side by side")
    comparing.add_argument("old", help="an entry's name, or a file that `make bench` wrote")
    comparing.add_argument("new", help="the same")
    comparing.add_argument("--match", default="", help="only figures whose BENCH.FIGURE contains this text")
    commands.add_parser("list", help="print the entries")
    return parser


def _run(args: argparse.Namespace) -> Table | Path:
    if args.command == "list":
        return list_table()
    if args.command == "compare":
        return compare_table(find(args.old), find(args.new), args.match)
    files = args.files or [path for path in DEFAULTS if path.exists()]
    if not files:
        raise ValueError("nothing was measured: run `make bench`")
    return add(args.name, files)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = _parser()
    try:
        result = _run(parser.parse_args(arguments))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    Console(width=None if sys.stdout.isatty() else WIDTH, markup=False).print(result, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())

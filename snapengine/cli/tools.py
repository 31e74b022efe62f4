"""`snapengine doctor`, `demo`, and the entry of `guest` in the list of commands."""

from __future__ import annotations

import argparse
from typing import Any

from snapengine.base.units import parse_size
from snapengine.cli.common import argument
from snapengine.options import COPY_LIMIT
from snapengine.report.terminal import EXIT_CODES, EXIT_ERROR, EXIT_OK, print_json, raw

DOCTOR = """\
Check what this host supports, feature by feature; for each "no", why, and what to do. With --pid: which
mappings a snapshot of that process would hold, which it would lack and why, the largest possible size of the
image, and about how long threads would be stopped. Nothing is stopped or changed.
"""
DOCTOR_EPILOG = """\
examples:
  snapengine doctor
  snapengine doctor --json
  snapengine doctor --pid 4711

exit codes:
  0  snapshots by write tracking work here (--pid: the process can be attached to)
  1  they do not: the lines marked "no, needed" say why (--pid: one line says why)
"""
DEMO = """\
Start the embedded guest at several write rates, save it live by both methods into a file of limited
bandwidth, verify and restore each image, prove the restored memory consistent, and print a table.
"""
DEMO_EPILOG = f"""\
The figures of a row: how many page writes a second the guest makes; the image, and its ratio to the
memory that is not zero; how long writers waited (p50, p99, longest); the share of its undisturbed write rate
that the guest kept while it was saved.

examples:
  snapengine demo
  snapengine demo --size 1G --rates 0,20000,max --sink-rate 400M --plot demo.png
  snapengine demo --json > rows.json

{EXIT_CODES}
Here 1 also means: an image did not hold a consistent state.
"""


def add_guest(commands: argparse._SubParsersAction[Any], line: str) -> None:
    """Only for the list in --help: the command is handed to its own parser before this one sees it."""
    commands.add_parser("guest", help=line)


def add_doctor(commands: argparse._SubParsersAction[Any], line: str) -> None:
    """Add `doctor` to the command line."""
    parser = commands.add_parser(
        "doctor", help=line, description=DOCTOR, epilog=DOCTOR_EPILOG, formatter_class=raw
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.add_argument("--pid", type=int, metavar="PID", help="look at this process")
    parser.add_argument("--all", action="store_true", help="--pid: list all mappings, not only the largest")
    parser.add_argument("--copy-limit", type=argument(parse_size), default=COPY_LIMIT, metavar="SIZE",
                        help="--pid: --copy-limit of save (default: 64M)")  # fmt: skip
    parser.set_defaults(run=run_doctor, parser=parser)


def add_demo(commands: argparse._SubParsersAction[Any], line: str) -> None:
    """Add `demo` to the command line."""
    from snapengine.demo.main import DEFAULT_RATES, parse_rates

    parser = commands.add_parser(
        "demo", help=line, description=DEMO, epilog=DEMO_EPILOG, formatter_class=raw
    )
    size = argument(parse_size)
    add = parser.add_argument
    add("--size", type=size, default="256M", metavar="SIZE", help="memory of the guest (default %(default)s)")
    add("--rates", type=argument(parse_rates), default=DEFAULT_RATES, metavar="LIST",
        help="pages written a second, such as 0,2000,max (default %(default)s)")  # fmt: skip
    add("--sink-rate", type=size, default="128M", metavar="SIZE",
        help="bytes a second that the sink takes (default %(default)s; 0: no limit)")  # fmt: skip
    add("--json", action="store_true", help="print the rows as a JSON list")
    add("--plot", metavar="FILE", help="draw image size and time against the write rate (PNG, SVG, PDF)")
    add("--keep", metavar="DIR", help="keep the images in DIR")
    parser.set_defaults(run=run_demo)


def run_doctor(args: argparse.Namespace) -> int:
    """Check and report; 0 if write tracking can work."""
    if args.pid is not None:
        from snapengine.doctor import preflight

        found = preflight.examine_process(args.pid, copy_limit=args.copy_limit)
        if args.json:
            print_json(found.to_json())
        else:
            preflight.print_preflight(found, everything=args.all)
        return EXIT_OK
    from snapengine.doctor import main as doctor

    checks = doctor.examine()
    if args.json:
        print_json([check.to_json() for check in checks])
    else:
        doctor.print_checks(checks)
    return EXIT_OK if doctor.can_track(checks) else EXIT_ERROR


def run_demo(args: argparse.Namespace) -> int:
    """Run the rounds and print the table."""
    from snapengine.demo import main as demo

    plan = demo.Plan(args.size, args.rates, args.sink_rate, args.keep)
    return demo.run(plan, json=args.json, plot=args.plot)

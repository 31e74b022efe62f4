"""`snapengine qemu`: the group of commands for QEMU machines."""

from __future__ import annotations

import argparse
from typing import Any

from snapengine.cli.qemu_analyze import add_analyze
from snapengine.cli.qemu_restore import add_restore
from snapengine.cli.qemu_save import add_save
from snapengine.report.terminal import raw

DESCRIPTION = "Save, restore and analyze QEMU machines.\n"
EPILOG = "`snapengine qemu COMMAND --help` has the options and examples of each command.\n"


def add_qemu(commands: argparse._SubParsersAction[Any], line: str) -> None:
    """Add the group to the command line."""
    parser = commands.add_parser(
        "qemu", help=line, description=DESCRIPTION, epilog=EPILOG, formatter_class=raw
    )
    group = parser.add_subparsers(metavar="COMMAND", required=True, dest="qemu_command")
    add_save(group)
    add_restore(group)
    add_analyze(group)

"""`snapengine qemu restore`: a machine goes on from its image."""

from __future__ import annotations

import argparse
from typing import Any

from snapengine.cli_common import EXIT_CODES, EXIT_OK, print_json, raw, say
from snapengine.units import format_size

DESCRIPTION = """\
Start QEMU and let it go on where the image has the machine. Give QEMU's command line as the machine that was
saved had it (`snapengine info IMAGE` shows it), with the disks as they were then; -S and -incoming are added.
QEMU runs on when this command has ended; its monitor is at --qmp.
"""
EPILOG = f"""\
Machines that differ (RAM blocks, sizes, devices, CPUs, machine type, QEMU's version) are refused, with what
differs; --force tries all the same.

examples:
  snapengine qemu restore vm.img -- qemu-system-x86_64 -m 1G -drive file=vm.qcow2
  snapengine qemu restore --qmp /run/vm2.qmp --paused vm.img -- qemu-system-x86_64 -m 1G
  snapengine qemu restore --foreground vm.img -- qemu-system-x86_64 -m 1G -nographic

{EXIT_CODES}
"""


def add_restore(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `qemu restore`."""
    parser = commands.add_parser(
        "restore", help="start a machine from its image", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=raw,
        usage="%(prog)s [options] IMAGE -- QEMU ARGUMENT...",
    )  # fmt: skip
    add = parser.add_argument
    add("image", metavar="IMAGE", help="the image, a file")
    add("command", nargs="+", metavar="QEMU ARGUMENT...", help="QEMU's command line, behind --")
    add("--qmp", metavar="SOCKET", help="Unix socket for the machine's monitor (default: in a new directory)")
    add("--paused", action="store_true", help="do not let the guest run yet")
    add("--force", action="store_true", help="go on though the machine differs from the one that was saved")
    add("--foreground", action="store_true",
        help="QEMU has the terminal; wait for its end, and end with its exit code")  # fmt: skip
    add("--log", metavar="FILE", help="what QEMU prints goes there (default: nowhere)")
    add("--json", action="store_true", help="print pid, monitor and times as one JSON object")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """The command."""
    from snapengine.image import open_image
    from snapengine.qemu.restore import restore_machine

    with open_image(args.image) as image:
        restored = restore_machine(
            image, args.command, qmp=args.qmp, run=not args.paused, force=args.force, stdio=args.foreground,
            log=args.log,
        )  # fmt: skip
    for line in restored.differences:
        say(f"warning: {line}")
    if args.json:
        print_json(restored.to_json())
    else:
        loaded = f"{format_size(restored.stream_bytes)} in {restored.load_ns / 1e9:.2f} s"
        say(f"process {restored.pid} is {restored.status}, loaded {loaded}; its monitor: {restored.qmp}")
    if args.foreground:
        assert restored.process is not None
        return restored.process.wait()
    return EXIT_OK

"""`snapengine qemu restore`: starts a machine from its image."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snapengine.base.units import format_size, parse_seconds
from snapengine.cli.common import add_timeout, argument, end_of_limit
from snapengine.cli.image import LOST_ZERO, lost_pages_as
from snapengine.report.terminal import EXIT_CODES, EXIT_OK, print_json, raw, say

if TYPE_CHECKING:
    from snapengine.qemu.restore import Restored

DESCRIPTION = """\
Start QEMU with the state of the machine in the image: by the command line that the machine was started with
(`snapengine info IMAGE` shows it; relative paths are relative to the current directory), or by another that
you give behind --. The disks must be as they were then; -S and -incoming are added. QEMU keeps running after
this command has ended; its monitor is at --qmp.
"""
EPILOG = f"""\
Machines that differ (RAM blocks, sizes, devices, CPUs, machine type) are refused, with what differs; --force
tries anyway. Another version of QEMU is a warning if the machine type has a version (pc-q35-7.2): start the
new QEMU with that type.

examples:
  snapengine qemu restore vm.img
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
        usage="%(prog)s [options] IMAGE [-- QEMU ARGUMENT...]",
    )  # fmt: skip
    add = parser.add_argument
    add("image", metavar="IMAGE", help="the image, a file")
    add("--qmp", metavar="SOCKET", help="Unix socket for the machine's monitor (default: in a new directory)")
    add("--paused", action="store_true", help="leave the guest stopped")
    add("--force", action="store_true", help="continue although the machine differs from the saved one")
    add("--lost", choices=["refuse", "zero"], default="refuse",
        help=f"{LOST_ZERO}: right for memory that the guest gave back (default: refuse)")  # fmt: skip
    add("--foreground", action="store_true",
        help="give QEMU the terminal, wait for its end, and return its exit code")  # fmt: skip
    add("--log", metavar="FILE", help="file for QEMU's output (default: discarded)")
    add("--monitor-timeout", type=argument(parse_seconds), default=60.0, metavar="SECONDS",
        help="longest wait for the answer of QEMU's monitor to one command (default 60)")  # fmt: skip
    add_timeout(parser, "end QEMU, unless the machine is loaded,")
    add("--json", action="store_true", help="print pid, monitor and times as one JSON object")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """The command."""
    from snapengine.image import open_image
    from snapengine.qemu.command import command_of
    from snapengine.qemu.restore import restore_machine
    from snapengine.regions import PAGE_BYTES
    from snapengine.report.progress import Bar

    with (
        open_image(args.image, lost=args.lost) as image,
        lost_pages_as(image, args.lost),
        Bar(args.foreground) as bar,
    ):
        command = args.behind or command_of(image)
        saved_bytes = image.index.data_pages() * PAGE_BYTES
        restored = restore_machine(
            image, command, qmp=args.qmp, run=not args.paused, force=args.force, stdio=args.foreground,
            log=args.log, command_seconds=args.monitor_timeout, progress=bar.of_bytes("loading", saved_bytes),
        )  # fmt: skip
    end_of_limit()
    for line in restored.differences:
        say(f"warning: {line}")
    if args.json:
        print_json(restored.to_json())
    else:
        loaded = f"{format_size(restored.stream_bytes)} in {restored.load_ns / 1e9:.2f} s"
        say(f"process {restored.pid} is {restored.status}, loaded {loaded}; its monitor: {restored.qmp}")
    if args.foreground:
        assert restored.process is not None
        return _wait(restored, args.qmp is None)
    return EXIT_OK


def _wait(restored: Restored, own_folder: bool) -> int:
    """Until QEMU has ended; a signal that is ours ends it, too."""
    assert restored.process is not None
    try:
        code = restored.process.wait()
    except BaseException:
        restored.process.terminate()
        restored.process.wait()
        raise
    finally:
        if own_folder:
            shutil.rmtree(Path(restored.qmp).parent, ignore_errors=True)
    return code if code >= 0 else 128 - code

"""`snapengine qemu save`: a live snapshot of a running QEMU machine."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from snapengine.base.units import parse_seconds
from snapengine.cli.capture_options import LEFT_OUT, add_options, make_options
from snapengine.cli.common import argument, check_output
from snapengine.cli.save import add_report_options, exit_code, report
from snapengine.errors import AttachError, UffdPermissionError
from snapengine.report.terminal import EXIT_CODES, raw, say

if TYPE_CHECKING:
    from snapengine.options import Options
    from snapengine.result import Result

DESCRIPTION = """\
Save a running virtual machine of stock QEMU (7.2 or newer). This command attaches to the QEMU process. The
guest is stopped for a few milliseconds while the devices' state is taken and its RAM is protected, and runs
while the RAM is saved. The image holds the machine at one instant, every page once.

Without permission to attach, use QEMU's own migration (--via-migration). It is slower; the image is
compressed, checked and bounded as well.
"""
EPILOG = f"""\
SINK is as in `snapengine save`: PATH, file:PATH, exec:COMMAND, fd:N, - or null:.

QMP is a Unix socket (-qmp unix:PATH,server=on,wait=off) that no other client uses at the moment.

examples:
  snapengine qemu save --qmp /run/vm.qmp vm.img
  snapengine qemu save --qmp /run/vm.qmp --compress zstd --json vm.img
  snapengine qemu save --qmp /run/vm.qmp --block-snapshot drive0=/vm/after.qcow2 vm.img
  snapengine qemu save --qmp /run/vm.qmp --via-migration --compress zstd vm.img

{EXIT_CODES}
"""


def add_save(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `qemu save`."""
    parser = commands.add_parser(
        "save", help="save a running machine", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw
    )
    seconds = argument(parse_seconds)
    add = parser.add_argument
    add("sink", metavar="SINK", help="where the image goes")
    add("--qmp", required=True, metavar="SOCKET", help="QEMU's monitor: a Unix socket")
    add("--pid", type=int, default=0, metavar="PID",
        help="QEMU's process (default: the process that listens at SOCKET)")  # fmt: skip
    add("--via-migration", action="store_true",
        help="do not attach: QEMU sends its own migration stream, by background-snapshot (dirty-logging: by "
        "migrate, and with KVM only)")  # fmt: skip
    add("--block-snapshot", type=argument(parse_disk), action="append", default=[], metavar="DISK=FILE",
        help="take an external snapshot of this disk (the id of its -drive, -blockdev or -device) at the "
        "same instant: QEMU then writes to FILE (qcow2), and the previous file keeps the state at that "
        "instant; may be repeated")  # fmt: skip
    add_options(parser, LEFT_OUT["qemu save"], {
        "strict": "fail if QEMU discards memory before it is saved",
    })
    add("--stop-timeout", type=seconds, default=1.0, metavar="SECONDS",
        help="longest wait for the one thread of QEMU that opens the userfaultfd (default 1)")  # fmt: skip
    add("--monitor-timeout", type=seconds, default=60.0, metavar="SECONDS",
        help="longest wait for the answer of QEMU's monitor to one command (default 60)")  # fmt: skip
    add_report_options(parser)
    parser.set_defaults(run=run, parser=parser)


def parse_disk(text: str) -> tuple[str, str]:
    """``DISK=FILE``. Raises ValueError."""
    device, separator, file = text.partition("=")
    if not (device and separator and file):
        raise ValueError(f"{text!r} is not DISK=FILE")
    return device, file


def run(args: argparse.Namespace) -> int:
    """The command."""
    from snapengine.qemu.monitor import Monitor

    options = make_options(args)
    if args.via_migration and args.block_snapshot:
        args.parser.error(
            "--block-snapshot goes without --via-migration: QEMU does not stop where we could take it"
        )
    check_output(args.sink)
    with Monitor(args.qmp, command_seconds=args.monitor_timeout) as monitor:
        save = _save_by_migration if args.via_migration else _save
        result = save(monitor, args, options)
    report(result, args)
    return exit_code(result)


def _save_by_migration(monitor: Any, args: argparse.Namespace, options: Options) -> Result:
    from snapengine.qemu.via_migration import save_by_migration
    from snapengine.report.progress import Bar

    with Bar(args.quiet) as bar:
        return save_by_migration(monitor, args.sink, options, progress=bar.of_bytes("saving"))


def _save(monitor: Any, args: argparse.Namespace, options: Options) -> Result:
    from snapengine.capture.capture import snapshot
    from snapengine.qemu.target import QemuTarget
    from snapengine.report.progress import follow

    target = QemuTarget(
        monitor, args.pid, block_snapshots=dict(args.block_snapshot), deadline=args.stop_timeout
    )
    try:
        with snapshot(target, args.sink, options) as capture:
            follow(capture, args.quiet)
    except BaseException as error:
        for line in target.moved_disks:
            say(f"warning: {line}")
        if not isinstance(error, AttachError | UffdPermissionError):
            raise
        text = f"{error.strerror}. QEMU can also save itself: --via-migration"
        raise type(error)(error.errno, text) from None
    return capture.result

"""The machine part of `info`, in lines for a terminal."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from typing import Any

from snapengine.base.names import printable
from snapengine.base.units import format_count, format_size

UNKNOWN = "not recorded"


def machine_rows(machine: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value of what is worth a line, of members that `snapengine.qemu.blobs` has checked."""
    blocks = machine["ram_blocks"]
    size = format_size(sum(block["used"] for block in blocks))
    rows = [
        ("machine", printable(machine["machine_type"] or UNKNOWN)),
        ("QEMU", _qemu(machine)),
        ("saved via", printable(machine["via"])),
        ("RAM blocks", f"{format_count(len(blocks))}, {size}"),
    ]
    if machine.get("cpus"):
        counts = Counter(machine["cpus"]).items()
        rows.append(("CPUs", ", ".join(f"{count} x {printable(name)}" for name, count in counts)))
    for disk in machine.get("disks", ()):
        name = printable(disk["device"] or disk["node"])
        rows.append(("disk", f"{name}: {printable(disk['file'])}"))
    if machine.get("command_line"):
        rows.append(("command line", printable(shlex.join(machine["command_line"]))))
    return rows


def _qemu(machine: Mapping[str, Any]) -> str:
    version, accelerator = machine.get("qemu", UNKNOWN), machine.get("accelerator")
    return printable(f"{version}, accelerator {accelerator}" if accelerator else version)

"""The blobs of a machine's image: names and the description. FORMAT.md defines their content."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

HEAD = "qemu.stream.head"
TAIL = "qemu.stream.tail"
MACHINE = "qemu.machine"
DEVICES = "qemu.devices"
VERSION = 1
VIA_STREAM = "migration-stream"
VIA_DEVICES = "device-state"


def machine_blob(
    via: str, machine_type: str | None, blocks: Sequence[tuple[str, int]], more: dict[str, Any]
) -> bytes:
    """The description of a machine as the bytes of its blob; `more` are further members.

    `machine_type` is None where the stream does not name it; `blocks` are (name, bytes in use).
    """
    members: dict[str, Any] = {
        "version": VERSION,
        "via": via,
        "machine_type": machine_type,
        "ram_blocks": [{"name": name, "used": used} for name, used in blocks],
    }
    return json.dumps(members | more).encode("ascii")


def parse_members(blob: bytes) -> dict[str, Any]:
    """Members for `machine_blob` out of a blob that a caller made. ValueError: not one JSON object."""
    members = json.loads(blob)
    if not isinstance(members, dict):
        raise ValueError(f"{MACHINE}: not a JSON object")
    return members

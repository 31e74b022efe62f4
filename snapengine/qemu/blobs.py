"""The blobs of a machine's image: names and the description. FORMAT.md defines their content."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from snapengine.errors import CorruptImageError, UnsupportedVersionError

if TYPE_CHECKING:
    from snapengine.image import Image

HEAD = "qemu.stream.head"
TAIL = "qemu.stream.tail"
MACHINE = "qemu.machine"
DEVICES = "qemu.devices"
VERSION = 1
MACHINE_MAX_BYTES = 1 << 20
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


def read_machine(image: Image) -> dict[str, Any] | None:
    """The description of the machine that an image is of, as FORMAT.md has it; None: it is of no machine.

    `CorruptImageError`: it is malformed. `UnsupportedVersionError`: another version.
    """
    size = image.vmstate.sizes().get(MACHINE)
    if size is None:
        return None
    if size > MACHINE_MAX_BYTES:
        raise CorruptImageError(f"{image.name}: {MACHINE} has {size} bytes; {MACHINE_MAX_BYTES} are allowed")
    try:
        members = parse_members(image.vmstate[MACHINE])
    except (ValueError, RecursionError) as error:
        if isinstance(error, CorruptImageError):
            raise
        raise CorruptImageError(f"{image.name}: {MACHINE} is no JSON object") from None
    if members.get("version") != VERSION:
        version = str(members.get("version"))[:20]
        raise UnsupportedVersionError(f"{image.name}: {MACHINE} of version {version}; {VERSION} is known")
    if not _well_formed(members):
        raise CorruptImageError(f"{image.name}: {MACHINE} lacks a member, or one has a wrong type")
    return members


def _well_formed(members: dict[str, Any]) -> bool:
    blocks = members.get("ram_blocks")
    return (
        isinstance(members.get("via"), str)
        and isinstance(members.get("machine_type"), str | None)
        and isinstance(blocks, list)
        and all(
            isinstance(block, dict)
            and isinstance(block.get("name"), str)
            and isinstance(block.get("used"), int)
            and block["used"] > 0
            for block in blocks
        )
    )

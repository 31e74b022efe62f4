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
LISTED = {"devices": ("path", "type"), "disks": ("device", "node", "file")}
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
    return check_machine(image.vmstate[MACHINE], image.name)


def check_machine(blob: bytes, name: str) -> dict[str, Any]:
    """The members of the description in the image `name`; raises as `read_machine` does."""
    try:
        members = parse_members(blob)
    except (ValueError, RecursionError):
        raise CorruptImageError(f"{name}: {MACHINE} is no JSON object") from None
    if members.get("version") != VERSION:
        version = str(members.get("version"))[:20]
        raise UnsupportedVersionError(f"{name}: {MACHINE} of version {version}; {VERSION} is known")
    if not _well_formed(members):
        raise CorruptImageError(f"{name}: {MACHINE} lacks a member, or one has a wrong type")
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
            and isinstance(block.get("total", 0), int)
            for block in blocks
        )
        and all(isinstance(members.get(name, ""), str) for name in ("qemu", "accelerator"))
        and all(_texts(members.get(name, [])) for name in ("cpus", "command_line"))
        and all(_objects(members.get(name, []), keys) for name, keys in LISTED.items())
    )


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _objects(value: Any, keys: Sequence[str]) -> bool:
    """A list of objects that have at least these members, of text."""
    return isinstance(value, list) and all(
        isinstance(item, dict) and all(isinstance(item.get(key), str) for key in keys) for item in value
    )

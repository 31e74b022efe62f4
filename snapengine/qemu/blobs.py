"""The blobs of a machine's image: names and the description. FORMAT.md defines their content."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from snapengine.base.jsonfields import Fields, parse_object
from snapengine.base.names import without_controls
from snapengine.errors import CorruptImageError, ImageError, UnsupportedVersionError

if TYPE_CHECKING:
    from snapengine.image.describe import HasBlobs

HEAD = "qemu.stream.head"
TAIL = "qemu.stream.tail"
MACHINE = "qemu.machine"
DEVICES = "qemu.devices"
VERSION = 1
MACHINE_MAX_BYTES = 1 << 20
VIA_STREAM = "migration-stream"
LISTED = {"devices": ("path", "type"), "disks": ("device", "node", "file")}
VIA_DEVICES = "device-state"
NAME_MAX_BYTES = 255  # a stream has one byte for a name's length
RAM_BITS = 45  # more RAM no stream can have, see `snapengine.qemu.stream_parser`


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
    """Members for `machine_blob` out of a blob that a caller made. ValueError: not one JSON object, or a
    member has a type that no reader takes."""
    try:
        fields = parse_object(blob)
        _check_members(fields)
    except ValueError as error:
        raise ValueError(f"{MACHINE}: {error}") from None
    return fields.members


def machine_of(image: HasBlobs) -> dict[str, Any] | None:
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
    """The members of the description in the image `name`; raises as `machine_of` does."""
    try:
        fields = parse_object(blob)
        version = fields.members.get("version")
        if type(version) is not int or version != VERSION:
            text = f"{MACHINE} of version {without_controls(str(version))[:20]}; {VERSION} is known"
            raise UnsupportedVersionError(f"{name}: {text}")
        fields.plain("via")
        if fields.members.get("machine_type", "") is not None:
            fields.plain("machine_type")
        fields.objects("ram_blocks")
        _check_members(fields)
    except ImageError:
        raise
    except ValueError as error:
        text = f"{MACHINE} lacks a member, or one has a wrong type: {error}"
        raise CorruptImageError(f"{name}: {text}") from None
    return fields.members


def _check_members(fields: Fields) -> None:
    """``ValueError`` names a member that is there and is not what FORMAT.md says."""
    for key in filter(fields.has, ("qemu", "accelerator")):
        fields.plain(key)
    for key in filter(fields.has, ("cpus", "command_line")):
        fields.plains(key)
    for key, members in LISTED.items():
        for item in fields.objects(key) if fields.has(key) else ():
            for member in members:
                item.plain(member)
    for block in fields.objects("ram_blocks") if fields.has("ram_blocks") else ():
        _check_block(block)
    for backend in fields.objects("memory_backends") if fields.has("memory_backends") else ():
        backend.plain("id")
        backend.number("size", 64)
        backend.flag("share")
    if fields.has("stream"):
        _check_stream(fields.object("stream"))


def _check_block(block: Fields) -> None:
    name = block.plain("name")
    if not 0 < len(name.encode()) <= NAME_MAX_BYTES:
        raise ValueError(f"RAM block {name[:80]!r}: the name has not 1 to {NAME_MAX_BYTES} bytes")
    if block.number("used", RAM_BITS) == 0:
        raise ValueError(f"RAM block {name[:80]!r} is empty")
    for key in filter(block.has, ("total", "page_size")):
        block.number(key, 64)


def _check_stream(figures: Fields) -> None:
    for key in filter(figures.has, ("bytes", "pages", "zero_pages", "repeated")):
        figures.number(key, 64)
    if figures.has("ram_end"):
        figures.flag("ram_end")

"""The blobs of a machine's image: names, and the machine description. FORMAT.md defines them."""

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
DOMAIN_XML = "libvirt.domain"  # the XML in a save file of libvirt
VERSION = 1
MACHINE_MAX_BYTES = 1 << 20
VIA_STREAM = "migration-stream"
LIST_MEMBERS = {"devices": ("path", "type"), "disks": ("device", "node", "file")}
VIA_DEVICES = "device-state"
NAME_MAX_BYTES = 255  # the stream stores the length of a name in one byte
RAM_BITS = 45  # limit of a block's size; see RAM_MAX_BYTES in `snapengine.qemu.stream_parser`


def machine_blob(
    via: str, machine_type: str | None, blocks: Sequence[tuple[str, int]], more: dict[str, Any]
) -> bytes:
    """Return the machine description as a blob; `more` holds further members.

    `machine_type` is None if the stream does not name it; `blocks` are (name, bytes in use).
    """
    members: dict[str, Any] = {
        "version": VERSION,
        "via": via,
        "machine_type": machine_type,
        "ram_blocks": [{"name": name, "used": used} for name, used in blocks],
    }
    return json.dumps(members | more).encode("ascii")


def parse_members(blob: bytes) -> dict[str, Any]:
    """Parse a caller's blob into members for `machine_blob`. Raises ValueError if it is not one JSON object,
    or if readers would reject the type of a member."""
    try:
        fields = parse_object(blob)
        _check_members(fields)
    except ValueError as error:
        raise ValueError(f"{MACHINE}: {error}") from None
    return fields.members


def machine_of(image: HasBlobs) -> dict[str, Any] | None:
    """Return the machine description of an image (see FORMAT.md), or None if the image has none.

    Raises `CorruptImageError` if it is malformed, `UnsupportedVersionError` if its version is not supported.
    """
    size = image.vmstate.sizes().get(MACHINE)
    if size is None:
        return None
    if size > MACHINE_MAX_BYTES:
        raise CorruptImageError(f"{image.name}: {MACHINE} has {size} bytes; {MACHINE_MAX_BYTES} are allowed")
    return check_machine(image.vmstate[MACHINE], image.name)


def check_machine(blob: bytes, name: str) -> dict[str, Any]:
    """Return the members of the description in the image `name`; raises as `machine_of` does."""
    try:
        fields = parse_object(blob)
        version = fields.members.get("version")
        if type(version) is not int or version != VERSION:
            text = f"{MACHINE} of version {without_controls(str(version))[:20]}; {VERSION} is supported"
            raise UnsupportedVersionError(f"{name}: {text}")
        fields.string("via")
        if fields.members.get("machine_type", "") is not None:
            fields.string("machine_type")
        fields.objects("ram_blocks")
        _check_members(fields)
    except ImageError:
        raise
    except ValueError as error:
        text = f"{MACHINE}: a member is missing or has the wrong type: {error}"
        raise CorruptImageError(f"{name}: {text}") from None
    return fields.members


def _check_members(fields: Fields) -> None:
    """Raise ValueError with the name of a member that is present but violates FORMAT.md."""
    for key in filter(fields.has, ("qemu", "accelerator")):
        fields.string(key)
    for key in filter(fields.has, ("cpus", "command_line")):
        fields.strings(key)
    for key, members in LIST_MEMBERS.items():
        for item in fields.objects(key) if fields.has(key) else ():
            for member in members:
                item.string(member)
    for block in fields.objects("ram_blocks") if fields.has("ram_blocks") else ():
        _check_block(block)
    for backend in fields.objects("memory_backends") if fields.has("memory_backends") else ():
        backend.string("id")
        backend.number("size", 64)
        backend.flag("share")
    if fields.has("stream"):
        _check_stream(fields.object("stream"))


def _check_block(block: Fields) -> None:
    name = block.string("name")
    if not 0 < len(name.encode()) <= NAME_MAX_BYTES:
        raise ValueError(f"RAM block {name[:80]!r}: the name must have 1 to {NAME_MAX_BYTES} bytes")
    if block.number("used", RAM_BITS) == 0:
        raise ValueError(f"RAM block {name[:80]!r} is empty")
    for key in filter(block.has, ("total", "page_size")):
        block.number(key, 64)


def _check_stream(counts: Fields) -> None:
    for key in filter(counts.has, ("bytes", "pages", "zero_pages", "repeated")):
        counts.number(key, 64)
    if counts.has("ram_end"):
        counts.flag("ram_end")

"""The tail of a migration stream: device sections, EOF, and QEMU's description of the device state.

A device section does not state its length; only the device's code knows where it ends. Its end is therefore
found by its footer, which the next section or the EOF must follow.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from snapengine.errors import StreamError

EOF, FULL, DESCRIPTION, FOOTER = 0x00, 0x04, 0x06, 0x7E
FOOTER_BYTES = 5
_HEAD = struct.Struct(">BIB")
_NUMBERS = struct.Struct(">II")


class DeviceSection(NamedTuple):
    """The state of one device. `size` is in bytes and includes header and footer."""

    name: str
    instance: int
    version: int
    size: int


def end_of_sections(tail: bytes) -> int | None:
    """Return the offset of the EOF byte, or None if the tail is incomplete."""
    at = len(tail)
    for _ in range(4):  # the description's length may contain the two marker bytes, once
        at = tail.rfind(bytes([EOF, DESCRIPTION]), 0, at + 1)
        if at < 0:
            break
        if at + 6 + int.from_bytes(tail[at + 2 : at + 6], "big") == len(tail) and _footer_before(tail, at):
            return at
    at = len(tail) - 1  # suppress-vmdesc=on: no description, and no length field to check
    whole = at >= 0 and tail[at] == EOF and sum(one.size for one in _walk(tail, at, strict=True)) == at
    return at if whole else None


def _footer_before(tail: bytes, at: int) -> bool:
    return at >= FOOTER_BYTES and tail[at - FOOTER_BYTES] == FOOTER


def check_tail(tail: bytes, offset: int, name: str) -> None:
    """Raise `StreamError` if `tail` is incomplete. It ends at byte `offset` of the stream."""
    if end_of_sections(tail) is None:
        raise StreamError(f"{name}: the stream ends early, in the device state", offset)


def device_sections(tail: bytes) -> list[DeviceSection]:
    """Return the sections of a complete tail, in order. A section without a footer extends to the EOF."""
    end = end_of_sections(tail)
    return [] if end is None else _walk(tail, end)


def _walk(tail: bytes, end: int, *, strict: bool = False) -> list[DeviceSection]:
    """Return the sections up to `end`. `strict`: stop at a section without a footer."""
    found: list[DeviceSection] = []
    at = 0
    while at < end:
        header = _header(tail, at)
        if header is None:
            break
        section_id, name, instance, version, body = header
        stop = _section_end(tail, section_id, body, end)
        if stop is None and strict:
            break
        stop = end if stop is None else stop
        found.append(DeviceSection(name, instance, version, stop - at))
        at = stop
    return found


def _header(tail: bytes, at: int) -> tuple[int, str, int, int, int] | None:
    """Return (section id, name, instance, version, offset of the state), or None: no section begins here."""
    body = at + _HEAD.size
    if body >= len(tail) or tail[at] != FULL:
        return None
    _, section_id, length = _HEAD.unpack_from(tail, at)
    name = tail[body : body + length]
    body += length
    if not length or not name.isascii() or not name.decode("ascii").isprintable():
        return None
    if body + _NUMBERS.size > len(tail):
        return None
    return section_id, name.decode("ascii"), *_NUMBERS.unpack_from(tail, body), body + _NUMBERS.size


def _section_end(tail: bytes, section_id: int, body: int, end: int) -> int | None:
    """Return the end of the first footer that a section or the EOF follows, or None."""
    footer = bytes([FOOTER]) + section_id.to_bytes(4, "big")
    at = tail.find(footer, body, end)
    while at >= 0:
        at += FOOTER_BYTES
        if at == end or _header(tail, at) is not None:
            return at
        at = tail.find(footer, at - FOOTER_BYTES + 1, end)
    return None

"""The end of a migration stream: device sections, EOF, and the description that QEMU puts behind it.

A device's section does not say how long it is; where it ends only its device knows. So its end is where its
footer stands and the next section, or the EOF, begins.
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
    """The state of one device; `size` in bytes, header and footer included."""

    name: str
    instance: int
    version: int
    size: int


def end_of_sections(tail: bytes) -> int | None:
    """Where the EOF byte stands; None: the tail is not complete."""
    at = len(tail)
    for _ in range(4):  # the length of the description may look like its mark, once
        at = tail.rfind(bytes([EOF, DESCRIPTION]), 0, at + 1)
        if at < 0:
            break
        if at + 6 + int.from_bytes(tail[at + 2 : at + 6], "big") == len(tail) and _footer_before(tail, at):
            return at
    at = len(tail) - 1  # suppress-vmdesc=on: there is no description, and nothing states a length
    whole = at >= 0 and tail[at] == EOF and sum(one.size for one in _walk(tail, at, strict=True)) == at
    return at if whole else None


def _footer_before(tail: bytes, at: int) -> bool:
    return at >= FOOTER_BYTES and tail[at - FOOTER_BYTES] == FOOTER


def check_tail(tail: bytes, offset: int, name: str) -> None:
    """`StreamError` unless `tail`, which ends at byte `offset` of the stream, is complete at its end."""
    if end_of_sections(tail) is None:
        raise StreamError(f"{name}: the stream ends early, in the device state", offset)


def device_sections(tail: bytes) -> list[DeviceSection]:
    """The sections of a complete tail, in its order; as far as they can be told apart."""
    end = end_of_sections(tail)
    return [] if end is None else _walk(tail, end)


def _walk(tail: bytes, end: int, *, strict: bool = False) -> list[DeviceSection]:
    """Sections up to `end`; with `strict` without one that has no footer."""
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
    """(section id, name, instance, version, where its state begins), if a section begins here."""
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
    """Behind the first footer of the section with a section or the EOF behind it; None: there is none."""
    footer = bytes([FOOTER]) + section_id.to_bytes(4, "big")
    at = tail.find(footer, body, end)
    while at >= 0:
        at += FOOTER_BYTES
        if at == end or _header(tail, at) is not None:
            return at
        at = tail.find(footer, at - FOOTER_BYTES + 1, end)
    return None

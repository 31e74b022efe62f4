"""/proc/PID/maps: read it, and find the mappings of a range.

`snapengine.kernel.procmaps_line` parses its lines. Names are bytes: in a `Mapping` they are decoded with
surrogateescape, so that every byte is kept. A name is good enough for messages only;
`snapengine.kernel.backing` asks the kernel what the memory is.
"""

from __future__ import annotations

import bisect
import operator
from collections.abc import Iterator

from snapengine.kernel.procmaps_line import Mapping, parse_line, parse_maps, without_overlaps

__all__ = [
    "DELETED", "Mapping", "covering", "has_ended", "maps_text", "parse_line", "parse_maps", "read_maps",
    "read_smaps", "touching", "without_overlaps",
]  # fmt: skip

DELETED = " (deleted)"
"""What the kernel appends to the path of a file that was removed or renamed over."""


def read_maps(pid: int | str = "self", start: int = 0, end: int = 1 << 64) -> list[Mapping]:
    """The mappings of a process that overlap [start, end), by address. Raises OSError.

    Only those become objects: a Python process has hundreds of mappings.
    """
    return parse_maps(maps_text(pid), start, end)


def maps_text(pid: int | str = "self") -> bytes:
    """The text of /proc/PID/maps. Raises OSError. (30 000 lines: 4 ms, and 7 ms to parse them.)"""
    with open(f"/proc/{pid}/maps", "rb") as file:
        return file.read()


def read_smaps(pid: int | str = "self") -> Iterator[tuple[int, dict[bytes, bytes]]]:
    """The start of each mapping and its fields in /proc/PID/smaps. The kernel walks all page tables: 20 ms a
    GiB. Raises OSError."""
    start, fields = -1, dict[bytes, bytes]()
    with open(f"/proc/{pid}/smaps", "rb") as lines:
        for line in lines:
            name, colon, value = line.partition(b":")
            if colon and b" " not in name:  # in the first line of a mapping the first colon is in the device
                fields[name] = value.strip()
                continue
            if start >= 0:
                yield start, fields
            start, fields = int(line.partition(b"-")[0], 16), {}
    if start >= 0:
        yield start, fields


def has_ended(pid: int) -> bool:
    """Whether a process has no memory any more: it is exiting, dead or reaped. (A pidfd becomes readable only
    after the memory has been torn down, which takes long for a large process.)"""
    try:
        return not read_maps(pid)
    except (FileNotFoundError, ProcessLookupError):
        return True
    except PermissionError:  # it exists, and belongs to another user
        return False


def touching(mappings: list[Mapping], start: int, end: int) -> list[Mapping]:
    """Those of `mappings` (by address, without overlap) that contain any of [start, end)."""
    first = bisect.bisect_right(mappings, start, key=_mapping_end)
    last = first
    while last < len(mappings) and mappings[last].start < end:
        last += 1
    return mappings[first:last]


_mapping_end = operator.attrgetter("end")


def covering(mappings: list[Mapping], start: int, end: int) -> list[Mapping]:
    """The mappings that together contain all of [start, end); an empty list if part of it is not mapped."""
    found = touching(mappings, start, end)
    at = start
    for mapping in found:
        if mapping.start > at:
            return []
        at = mapping.end
    return found if at >= end else []

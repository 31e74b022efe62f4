"""/proc/PID/maps: which mapping holds an address, and what it is, in words that a message can use.

`snapengine.kernel.procmaps_line` takes its lines apart. Names are bytes: in a `Mapping` they are decoded with
surrogateescape, so that every byte stays. What a name says of the memory is a word for messages;
`snapengine.kernel.backing` asks the kernel.
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
"""What the kernel puts behind the path of a file that has lost that name."""


def read_maps(pid: int | str = "self", start: int = 0, end: int = 1 << 64) -> list[Mapping]:
    """The mappings of a process that overlap [start, end), by address. Raises OSError.

    Only those are parsed: a Python process has hundreds, which take milliseconds.
    """
    return parse_maps(maps_text(pid), start, end)


def maps_text(pid: int | str = "self") -> bytes:
    """/proc/PID/maps as it is. Raises OSError. (30 000 lines: 4 ms; to parse them takes 7.)"""
    with open(f"/proc/{pid}/maps", "rb") as file:
        return file.read()


def read_smaps(pid: int | str = "self") -> Iterator[tuple[int, dict[bytes, bytes]]]:
    """Of each mapping its address and the fields of /proc/PID/smaps. Walks all page tables: 20 ms a GiB.
    Raises OSError."""
    start, fields = -1, dict[bytes, bytes]()
    with open(f"/proc/{pid}/smaps", "rb") as lines:
        for line in lines:
            name, colon, value = line.partition(b":")
            if colon and b" " not in name:  # in a mapping's own line the first colon is that of the device
                fields[name] = value.strip()
                continue
            if start >= 0:
                yield start, fields
            start, fields = int(line.partition(b"-")[0], 16), {}
    if start >= 0:
        yield start, fields


def has_ended(pid: int) -> bool:
    """Whether a process has no memory any more: it is dying, dead or reaped. (A pidfd becomes readable
    later than that: after the memory is torn down, which takes long for a large process.)"""
    try:
        return not read_maps(pid)
    except (FileNotFoundError, ProcessLookupError):
        return True
    except PermissionError:  # of another user: it is there
        return False


def touching(mappings: list[Mapping], start: int, end: int) -> list[Mapping]:
    """The mappings (by address, without overlap) that hold any of [start, end)."""
    first = bisect.bisect_right(mappings, start, key=_mapping_end)
    last = first
    while last < len(mappings) and mappings[last].start < end:
        last += 1
    return mappings[first:last]


_mapping_end = operator.attrgetter("end")


def covering(mappings: list[Mapping], start: int, end: int) -> list[Mapping]:
    """The mappings that hold [start, end), if they hold all of it; otherwise an empty list."""
    found = touching(mappings, start, end)
    at = start
    for mapping in found:
        if mapping.start > at:
            return []
        at = mapping.end
    return found if at >= end else []

"""/proc/PID/maps: which mapping holds an address, and what it is, in words that a message can use.

The only parser of that file. Names are bytes: in a `Mapping` they are decoded with surrogateescape, so that
every byte stays. What a name says of the memory is a word for messages; `snapengine.backing` asks the kernel.
"""

from __future__ import annotations

import bisect
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from snapengine.names import decode

DELETED = " (deleted)"
"""What the kernel puts behind the path of a file that has lost that name."""


@dataclass(frozen=True, slots=True)
class Mapping:
    """One line of /proc/PID/maps; ``start`` and ``end`` are byte addresses."""

    start: int
    end: int
    perms: str
    offset: int
    device: str
    inode: int
    path: str

    @property
    def shared(self) -> bool:
        """A MAP_SHARED mapping: other mappings of the same memory may exist."""
        return self.perms[3] == "s"

    @property
    def has_file(self) -> bool:
        """Whether a file is behind it, be it only the kernel's own. (The inode may be 0: System V memory.)"""
        return self.inode != 0 or self.device != "00:00"

    def same_file(self, other: Mapping) -> bool:
        """Whether both are shared mappings of one file: where their ranges overlap, of the same pages."""
        mine, its = (self.device, self.inode), (other.device, other.inode)
        return self.shared and other.shared and self.has_file and mine == its

    @property
    def backing(self) -> Literal["anonymous", "memory file", "file"]:
        """What its name says of it, for messages: nothing but this mapping holds the pages, a memory file
        (memfd, /dev/shm), or a file. (`snapengine.backing` knows.)"""
        if not self.shared and (not self.path or self.path.startswith("[")):
            return "anonymous"
        if self.path.startswith(("/memfd:", "/dev/shm/", "/dev/zero", "/SYSV", "/anon_hugepage", "[anon_")):
            return "memory file"
        return "file"

    def __str__(self) -> str:
        kind = "shared" if self.shared else "private"
        name = f" {self.path}" if self.path else ""
        return f"{self.start:#x}-{self.end:#x} ({kind}, {self.backing}{name})"


def read_maps(pid: int | str = "self", start: int = 0, end: int = 1 << 64) -> list[Mapping]:
    """The mappings of a process that overlap [start, end), by address. Raises OSError.

    Only those are parsed: a Python process has hundreds, which take milliseconds.
    """
    return parse_maps(maps_text(pid), start, end)


def maps_text(pid: int | str = "self") -> bytes:
    """/proc/PID/maps as it is. Raises OSError. (30 000 lines: 4 ms; to parse them takes 70.)"""
    with open(f"/proc/{pid}/maps", "rb") as file:
        return file.read()


def parse_maps(text: bytes, start: int = 0, end: int = 1 << 64) -> list[Mapping]:
    """See `read_maps`."""
    # Only a line feed ends a line: the kernel leaves a carriage return in a name as it is.
    lines = text.removesuffix(b"\n").split(b"\n")
    if lines == [b""]:
        return []
    mappings = []
    for number in range(bisect.bisect_right(lines, start, key=_end_of), len(lines)):
        mapping = parse_line(lines[number])
        if mapping.start >= end:
            break
        mappings.append(mapping)
    return without_overlaps(mappings)


def parse_line(line: bytes) -> Mapping:
    """One line, without its line feed (proc_pid_maps(5)). Of the name every byte counts, spaces too."""
    fields = line.split(b" ", 5)
    first, _, last = fields[0].partition(b"-")
    perms, device = fields[1].decode("ascii"), fields[3].decode("ascii")
    path = decode(fields[5].lstrip(b" ")) if len(fields) > 5 else ""
    return Mapping(int(first, 16), int(last, 16), perms, int(fields[2], 16), device, int(fields[4]), path)


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


def without_overlaps(mappings: list[Mapping]) -> list[Mapping]:
    """The kernel gives the list in pieces of a page. A mapping that has grown or was merged between two of
    them is in both, from its begin: of the second only what the first has not."""
    found: list[Mapping] = []
    for mapping in mappings:
        known = found[-1].end if found else 0
        if mapping.start >= known:
            found.append(mapping)
        elif mapping.end > known:
            offset = mapping.offset + known - mapping.start if mapping.has_file else mapping.offset
            found.append(replace(mapping, start=known, offset=offset))
    return found


def _end_of(line: bytes) -> int:
    return int(line[line.index(b"-") + 1 : line.index(b" ")], 16)


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

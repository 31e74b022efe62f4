"""/proc/PID/maps: which mapping holds an address, and what it is, in words that a message can use."""

from __future__ import annotations

import bisect
import contextlib
import os
from dataclasses import dataclass, replace
from typing import Literal

from snapengine import procfs
from snapengine.names import decode


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

    def same_file(self, other: Mapping) -> bool:
        """Whether both are shared mappings of one file: where their ranges overlap, of the same pages."""
        mine, its = (self.device, self.inode), (other.device, other.inode)
        return self.shared and other.shared and self.inode != 0 and mine == its

    @property
    def backing(self) -> Literal["anonymous", "memory file", "file"]:
        """What holds the pages: nothing but this mapping, a memory file (memfd, /dev/shm), or a file."""
        if not self.path or self.path.startswith("["):
            return "anonymous"
        if self.path.startswith(("/memfd:", "/dev/shm/", "/dev/zero", "/SYSV", "/anon_hugepage")):
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
    with open(f"/proc/{pid}/maps", "rb") as file:
        # Only a line feed ends a line: the kernel leaves a carriage return in a name as it is.
        lines = file.read().removesuffix(b"\n").split(b"\n")
    if lines == [b""]:
        return []
    mappings = []
    for number in range(bisect.bisect_right(lines, start, key=_end_of), len(lines)):
        fields = decode(lines[number]).split(maxsplit=5)
        first, last = (int(part, 16) for part in fields[0].split("-"))
        if first >= end:
            break
        path = fields[5] if len(fields) > 5 else ""
        mappings.append(Mapping(first, last, fields[1], int(fields[2], 16), fields[3], int(fields[4]), path))
    return without_overlaps(mappings)


def without_overlaps(mappings: list[Mapping]) -> list[Mapping]:
    """The kernel gives the list in pieces of a page. A mapping that has grown or was merged between two of
    them is in both, from its begin: of the second only what the first has not."""
    found: list[Mapping] = []
    for mapping in mappings:
        known = found[-1].end if found else 0
        if mapping.start >= known:
            found.append(mapping)
        elif mapping.end > known:
            offset = mapping.offset + known - mapping.start if mapping.inode else mapping.offset
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


def covering(mappings: list[Mapping], start: int, end: int) -> list[Mapping]:
    """The mappings that hold [start, end), if they hold all of it; otherwise an empty list."""
    found = [m for m in mappings if m.start < end and m.end > start]
    at = start
    for mapping in found:
        if mapping.start > at:
            return []
        at = mapping.end
    return found if at >= end else []


def page_size_of(mapping: Mapping, pid: int | str = "self") -> int:
    """Bytes of the pages that a mapping is made of: for a memory file, which alone can be made of huge pages,
    the block size of its file system; or, where that may not be asked, KernelPageSize of /proc/PID/smaps,
    which walks page tables (30 ms per GiB).
    """
    if mapping.backing != "memory file" or mapping.path.startswith("/dev/zero"):
        return 4096
    with contextlib.suppress(OSError):
        return os.statvfs(f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}").f_bsize
    wanted = f"{mapping.start:08x}-"
    found = False
    for line in procfs.lines(f"/proc/{pid}/smaps"):
        if not found:
            found = line.startswith(wanted)
        elif line.startswith("KernelPageSize:"):
            return int(line.split()[1]) * 1024
    return 4096

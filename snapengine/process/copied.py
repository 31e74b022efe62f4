"""Pages that are copied while an attached process is stopped. `snapengine.capture.copied` writes them.

Reading must not change the target: shared memory is read through its file, so that holes stay holes, and of
private memory only populated pages are read.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from snapengine.kernel.pagemap import CATEGORIES, populated_runs
from snapengine.kernel.procmaps import Mapping
from snapengine.process.mapping_facts import data_ranges
from snapengine.regions import PAGE_BYTES, Region
from snapengine.targets.base import Copied

PIECE_BYTES = 4 << 20

Way = Literal["all", "populated", "own", "file"]
"""Which pages are read: all; those in the page tables; pages of a private mapping that differ from its file;
pages that the file has data for."""


@dataclass(frozen=True, slots=True)
class Copy:
    """One region to be copied. ``whole``: with "own", the clean pages of the file too."""

    region: Region
    mapping: Mapping
    way: Way = "all"
    whole: bool = False


class Copier:
    """Reads from a process that is stopped. A context manager. Raises OSError."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            os.close(self._memory)
            raise

    def __enter__(self) -> Copier:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._memory)
        os.close(self._pagemap)

    def copy(self, copy: Copy) -> Copied:
        """The pages of one region."""
        start, end = copy.region.addr, copy.region.addr + copy.region.length
        if copy.way == "all":
            return self._of_memory(start, [(start, end)])
        if copy.way == "populated":
            return self._of_memory(start, [(low, high) for low, high, _ in self._populated(start, end)])
        file = self._open_file(copy.mapping)
        try:
            if copy.way == "file":
                return self._of_file(copy, file, []) if file >= 0 else self._of_memory(start, [(start, end)])
            own = [run[:2] for run in self._populated(start, end) if not run[2] & CATEGORIES["FILE"]]
            if not copy.whole:
                return self._of_memory(start, own)
            if file < 0:
                return self._of_memory(start, [(start, end)])
            copied = self._of_file(copy, file, own)
            rest = self._of_memory(start, own)
            return Copied(copied.runs + rest.runs, rest.unreadable)
        finally:
            if file >= 0:
                os.close(file)

    def _populated(self, start: int, end: int) -> list[tuple[int, int, int]]:
        return populated_runs(self._pagemap, start, end)

    def _open_file(self, mapping: Mapping) -> int:
        path = f"/proc/{self._pid}/map_files/{mapping.start:x}-{mapping.end:x}"
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # not permitted: it is read through the mapping, which fills holes
            return -1

    def _of_memory(self, base: int, ranges: list[tuple[int, int]]) -> Copied:
        copied = Copied()
        for start, end in ranges:
            for at in range(start, end, PIECE_BYTES):
                self._read(copied, base, at, min(at + PIECE_BYTES, end))
        return copied

    def _read(self, copied: Copied, base: int, start: int, end: int) -> None:
        """A read ends at the first page that cannot be read; the pages behind it may be readable."""
        while start < end:
            try:
                data = os.pread(self._memory, end - start, start)
            except OSError:
                data = b""
            whole = len(data) // PAGE_BYTES * PAGE_BYTES
            if whole:
                copied.runs.append(((start - base) // PAGE_BYTES, data[:whole]))
            start += whole
            if start < end:
                copied.unreadable.append((start - base) // PAGE_BYTES)
                start += PAGE_BYTES

    def _of_file(self, copy: Copy, file: int, own: list[tuple[int, int]]) -> Copied:
        """The pages of the file outside the ranges `own`."""
        copied = Copied()
        shift = copy.mapping.start - copy.mapping.offset
        start, end = copy.region.addr - shift, copy.region.addr + copy.region.length - shift
        for low, high in data_ranges(file, start, end):
            for left, right in outside(low + shift, high + shift, own):
                for at in range(left, right, PIECE_BYTES):
                    size = min(PIECE_BYTES, right - at)
                    data = os.pread(file, size, at - shift)
                    data += bytes(-len(data) % PAGE_BYTES)  # the page in which the file ends
                    copied.runs.append(((at - copy.region.addr) // PAGE_BYTES, data))
        return copied


def outside(start: int, end: int, ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts of [start, end) outside the ranges, which are sorted."""
    found = []
    for low, high in ranges:
        if high <= start or low >= end:
            continue
        if low > start:
            found.append((start, low))
        start = max(start, high)
    if start < end:
        found.append((start, end))
    return found


def copy_all(pid: int, copies: list[Copy]) -> list[Copied]:
    """The pages of each region of a process that is stopped. Raises OSError."""
    if not copies:
        return []
    with Copier(pid) as copier:
        return [copier.copy(copy) for copy in copies]

"""Facts about one process's mappings: what backs them, how many pages are private, which ones cannot be
tracked.

Reads /proc only. Unless the process is stopped, the answers may be outdated.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping as Dict

from snapengine.base.descriptor import Descriptor
from snapengine.kernel.backing import Backing, Backings
from snapengine.kernel.pagemap import CATEGORIES, populated_runs
from snapengine.kernel.procmaps import Mapping, read_smaps

REFUSED_FLAGS = {b"um": errno.EBUSY, b"uw": errno.EBUSY, b"ui": errno.EBUSY, b"dp": errno.EINVAL}
"""VmFlags of /proc/PID/smaps for which the kernel refuses to register a mapping, and the errno: it has a
userfaultfd already, or is droppable."""


class MapFacts:
    """Facts about the mappings of process `pid`, each read once, when it is needed.

    ``refused``: see `refusals`.
    """

    def __init__(self, pid: int, refused: Dict[int, int] | None = None) -> None:
        self._pid = pid
        self._backings = Backings(pid)
        self.refusals = dict(refused or {})
        """From the start of a mapping to the errno with which the kernel refuses to track it."""
        self._own: dict[Mapping, int] = {}

    def backing(self, mapping: Mapping) -> Backing:
        """What holds the pages."""
        return self._backings.of(mapping)

    def refused(self, mapping: Mapping) -> int:
        """The errno with which the kernel refuses to track it; 0: no refusal is known."""
        return self.refusals.get(mapping.start, 0)

    def own_bytes(self, mapping: Mapping) -> int:
        """Of a private mapping of a file: bytes in pages that the process has modified."""
        if mapping not in self._own:
            self._own[mapping] = self._bytes(mapping, without=CATEGORIES["FILE"])
        return self._own[mapping]

    def populated_bytes(self, mapping: Mapping) -> int:
        """Bytes that are present in the page tables, or swapped out."""
        return self._bytes(mapping)

    def file_data_bytes(self, mapping: Mapping) -> int:
        """Bytes of the mapping that its file has data for."""
        path = f"/proc/{self._pid}/map_files/{mapping.start:x}-{mapping.end:x}"
        size = mapping.end - mapping.start
        try:
            file = Descriptor(path, os.O_RDONLY)
        except OSError:
            return size
        with file as fd:
            return sum(end - start for start, end in data_ranges(fd, mapping.offset, mapping.offset + size))

    def _bytes(self, mapping: Mapping, without: int = 0) -> int:
        try:
            with open(f"/proc/{self._pid}/pagemap", "rb", buffering=0) as pagemap:
                runs = populated_runs(pagemap.fileno(), mapping.start, mapping.end)
        except OSError:
            return mapping.end - mapping.start
        return sum(end - start for start, end, categories in runs if not categories & without)


def data_ranges(fd: int, start: int, end: int) -> list[tuple[int, int]]:
    """The parts of [start, end) for which a file has data, in whole pages; all of it if that is unknown."""
    found: list[tuple[int, int]] = []
    size = -(-os.fstat(fd).st_size // 4096) * 4096
    end = min(end, size)
    at = start
    while at < end:
        try:
            data = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return found
            return [*found, (at, end)]
        if data >= end:
            return found
        hole = min(-(-os.lseek(fd, data, os.SEEK_HOLE) // 4096) * 4096, end)
        found.append((data & -4096, hole))
        at = hole
    return found


def refused_by_flags(pid: int) -> dict[int, int]:
    """The mappings that the kernel would refuse to track, by their VmFlags. Reads smaps: 20 ms a GiB. Raises
    OSError."""
    found = {}
    for start, fields in read_smaps(pid):
        for flag in fields.get(b"VmFlags", b"").split():
            if flag in REFUSED_FLAGS:
                found[start] = REFUSED_FLAGS[flag]
    return found

"""Check a peer's claims about its mappings against its /proc/PID/maps and the files behind them."""

from __future__ import annotations

import os
from bisect import bisect_right
from typing import NamedTuple

from snapengine.errors import HandoverError, TargetGoneError
from snapengine.handover.message import Mapping
from snapengine.kernel.backing import Backings
from snapengine.kernel.procmaps import Mapping as MemoryMapping
from snapengine.kernel.procmaps import read_maps
from snapengine.regions import kind_of


class Checked(NamedTuple):
    """The kind of a mapping, of `regions.KINDS`; ``zero_inode`` as in `regions.Region`."""

    kind: str
    zero_inode: int = 0


def check_mapped(pid: int, mappings: tuple[Mapping, ...], memfds: dict[int, int]) -> list[Checked]:
    """Check that each mapping exists as claimed; return their kinds.

    `memfds`: from the index in the message to the descriptor in this process.

    Raises
    ------
    HandoverError
        A range is not mapped, has another kind or page size than claimed, or is not of its memfd.
    TargetGoneError
    """
    start = min(mapping.addr for mapping in mappings)
    end = max(mapping.addr + mapping.length for mapping in mappings)
    try:
        vmas = read_maps(pid, start, end)
    except PermissionError:
        raise HandoverError(f"no permission to read the memory map of process {pid}") from None
    except (FileNotFoundError, ProcessLookupError):
        raise TargetGoneError(f"process {pid} has ended") from None
    starts = [vma.start for vma in vmas]
    backings = Backings(pid)
    checked = []
    for mapping in mappings:
        first = max(bisect_right(starts, mapping.addr) - 1, 0)
        last = bisect_right(starts, mapping.addr + mapping.length - 1)
        covering = [vma for vma in vmas[first:last] if vma.end > mapping.addr]
        checked.append(_check_one(mapping, covering, memfds, pid, backings))
    return checked


def _check_one(
    mapping: Mapping, vmas: list[MemoryMapping], memfds: dict[int, int], pid: int, backings: Backings
) -> Checked:
    where = f"mapping {mapping.name[:40]}"
    at = mapping.addr
    for vma in vmas:
        if vma.start > at:
            break
        at = vma.end
    if at < mapping.addr + mapping.length:
        raise HandoverError(f"{where}: {at:#x} is not mapped in process {pid}")
    memfd = memfds[mapping.memfd] if mapping.memfd > 0 else -1
    found = {(vma.shared, _page_size(vma, memfd, backings)) for vma in vmas}
    if len(found) != 1:
        raise HandoverError(f"{where}: spans mappings of different kinds")
    ((shared, page_size),) = found
    if page_size != mapping.page_size:
        raise HandoverError(f"{where}: page_size: {mapping.page_size}, but its pages have {page_size} bytes")
    kind = kind_of(page_size, shared)
    if mapping.kind not in ("", kind):
        raise HandoverError(f"{where}: kind: {mapping.kind}, but it is {kind}")
    if mapping.memfd > 0:
        _check_memfd(mapping, vmas, memfds[mapping.memfd], where)
    zeros = {vma.inode for vma in vmas if backings.of(vma).kind == "anonymous"} - {0}
    return Checked(kind, max(zeros, default=0))


def _check_memfd(mapping: Mapping, vmas: list[MemoryMapping], fd: int, where: str) -> None:
    for vma in vmas:
        if not vma.shared:
            raise HandoverError(f"{where}: memfd: the mapping is private, so its content is not the memfd's")
        if not _is_file(vma, fd):
            raise HandoverError(f"{where}: memfd: another file is mapped there")
        if vma.offset - vma.start != mapping.offset - mapping.addr:
            raise HandoverError(f"{where}: offset: the mapping begins elsewhere in the memfd")


def _is_file(vma: MemoryMapping, fd: int) -> bool:
    status = os.fstat(fd)
    major, minor = vma.device.split(":")
    device = os.makedev(int(major, 16), int(minor, 16))
    return (device, vma.inode) == (status.st_dev, status.st_ino)


def _page_size(vma: MemoryMapping, memfd: int, backings: Backings) -> int:
    """A memfd tells its page size without any privilege."""
    if memfd >= 0 and _is_file(vma, memfd):
        return os.fstatvfs(memfd).f_bsize  # on hugetlbfs, the size of its pages
    return backings.of(vma).page_bytes

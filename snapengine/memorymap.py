"""What is mapped where in a process: /proc/PID/maps, and smaps where the page size matters."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from . import procfs
from .errors import HandoverError, TargetGoneError
from .handover import PAGE_SIZES, Mapping


@dataclass(frozen=True, slots=True)
class Vma:
    """One line of maps. `page_size` is 4096 where the line alone says so, else 0: ask smaps."""

    start: int
    end: int
    shared: bool
    writable: bool
    offset: int
    device: int
    inode: int
    page_size: int


def parse_maps_line(line: str) -> Vma:
    """See proc_pid_maps(5)."""
    span, permissions, offset, device, inode, *_ = line.split(maxsplit=5)
    start, end = span.split("-")
    major, minor = device.split(":")
    return Vma(
        start=int(start, 16),
        end=int(end, 16),
        shared=permissions[3] == "s",
        writable=permissions[1] == "w",
        offset=int(offset, 16),
        device=os.makedev(int(major, 16), int(minor, 16)),
        inode=int(inode),
        page_size=0 if inode != "0" else PAGE_SIZES[0],  # hugetlb always has a file behind it
    )


def check_mapped(pid: int, mappings: tuple[Mapping, ...], memfds: dict[int, int]) -> list[str]:
    """Check that each mapping is there as claimed; return their kinds (of `targets.KINDS`).

    `memfds`: from the index in the message to the descriptor in this process.

    Raises
    ------
    HandoverError
        A range is not mapped, has another kind or page size than claimed, or is not of its memfd.
    TargetGoneError
    """
    ordered = sorted(range(len(mappings)), key=lambda index: mappings[index].addr)
    kinds = [""] * len(mappings)
    vmas: list[Vma] = []
    lines = _vmas(pid)
    for index in ordered:
        mapping = mappings[index]
        vmas = [vma for vma in vmas if vma.end > mapping.addr]
        while not vmas or vmas[-1].end < mapping.addr + mapping.length:
            vma = next(lines, None)
            if vma is None:
                break
            if vma.end > mapping.addr:
                vmas.append(vma)
        covering = [vma for vma in vmas if vma.start < mapping.addr + mapping.length]
        kinds[index] = _check_one(mapping, covering, memfds, pid)
    return kinds


def _check_one(mapping: Mapping, vmas: list[Vma], memfds: dict[int, int], pid: int) -> str:
    where = f"mapping {mapping.name[:40]}"
    at = mapping.addr
    for vma in vmas:
        if vma.start > at:
            break
        at = vma.end
    if at < mapping.addr + mapping.length:
        raise HandoverError(f"{where}: {at:#x} is not mapped in process {pid}")
    memfd = memfds[mapping.memfd] if mapping.memfd > 0 else -1
    found = {(vma.shared, _page_size(pid, vma, memfd)) for vma in vmas}
    if len(found) != 1:
        raise HandoverError(f"{where}: spans mappings of different kinds")
    ((shared, page_size),) = found
    if page_size != mapping.page_size:
        raise HandoverError(f"{where}: page_size: {mapping.page_size}, but its pages have {page_size} bytes")
    if page_size == PAGE_SIZES[0]:
        kind = "shared" if shared else "anon"
    else:
        kind = "hugetlb-shared" if shared else "hugetlb"
    if mapping.kind not in ("", kind):
        raise HandoverError(f"{where}: kind: {mapping.kind}, but it is {kind}")
    if mapping.memfd > 0:
        _check_memfd(mapping, vmas, memfds[mapping.memfd], where)
    return kind


def _check_memfd(mapping: Mapping, vmas: list[Vma], fd: int, where: str) -> None:
    status = os.fstat(fd)
    for vma in vmas:
        if not vma.shared:
            raise HandoverError(f"{where}: memfd: a private mapping is not what the memfd holds")
        if (vma.device, vma.inode) != (status.st_dev, status.st_ino):
            raise HandoverError(f"{where}: memfd: it is not what is mapped there")
        if vma.offset - vma.start != mapping.offset - mapping.addr:
            raise HandoverError(f"{where}: offset: not where the mapping begins in the memfd")


def _vmas(pid: int) -> Iterator[Vma]:
    """Lazily: a process may have many thousands of mappings behind the last one that counts."""
    try:
        for line in procfs.lines(f"/proc/{pid}/maps"):
            yield parse_maps_line(line)
    except PermissionError:
        raise HandoverError(f"may not read the memory map of process {pid}") from None
    except (FileNotFoundError, ProcessLookupError):
        raise TargetGoneError(f"process {pid} has ended") from None


def _page_size(pid: int, vma: Vma, memfd: int = -1) -> int:
    """smaps walks all page tables up to the mapping (5 to 15 ms per GiB), so only where neither maps nor the
    memory's file can tell."""
    if vma.page_size:
        return vma.page_size
    if memfd >= 0:
        status = os.fstat(memfd)
        if (vma.device, vma.inode) == (status.st_dev, status.st_ino):
            return os.fstatvfs(memfd).f_bsize  # of hugetlbfs that is the size of its pages
    head = f"{vma.start:08x}-{vma.end:08x} "
    found = False
    try:
        for line in procfs.lines(f"/proc/{pid}/smaps"):
            found = found or line.startswith(head)
            if found and line.startswith("KernelPageSize:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        raise TargetGoneError(f"process {pid} has ended") from None
    raise HandoverError(f"mapping at {vma.start:#x}: it changed during the hand-over")

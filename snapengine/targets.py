"""Whose memory a capture saves: the parts that every target has in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

PAGE_BYTES = 4096
KINDS = ("anon", "shared", "hugetlb", "hugetlb-shared")


@dataclass(frozen=True, slots=True)
class Region:
    """One run of tracked memory.

    ``addr`` and ``length`` are bytes in the target's address space; a region of this process's own
    buffers may begin and end inside a page. ``page_size`` is the size of the mapping's pages (4096, or
    the hugetlb page size). ``kind`` is one of `KINDS`. ``memfd`` is a descriptor of the memory that
    this process holds, or -1; ``memfd_offset`` is where the region begins in it.
    """

    name: str
    addr: int
    length: int
    page_size: int = PAGE_BYTES
    kind: str = "anon"
    memfd: int = -1
    memfd_offset: int = 0


@runtime_checkable
class Target(Protocol):
    """What a capture asks of a target.

    A capture calls `open` once, then `pause`, `vmstate` and `resume` around T where `can_pause` is
    true (`vmstate` alone otherwise), and `close` exactly once at the end, also after an error.
    """

    can_pause: bool

    def open(self, features: int) -> tuple[int, int, list[Region]]:
        """Return ``(pid, uffd, regions)``.

        ``pid`` is 0 for this process. ``uffd`` is a userfaultfd descriptor of the target, or -1: the capture
        opens one (only for this process). ``features``: the UFFD_FEATURE bits that the capture wants.
        """

    def pause(self) -> None:
        """Stop every writer of the memory. Returns when they stand."""

    def resume(self) -> None:
        """Let the writers go on."""

    def vmstate(self) -> dict[str, bytes]:
        """Named blobs that belong to T."""

    def close(self, status: str) -> None:
        """The capture is over: ``"completed"``, ``"not-converged"``, ``"cancelled"`` or ``"failed"``."""

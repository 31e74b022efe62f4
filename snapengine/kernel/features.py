"""Kernel features by version, and what a capture does without them: one table for the engine's errors, its
warnings and `snapengine doctor`. Sources: linux/userfaultfd.h, Documentation/admin-guide/mm."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KernelFeature:
    """One row. ``name`` is the kernel's name; for features of userfaultfd without UFFD_FEATURE_."""

    name: str
    since: str
    """The Linux release that brought it."""
    purpose: str = ""
    """What a capture uses it for; "": nothing."""
    without: str = ""
    """What a capture does on a kernel that lacks it."""
    needed: bool = False
    """Whether write tracking is impossible without it."""
    bit: int = -1
    """Of a userfaultfd feature: the number of its bit."""


UFFD_FEATURES = {
    row.name: row
    for row in (
        KernelFeature(
            "PAGEFAULT_FLAG_WP", "5.7", "write protection: the base of everything",
            "nothing can be tracked", needed=True, bit=0,
        ),
        KernelFeature(
            "WP_HUGETLBFS_SHMEM", "5.19", "shared memory (memfd, tmpfs) and hugetlb memory",
            "such memory is refused; save the rest of a process with --regions anon,heap,stack,files", bit=12,
        ),
        KernelFeature(
            "WP_ASYNC", "6.7", "dirty logging", "dirty logging is refused; write tracking works", bit=15
        ),
        KernelFeature(
            "MISSING_SHMEM", "4.11", "finds what is punched out of shared memory, and large holes",
            "shared memory that is punched out and filled again after T is saved as zeros", bit=5,
        ),
        KernelFeature(
            "EVENT_FORK", "4.11", "targets that fork during a snapshot",
            "what a forked child writes to shared memory is not seen", bit=1,
        ),
        KernelFeature(
            "EVENT_REMAP", "4.11", "processes that move shared memory during a snapshot",
            "what a process writes to shared memory that it has moved is not seen", bit=2,
        ),
        KernelFeature(
            "EVENT_REMOVE", "4.11", "processes that discard private memory of files during a snapshot",
            "such memory may be saved as the file has it", bit=3,
        ),
        KernelFeature("MISSING_HUGETLBFS", "4.11", bit=4),
        KernelFeature("EVENT_UNMAP", "4.11", bit=6),
        KernelFeature("MINOR_HUGETLBFS", "5.13", bit=9),
        KernelFeature("MINOR_SHMEM", "5.14", bit=10),
        KernelFeature("WP_UNPOPULATED", "6.4", bit=13),
        KernelFeature("POISON", "6.6", bit=14),
    )
}  # fmt: skip
"""All that this package knows by name, those that a capture uses first."""

PAGEMAP_SCAN = KernelFeature(
    "PAGEMAP_SCAN", "6.7", "finds populated, huge and written pages",
    "page tables are read page by page, huge pages are saved in small ones, and dirty logging is refused",
)  # fmt: skip
UNCHECKED = (
    "pages that the target discards or replaces after T are not noticed: their later content may be in the "
    "image"
)
PAGEMAP_WP_BIT = KernelFeature(
    "write protection in pagemap", "5.14", "tells after each copy whether the page was still protected",
    "what the target discards or replaces after T is not noticed: each result warns, and strict is refused",
)  # fmt: skip


def named(name: str) -> str:
    """``"UFFD_FEATURE_NAME (Linux X)"``, for messages."""
    row = UFFD_FEATURES.get(name)
    return f"UFFD_FEATURE_{name}" + (f" (Linux {row.since})" if row else "")

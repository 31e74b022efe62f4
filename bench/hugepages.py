"""Huge pages of another process: measure their share, collapse into them, and start without them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Iterator
from pathlib import Path

HUGE = 2 << 20
PR_SET_THP_DISABLE = 41  # linux/prctl.h
MADV_COLLAPSE = 25  # asm-generic/mman-common.h, Linux 6.1
SYS_PROCESS_MADVISE = 440
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def no_huge_pages() -> Iterator[None]:
    """Programs started in the block get no transparent huge pages (prctl(2): inherited over execve)."""
    _disable(1)
    try:
        yield
    finally:
        _disable(0)


def _disable(value: int) -> None:
    if _libc.prctl(PR_SET_THP_DISABLE, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_THP_DISABLE")


def huge_share(pid: int, addr: int) -> float:
    """The share, 0 to 1, of the private mapping at `addr` that is mapped by huge pages."""
    values, inside = {"Rss": 0, "AnonHugePages": 0}, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            start, end = (int(part, 16) for part in name.split("-"))
            inside = start <= addr < end
        elif inside and name[:-1] in values:
            values[name[:-1]] = int(rest.split()[0])
    return values["AnonHugePages"] / values["Rss"] if values["Rss"] else 0.0


def collapse(pid: int, addr: int, length: int) -> int:
    """Collapse a range into huge pages, as khugepaged would; returns how many calls were refused.

    The kernel stops at the first huge page that it cannot make, so there is a call for each.
    """
    pidfd = os.pidfd_open(pid)
    refused = 0
    try:
        for at in range(addr, addr + length - HUGE + 1, HUGE):
            vector = ctypes.create_string_buffer(struct.pack("QQ", at, HUGE), 16)
            refused += _libc.syscall(SYS_PROCESS_MADVISE, pidfd, vector, 1, MADV_COLLAPSE, 0) < 0
    finally:
        os.close(pidfd)
    return refused

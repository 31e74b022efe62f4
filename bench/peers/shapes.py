"""Ways to save memory of this process into a raw file or, without a path, into the null sink."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from snapengine.guest.memory import GuestMemory
from snapengine.kernel.uffd import FEATURES, Uffd

Way = Callable[[GuestMemory, Path | None, Callable[[], Any]], dict[str, int]]


def ways(loops: SimpleNamespace) -> dict[str, Way]:
    """The ways by name. Each saves the memory, calls its last argument at T, and returns its figures.

    `loops`: of floorkit.load_loops().
    """
    return {
        "qemu-shape": lambda *arguments: _by_pages(loops.qemu_shape, *arguments),
        "forkd-shape": lambda *arguments: _by_pages(loops.forkd_shape, *arguments),
        "fork": lambda *arguments: _by_fork(loops.fork_save, *arguments),
    }


def _by_pages(
    loop: ModuleType, memory: GuestMemory, path: Path | None, at_t: Callable[[], Any]
) -> dict[str, int]:
    """T is the return of the protect ioctl: no fault is served before."""
    with _sink(path) as sink, Uffd(FEATURES["PAGEFAULT_FLAG_WP"]) as uffd:
        uffd.register(memory.addr, memory.length)
        uffd.protect(memory.addr, memory.length)
        at_t()
        faults = loop.save(uffd.fd, sink, memory.addr, memory.length)
    return {"image_bytes": memory.length, "faults": faults}


def _by_fork(
    loop: ModuleType, memory: GuestMemory, path: Path | None, at_t: Callable[[], Any]
) -> dict[str, int]:
    with _sink(path) as sink:
        child = loop.start(sink, memory.addr, memory.length)
        at_t()
        loop.finish(child)
    return {"image_bytes": memory.length, "faults": 0}


@contextmanager
def _sink(path: Path | None) -> Iterator[int]:
    if path is None:
        yield -1
        return
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)

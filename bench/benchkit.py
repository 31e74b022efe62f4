"""Shared by the benches: sizes from the environment, memory, and figures of this process from /proc."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from snapengine.base.units import parse_size
from snapengine.kernel.procmaps import read_maps
from snapengine.kernel.uffd import FEATURES, Uffd

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TMPFS = Path(os.environ.get("SNAPENGINE_BENCH_TMPFS", "/dev/shm"))
ROUNDS = int(os.environ.get("SNAPENGINE_BENCH_ROUNDS", "5"))
BATCH_BYTES = 64 * 4096
MAP_NORESERVE = 0x4000  # linux/mman.h; Python's mmap has it from 3.13 on


def size(name: str, default: str) -> int:
    """Bytes from the environment variable SNAPENGINE_BENCH_`name`."""
    return parse_size(os.environ.get(f"SNAPENGINE_BENCH_{name}", default))


def small_pages(length: int) -> mmap.mmap:
    """`length` bytes of private memory in 4 KiB pages, not populated."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, length, flags=flags)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


def huge_pages(length: int) -> mmap.mmap:
    """`length` bytes of private memory, not populated, in huge pages if the kernel has them."""
    memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class Samples(dict[str, list[float]]):
    """Named samples with one value per round, for `extra_info["samples"]` of a benchmark.

    The name ends with the unit: ``_ns``, ``_bytes``, ``_rate`` (bytes per second) or ``_ratio``.
    """

    def note(self, **values: float) -> None:
        """Append one value to each."""
        for name, value in values.items():
            self.setdefault(name, []).append(value)


def process_status(name: str) -> int:
    """Bytes of a Vm or Rss line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * KIB
    raise KeyError(name)


def reset_peak() -> None:
    """Reset VmHWM, the peak of VmRSS (proc(5): clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def is_tmpfs(path: Path) -> bool:
    """Whether a tmpfs is mounted at `path`."""
    mounts = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    return any(fields[1] == str(path) and fields[2] == "tmpfs" for fields in mounts)


def warm_file(path: Path, length: int) -> None:
    """Write and delete a file, so that the host backs the memory that the next file will use."""
    block = bytes(4 * MIB)
    with open(path, "wb", buffering=0) as file:
        for _ in range(0, length, len(block)):
            file.write(block)
    path.unlink()


def guest_ram(pid: int, length: int) -> int:
    """The address of a guest's RAM: the smallest mapping that holds `length` (it may have merged)."""
    fitting = [mapping for mapping in read_maps(pid) if mapping.end - mapping.start >= length]
    return min(fitting, key=lambda mapping: mapping.end - mapping.start).start


@contextmanager
def protected(floors: ModuleType, memory: mmap.mmap, sync: bool = False) -> Iterator[tuple[int, int, int]]:
    """A userfaultfd with `memory` registered: (descriptor, address, length). `sync`: read(2) blocks."""
    addr, length = floors.address_of(memory), len(memory)
    with Uffd(FEATURES["PAGEFAULT_FLAG_WP"]) as uffd:
        os.set_blocking(uffd.fd, sync)
        uffd.register(addr, length)
        yield uffd.fd, addr, length


def protect_floor(floors: ModuleType, memory: mmap.mmap) -> dict[str, float]:
    """Nanoseconds of bare ioctls over `memory`: protect all, un-protect all, un-protect 64 pages per call."""
    with protected(floors, memory) as (fd, addr, length):
        whole = floors.write_protect_ns(fd, addr, length, length, True)
        release = floors.write_protect_ns(fd, addr, length, length, False)
        floors.write_protect_ns(fd, addr, length, length, True)
        batches = floors.write_protect_ns(fd, addr, length, BATCH_BYTES, False)
    return {"ioctl_protect_ns": whole, "ioctl_unprotect_ns": release, "ioctl_unprotect_64_ns": batches}

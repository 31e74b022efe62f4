"""What holds the pages of a mapping, according to the kernel: the type, file system and link count of its
file.

A path proves nothing: tmpfs and hugetlbfs may be mounted anywhere, a removed file keeps its old name, and a
program chooses the name of its shared anonymous memory. So the file itself is examined, through
/proc/PID/map_files (CAP_CHECKPOINT_RESTORE). Without that capability the device number in /proc/PID/maps is
looked up in /proc/PID/mountinfo. The name decides only for devices that are not mounted: the kernel's own.
Source: proc(5), statfs(2), include/uapi/linux/magic.h.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import stat
from dataclasses import dataclass
from typing import Literal

from snapengine.base.fileio import file_system
from snapengine.kernel.procmaps import DELETED, Mapping, read_smaps
from snapengine.regions import PAGE_BYTES

Kind = Literal["anonymous", "shmem", "sysv", "hugetlb", "ramfs", "secret", "aio", "kernel", "device", "file"]
"""``anonymous``: no file. ``shmem``: tmpfs, memfd, shared anonymous memory. ``sysv``: memory of shmget().
``aio``: the ring of io_setup(). ``kernel``: another buffer of the kernel (io_uring, perf). ``file``: a file
on a disk, or on another persistent file system."""

MAGIC: dict[int, Kind] = {
    0x01021994: "shmem",
    0x958458F6: "hugetlb",
    0x858458F6: "ramfs",
    0x5345434D: "secret",
    0xA10A10A1: "aio",
    0x09041934: "kernel",  # anon_inode: io_uring, perf, KVM
    0x534F434B: "kernel",  # a socket: packet rings
    0x444D4142: "device",  # dma-buf
    0x474D454D: "device",  # guest_memfd
    0x62656572: "device",  # sysfs: PCI resources
    0x9FA0: "device",  # proc
    0x64626720: "device",  # debugfs
}
MOUNTED: dict[str, Kind] = {
    "tmpfs": "shmem",
    "devtmpfs": "shmem",
    "hugetlbfs": "hugetlb",
    "ramfs": "ramfs",
    "rootfs": "ramfs",
    "sysfs": "device",
    "proc": "device",
    "debugfs": "device",
}
NAMED: tuple[tuple[str, Kind], ...] = (
    ("/memfd:", "shmem"),
    ("/dev/zero", "shmem"),
    ("[anon_shmem:", "shmem"),
    ("/SYSV", "sysv"),
    ("/anon_hugepage", "hugetlb"),
    ("/secretmem", "secret"),
    ("/[aio]", "aio"),
    ("anon_inode:", "kernel"),
    ("socket:", "kernel"),
    ("/dmabuf:", "device"),
)
ZERO_DEVICE = os.makedev(1, 5)
_PLAIN = re.compile(r"\[(heap|stack(:\d+)?|anon:.*)\]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Backing:
    """``page_bytes``: size of the pages. ``removed``: the file has no name any more, so its content
    disappears with the last mapping. ``file_bytes``: its size, -1 if unknown."""

    kind: Kind
    page_bytes: int = PAGE_BYTES
    removed: bool = False
    file_bytes: int = -1


ANONYMOUS = Backing("anonymous")
KERNEL = Backing("kernel")


class Backings:
    """The backings of one process's mappings. Each file is examined once."""

    def __init__(self, pid: int | str = "self") -> None:
        self._pid = pid
        self._known: dict[tuple[str, int, str, bool], Backing] = {}
        self._mounts: dict[str, Kind] | None = None

    def of(self, mapping: Mapping) -> Backing:
        """What holds the mapping's pages."""
        if not mapping.has_file:
            return _without_file(mapping)
        file = (mapping.device, mapping.inode, mapping.path, mapping.shared)
        if file not in self._known:
            self._known[file] = self._ask(mapping)
        return self._known[file]

    def _ask(self, mapping: Mapping) -> Backing:
        path = f"/proc/{self._pid}/map_files/{mapping.start:x}-{mapping.end:x}"
        try:
            status = os.stat(path)
            magic, block = file_system(path)
        except OSError:  # not allowed, or the mapping is gone
            return self._guess(mapping)
        if stat.S_ISCHR(status.st_mode):
            # The kernel makes private mappings of /dev/zero anonymous; only the name remains.
            plain = status.st_rdev == ZERO_DEVICE and not mapping.shared
            return ANONYMOUS if plain else Backing("device")
        kind = MAGIC.get(magic, "file")
        if kind == "shmem" and mapping.path.startswith("/SYSV") and mapping.device == internal_device():
            kind = "sysv"
        page = block if kind == "hugetlb" else PAGE_BYTES
        size = -1 if stat.S_ISBLK(status.st_mode) else status.st_size
        return Backing(kind, page, status.st_nlink == 0, size)

    def _guess(self, mapping: Mapping) -> Backing:
        if self._mounts is None:
            self._mounts = _mounts(self._pid)
        kind = self._mounts.get(mapping.device)
        found = None if kind is None else self._by_name(mapping)
        if found is not None and stat.S_ISCHR(found.st_mode):
            plain = found.st_rdev == ZERO_DEVICE and not mapping.shared
            return ANONYMOUS if plain else Backing("device")
        removed = found is None and mapping.path.endswith(DELETED)
        if kind is None:
            kind = _by_prefix(mapping.path)
            removed = removed or kind in ("shmem", "sysv", "hugetlb")
        page = PAGE_BYTES
        memfd = kind == "shmem" and mapping.path.startswith("/memfd:")
        if kind == "hugetlb" or (memfd and mapping.device != internal_device()):
            page = _smaps_page_bytes(self._pid, mapping)
            kind = "hugetlb" if page > PAGE_BYTES else kind
        return Backing(kind, page, removed)

    def _by_name(self, mapping: Mapping) -> os.stat_result | None:
        """The status of the file, if the name of the mapping still leads to it."""
        name = mapping.path.replace("\\012", "\n").encode("utf-8", "surrogateescape")
        with contextlib.suppress(OSError):
            found = os.stat(f"/proc/{self._pid}/root".encode() + name)
            if found.st_ino == mapping.inode:
                return found
        return None


def page_size_of(mapping: Mapping, pid: int | str = "self") -> int:
    """The page size of a mapping in bytes."""
    return Backings(pid).of(mapping).page_bytes


@functools.cache
def internal_device() -> str:
    """The device of the kernel's internal tmpfs, which holds memfds, in the form of /proc/PID/maps."""
    fd = os.memfd_create("snapengine:device", os.MFD_CLOEXEC)
    try:
        device = os.fstat(fd).st_dev
    finally:
        os.close(fd)
    return f"{os.major(device):02x}:{os.minor(device):02x}"


def _by_prefix(path: str) -> Kind:
    for name, kind in NAMED:
        if path.startswith(name):
            return kind
    return "file"


def _without_file(mapping: Mapping) -> Backing:
    if not mapping.path or _PLAIN.fullmatch(mapping.path):
        return ANONYMOUS
    if mapping.path.startswith("[anon_shmem:"):
        return Backing("shmem", removed=True)
    return KERNEL


def _mounts(pid: int | str) -> dict[str, Kind]:
    """The kind of each mounted file system, by its device (proc_pid_mountinfo(5))."""
    found: dict[str, Kind] = {}
    with contextlib.suppress(OSError), open(f"/proc/{pid}/mountinfo", "rb") as lines:
        for line in lines:
            fields, _, rest = line.partition(b" - ")
            major, _, minor = fields.split()[2].partition(b":")
            name = rest.split()[0].decode("ascii", "replace")
            found[f"{int(major):02x}:{int(minor):02x}"] = MOUNTED.get(name, "file")
    return found


def _smaps_page_bytes(pid: int | str, mapping: Mapping) -> int:
    """KernelPageSize in /proc/PID/smaps; the kernel walks page tables for it: 30 ms a GiB."""
    with contextlib.suppress(OSError):
        for start, fields in read_smaps(pid):
            if start == mapping.start:
                return int(fields[b"KernelPageSize"].split()[0]) * 1024
    return PAGE_BYTES

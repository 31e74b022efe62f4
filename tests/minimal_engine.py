"""The smallest possible engine: protect all, copy all, release all. For tests of the peer's side.

As a program (arguments: socket path) it protects a peer's memory, prints that, and waits to be killed.
"""

from __future__ import annotations

import fcntl
import os
import struct
import sys
from dataclasses import dataclass, field

from patientkit import PeerTarget

from snapengine.regions import Region

WP = 1 << 0 | 1 << 12 | 1 << 13  # PAGEFAULT_FLAG_WP, WP_HUGETLBFS_SHMEM, WP_UNPOPULATED
UFFDIO_REGISTER = 0xC020AA00
UFFDIO_WRITEPROTECT = 0xC018AA06
REGISTER_MODE_WP = 2


@dataclass
class MinimalImage:
    """The part of an image's interface that `check_image` uses."""

    regions: list[Region]
    vmstate: dict[str, bytes]
    data: dict[str, bytearray] = field(default_factory=dict)

    def read(self, region: Region, offset: int, length: int) -> bytes:
        return bytes(self.data[region.name][offset : offset + length])


class MinimalEngine:
    """One capture with write tracking; no fault is served before everything is copied."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.target = PeerTarget(path)
        self.pid, self.uffd, self.regions = self.target.open(WP)
        for region in self.regions:
            span = struct.pack("=QQQQ", region.addr, region.length, REGISTER_MODE_WP, 0)
            fcntl.ioctl(self.uffd, UFFDIO_REGISTER, span)

    def protect(self, on: bool = True) -> None:
        for region in self.regions:
            request = struct.pack("=QQQ", region.addr, region.length, int(on))
            fcntl.ioctl(self.uffd, UFFDIO_WRITEPROTECT, request)

    def copy(self) -> MinimalImage:
        image = MinimalImage(self.regions, self.target.vmstate())
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as memory:
            for region in self.regions:
                data = bytearray(region.length)
                view, done = memoryview(data), 0
                memory.seek(region.addr)
                while done < region.length:
                    done += memory.readinto(view[done:]) or 0
                image.data[region.name] = data
        return image

    def close(self, status: str) -> None:
        if self.uffd >= 0:
            os.close(self.uffd)
        self.uffd = -1
        self.target.close(status)


if __name__ == "__main__":
    engine = MinimalEngine(sys.argv[1])
    if len(sys.argv) > 2:
        engine.target.pause()
    else:
        engine.protect()
    print("armed", flush=True)
    sys.stdin.read()

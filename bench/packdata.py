"""Memory content for the compression benches, which compresses like real memory."""

from __future__ import annotations

import mmap
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from benchkit import MIB, small_pages

from snapengine.guest.params import GuestParams
from snapengine.guest.pattern import initial_page

PAGE = 4096
KINDS = ("guest", "files")


def packable(kind: str, length: int) -> mmap.mmap:
    """`length` bytes in 4 KiB pages.

    ``"guest"``: pages of the embedded guest, which compress 4:1. ``"files"``: the files of Python's standard
    library (sources, byte code, machine code): text and code, as in a process.
    """
    memory = small_pages(length)
    blocks = guest_pages(length) if kind == "guest" else library_files()
    while memory.tell() < length:
        for block in blocks:
            memory.write(block[: length - memory.tell()])
        blocks = library_files()
    return memory


def guest_pages(length: int) -> Iterator[bytes]:
    """The initial pages of a guest."""
    params = GuestParams(size=length)
    return (initial_page(params, number) for number in range(length // PAGE))


def library_files() -> Iterator[bytes]:
    """The files of the standard library by name; of each at most 1 MiB."""
    files = (path for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*")) if path.is_file())
    return (path.read_bytes()[:MIB] for path in files)

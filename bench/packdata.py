"""Bytes that compress as memory does, for the benches of compression: in a buffer and in a file."""

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

    ``"guest"``: the embedded guest's pages, alike in kind, of which zstd makes a quarter. ``"files"``:
    Python's library as it lies on disk (sources, byte code, machine code): text and code, as in a process.
    """
    memory = small_pages(length)
    pieces = guest_pages(length) if kind == "guest" else library_files()
    while memory.tell() < length:
        for piece in pieces:
            memory.write(piece[: length - memory.tell()])
        pieces = library_files()
    return memory


def guest_pages(length: int) -> Iterator[bytes]:
    """The pages of a guest that nobody wrote to."""
    params = GuestParams(size=length)
    return (initial_page(params, number) for number in range(length // PAGE))


def library_files() -> Iterator[bytes]:
    """The files of the standard library, in the order of their names; large ones in part."""
    files = (path for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*")) if path.is_file())
    return (path.read_bytes()[:MIB] for path in files)

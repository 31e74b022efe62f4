"""Memory for capture threads, and mapped files."""

import ctypes
import os

import pytest

from snapengine.base.arena import Arena, FileView

PAGE = 4096
MIB = 1 << 20


def mapping_of(length):
    """The only new mapping of exactly `length` bytes; Arena does not tell its address."""
    with open("/proc/self/maps", encoding="utf-8") as lines:
        spans = [[int(x, 16) for x in line.split()[0].split("-")] for line in lines]
    return {start for start, end in spans if end - start == length}


def smaps(start):
    """Fields of the mapping at `start`, as text."""
    with open("/proc/self/smaps", encoding="utf-8") as file:
        text = file.read()
    part = text[text.index(f"\n{start:x}-") + 1 :]
    fields = {}
    for line in part.splitlines()[1:]:
        name, _, value = line.partition(":")
        if " " in name:
            break
        fields[name] = value.strip()
    return fields


class Made:
    """An arena of an odd length, and its bytes at the address that /proc shows."""

    def __init__(self, length):
        before = mapping_of(length)
        self.arena = Arena(length)
        (self.addr,) = mapping_of(length) - before
        self.bytes = (ctypes.c_ubyte * length).from_address(self.addr)


ODD = 37 * MIB + 5 * PAGE  # no other mapping of this process has that length


def test_zeroed_aligned_and_empty_until_used():
    made = Made(ODD)
    assert made.arena.length == ODD
    assert made.addr % (2 * MIB) == 0
    assert int(smaps(made.addr)["Rss"].split()[0]) == 0
    assert not any(made.bytes[:: 64 * PAGE])
    assert made.bytes[ODD - 1] == 0


def test_touch_makes_every_page_present():
    made = Made(ODD)
    made.arena.touch()
    assert int(smaps(made.addr)["Rss"].split()[0]) * 1024 == ODD
    assert not any(made.bytes[::PAGE])


def test_freed_with_the_object():
    before = mapping_of(ODD)
    arena = Arena(ODD)
    assert mapping_of(ODD) != before
    del arena
    assert mapping_of(ODD) == before


def test_rounded_to_pages():
    assert Arena(1).length == PAGE
    assert Arena(PAGE + 1).length == 2 * PAGE


def test_a_forked_child_sees_zeros():
    made = Made(ODD)
    made.bytes[0] = made.bytes[ODD - 1] = 0xA5
    pid = os.fork()
    if pid == 0:
        os._exit(made.bytes[0] | made.bytes[ODD - 1])
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert made.bytes[0] == made.bytes[ODD - 1] == 0xA5


@pytest.mark.parametrize("length", [0, 1 << 46, 1 << 63, 2**64 - 1, (1 << 46) - 1 << 10])
def test_impossible_lengths(length):
    with pytest.raises(MemoryError):
        Arena(length)


def test_more_than_the_address_space_has_left():
    with pytest.raises(MemoryError, match="mmap"):
        [Arena((1 << 46) - PAGE) for _ in range(8)]


@pytest.fixture
def file(tmp_path):
    """A descriptor of four pages: a, b, c, d."""
    path = tmp_path / "file"
    path.write_bytes(b"".join(bytes([letter]) * PAGE for letter in b"abcd"))
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


def test_a_view_reads_the_file(file):
    view = FileView(file, PAGE, 2 * PAGE)
    assert view.length == 2 * PAGE
    assert ctypes.string_at(view.addr, view.length) == b"b" * PAGE + b"c" * PAGE
    os.pwrite(file, b"X", PAGE)
    assert ctypes.string_at(view.addr, 2) == b"Xb", "shared: writes through the file are visible"


def test_close_of_a_view(file):
    view = FileView(file, 0, PAGE)
    addr = view.addr
    view.close()
    assert view.addr == 0
    view.close()
    with open("/proc/self/maps", encoding="utf-8") as lines:
        assert not any(line.startswith(f"{addr:x}-") for line in lines)


@pytest.mark.parametrize(
    ("offset", "length", "error"),
    [(1, PAGE, OSError), (PAGE // 2, PAGE, OSError), (0, 0, OSError), (0, 1 << 63, OSError)],
)
def test_a_view_refuses(file, offset, length, error):
    with pytest.raises(error, match="mmap"):
        FileView(file, offset, length)


def test_a_view_of_no_file():
    with pytest.raises(OSError, match="mmap") as caught:
        FileView(-1, 0, PAGE)
    assert caught.value.errno == 9

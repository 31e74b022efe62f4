"""/proc/PID/maps, in the terms that plans and messages use."""

import ctypes
import mmap
import os

import pytest

from snapengine.kernel.backing import page_size_of
from snapengine.kernel.procmaps import Mapping, covering, read_maps, without_overlaps

MIB = 1 << 20
MAP_HUGETLB = 0x40000


def address_of(memory):
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def mapping_of(memory):
    (found,) = covering(read_maps(), address_of(memory), address_of(memory) + len(memory))
    return found


def test_private_anonymous_memory():
    found = mapping_of(mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    assert not found.shared
    assert found.backing == "anonymous"
    assert page_size_of(found) == 4096


def test_a_memfd_and_its_second_mapping(tmp_path):
    fd = os.memfd_create("two words")
    os.ftruncate(fd, MIB)
    one, two = mmap.mmap(fd, MIB), mmap.mmap(fd, MIB)
    os.close(fd)
    found = mapping_of(one)
    assert found.shared
    assert found.backing == "memory file"
    assert "two words" in str(found)
    assert found.same_file(mapping_of(two))
    assert not found.same_file(mapping_of(mmap.mmap(-1, MIB)))


def test_a_file_on_disk(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(MIB))
    with open(path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), MIB)
    assert mapping_of(memory).backing == "file"
    assert str(path) in str(mapping_of(memory))


def test_hugetlb_page_size(hugetlb):
    hugetlb(1)
    memory = mmap.mmap(-1, 2 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB)
    assert page_size_of(mapping_of(memory)) == 2 * MIB


@pytest.mark.parametrize(
    ("start", "end", "count"), [(0, 10, 1), (5, 25, 2), (10, 30, 2), (25, 45, 0), (40, 41, 1), (5, 100, 0)]
)
def test_covering_wants_all_of_it(start, end, count):
    mappings = [
        Mapping(0, 20, "rw-p", 0, "00:00", 0, ""),
        Mapping(20, 30, "rw-p", 0, "00:00", 0, ""),
        Mapping(40, 50, "rw-p", 0, "00:00", 0, ""),
    ]
    assert len(covering(mappings, start, end)) == count


def test_a_list_that_was_torn():
    """A thread's arena grew while the list was read: the list has the mapping twice."""
    def at(start, end, inode=0, offset=0):
        return Mapping(start * 4096, end * 4096, "rw-p", offset * 4096, "00:00", inode, "")

    whole = [at(1, 3), at(3, 4), at(6, 9)]
    assert without_overlaps(whole) == whole
    assert without_overlaps([at(1, 3), at(1, 8), at(9, 10)]) == [at(1, 3), at(3, 8), at(9, 10)]
    assert without_overlaps([at(1, 8), at(1, 3), at(8, 9)]) == [at(1, 8), at(8, 9)]
    assert without_overlaps([at(1, 3, 7), at(2, 8, 7, 1)]) == [at(1, 3, 7), at(3, 8, 7, 2)]

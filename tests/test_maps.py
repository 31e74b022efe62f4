"""What /proc/PID/maps says, in the words that plans and messages use."""

import ctypes
import mmap
import os

import pytest

from snapengine.maps import Mapping, covering, page_size_of, read_maps

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

"""Regions as their bytes in a REGN record, where there are many: ordinary ones. FORMAT.md has the fields.

`snapengine.image.encode` has the rules, and is asked about every region that is not plainly within them.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memchr, memcpy

from snapengine.regions cimport Region, RegionPlan

cdef uint64_t PAGE = 4096
cdef uint64_t SAFE = <uint64_t>1 << 47      # addresses, lengths and page numbers below that are no question
cdef uint64_t SAFE_PAGE = <uint64_t>1 << 39
cdef Py_ssize_t SAFE_NAME = 255

cdef packed struct entry_t:
    uint64_t addr
    uint64_t length
    uint64_t first_page
    uint32_t page_size
    uint16_t kind
    uint16_t name_bytes


cdef bytes _packed(Region region, uint64_t first_page):
    """None: it is for `packing` to say."""
    cdef entry_t entry
    cdef uint64_t addr, length
    cdef bytes name
    cdef bytes data
    if region.kind != "anon" or region.page_size != PAGE or not region.name.isascii():
        return None
    if not 0 <= region.addr < SAFE or not 0 < region.length < SAFE or first_page >= SAFE_PAGE:
        return None
    addr, length = region.addr, region.length
    name = region.name.encode("ascii")
    if len(name) > SAFE_NAME or memchr(PyBytes_AS_STRING(name), 0, len(name)) != NULL:
        return None
    entry.addr, entry.length, entry.first_page = addr, length, first_page
    entry.page_size, entry.kind, entry.name_bytes = <uint32_t>PAGE, 0, <uint16_t>len(name)
    data = PyBytes_FromStringAndSize(NULL, sizeof(entry) + len(name))
    memcpy(PyBytes_AS_STRING(data), &entry, sizeof(entry))
    memcpy(PyBytes_AS_STRING(data) + sizeof(entry), PyBytes_AS_STRING(name), len(name))
    return data


def pack_regions(regions, pack):
    """The entry of each (region, first page number); `pack` makes, or refuses, what is not ordinary."""
    cdef bytes data
    entries = []
    for region, first in regions:
        data = _packed(region, first) if type(region) is Region and 0 <= first < SAFE_PAGE else None
        entries.append(pack(region, first) if data is None else data)
    return entries


def numbers_ascend(regions):
    """Whether each region has page numbers behind those of the one before. (If not, they may differ, too.)"""
    cdef Region region
    cdef uint64_t end = 0
    cdef uint64_t addr, length
    for one, first in regions:
        if type(one) is not Region or not end <= first < SAFE_PAGE:
            return False
        region = one
        if not 0 <= region.addr < SAFE or not 0 <= region.length < SAFE:
            return False
        addr, length = region.addr, region.length
        end = first + (addr % PAGE + length + PAGE - 1) // PAGE
    return True


def numbered(list plans not None):
    """(region, first page number) of each plan."""
    cdef RegionPlan plan
    return [(plan.region, plan.first_page) for plan in plans]

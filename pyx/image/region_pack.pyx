"""Fast packing of many ordinary regions into the bytes of REGN records. FORMAT.md defines the fields.

`snapengine.image.encode` holds the rules. It packs or rejects every region that is not clearly within them.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memchr, memcpy

from snapengine.regions cimport Region, RegionPlan

cdef uint64_t PAGE = 4096
cdef uint64_t FAST_MAX = <uint64_t>1 << 47      # addresses and lengths below this are valid
cdef uint64_t FAST_MAX_PAGE = <uint64_t>1 << 39
cdef Py_ssize_t FAST_MAX_NAME = 255

cdef packed struct entry_t:
    uint64_t addr
    uint64_t length
    uint64_t first_page
    uint32_t page_size
    uint16_t kind
    uint16_t name_bytes


cdef bytes _packed(Region region, uint64_t first_page):
    """The packed region, or None if `encode` must decide."""
    cdef entry_t entry
    cdef uint64_t addr, length
    cdef bytes name
    cdef bytes data
    if region.kind != "anon" or region.page_size != PAGE or not region.name.isascii():
        return None
    if not 0 <= region.addr < FAST_MAX or not 0 < region.length < FAST_MAX or first_page >= FAST_MAX_PAGE:
        return None
    addr, length = region.addr, region.length
    name = region.name.encode("ascii")
    if len(name) > FAST_MAX_NAME or memchr(PyBytes_AS_STRING(name), 0, len(name)) != NULL:
        return None
    entry.addr, entry.length, entry.first_page = addr, length, first_page
    entry.page_size, entry.kind, entry.name_bytes = <uint32_t>PAGE, 0, <uint16_t>len(name)
    data = PyBytes_FromStringAndSize(NULL, sizeof(entry) + len(name))
    memcpy(PyBytes_AS_STRING(data), &entry, sizeof(entry))
    memcpy(PyBytes_AS_STRING(data) + sizeof(entry), PyBytes_AS_STRING(name), len(name))
    return data


def pack_regions(regions, pack):
    """The entry of each (region, first page number). `pack` handles regions that are not ordinary."""
    cdef bytes data
    entries = []
    for region, first in regions:
        data = _packed(region, first) if type(region) is Region and 0 <= first < FAST_MAX_PAGE else None
        entries.append(pack(region, first) if data is None else data)
    return entries


def numbers_ascend(regions):
    """Whether the page numbers of the regions ascend. If not, they may still be distinct."""
    cdef Region region
    cdef uint64_t end = 0
    cdef uint64_t addr, length
    for one, first in regions:
        if type(one) is not Region or not end <= first < FAST_MAX_PAGE:
            return False
        region = one
        if not 0 <= region.addr < FAST_MAX or not 0 <= region.length < FAST_MAX:
            return False
        addr, length = region.addr, region.length
        end = first + (addr % PAGE + length + PAGE - 1) // PAGE
    return True


def numbered(list plans not None):
    """(region, first page number) of each plan."""
    cdef RegionPlan plan
    return [(plan.region, plan.first_page) for plan in plans]

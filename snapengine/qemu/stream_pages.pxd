from libc.stdint cimport uint16_t, uint64_t
from posix.uio cimport iovec

from snapengine.base.arena cimport Arena
from snapengine.pipeline.pool cimport Pool, lane_slot
from snapengine.qemu.stream_parser cimport StreamParser

cdef enum:
    RUN_PAGES = 256


cdef class Intake(StreamParser):
    # Two bits per page: whether it has arrived (seen), and whether it holds data (data).
    cdef Arena seen_bits
    cdef Arena data_bits
    cdef uint64_t *seen
    cdef uint64_t *data
    cdef Pool pool
    cdef lane_slot lane
    cdef readonly uint64_t data_pages     # arrived pages whose last version holds data
    cdef readonly uint64_t zero_pages     # arrived pages whose last version is zero
    cdef readonly uint64_t repeats        # records of pages that had arrived before

    # Update the tables for a record. Returns whether the page held data before.
    cdef bint mark(self, uint64_t page, bint nonzero) noexcept nogil
    # Return the kind of `page`, and in `pages` the length of the run of this kind, up to `end`.
    cdef int run_at(self, uint64_t page, uint64_t end, uint64_t *pages) noexcept nogil
    cdef int reserve(self) except -1 nogil
    cdef int put_blank(self, uint64_t page, uint64_t pages, unsigned kind) except -1 nogil


cdef class DirectIntake(Intake):
    cdef readonly uint64_t saved          # data pages queued, including superseded versions

    cdef int zero_entry(self, uint64_t page) except -1 nogil


cdef class Spool(Intake):
    cdef object file
    cdef int file_fd
    cdef uint64_t run_first               # a run of pages that is still in the parser's buffer only
    cdef int run_pages
    cdef iovec parts[RUN_PAGES]
    cdef readonly uint64_t spooled_bytes

    cdef int flush(self) except -1 nogil
    cdef int put_data(self, uint64_t page, uint64_t pages) except -1 nogil


cdef class CountingSpool(Spool):
    cdef Arena counts_arena
    cdef uint16_t *counts                 # records of each page, saturating at 65535
    cdef int count(self, uint64_t page) except -1 nogil

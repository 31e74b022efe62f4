from libc.stdint cimport uint16_t, uint64_t
from posix.uio cimport iovec

from snapengine.base.arena cimport Arena
from snapengine.pipeline.pool cimport Pool, lane_slot
from snapengine.qemu.stream_parser cimport StreamParser

cdef enum:
    RUN_PAGES = 256


cdef class Intake(StreamParser):
    # Knows of each page whether it came, and whether it holds data.
    cdef Arena seen_bits
    cdef Arena data_bits
    cdef uint64_t *seen
    cdef uint64_t *data
    cdef Pool pool
    cdef lane_slot lane
    cdef readonly uint64_t data_pages     # that hold data now
    cdef readonly uint64_t zero_pages     # that came and are zero now
    cdef readonly uint64_t repeats        # records of pages that had come before

    # Takes note of a record; whether the page held data before it.
    cdef bint mark(self, uint64_t page, bint nonzero) noexcept nogil
    # Kind of the pages from `page` on, and how many of them before `end` are of that kind.
    cdef int run_at(self, uint64_t page, uint64_t end, uint64_t *pages) noexcept nogil
    cdef int room(self) except -1 nogil
    cdef int put_blank(self, uint64_t page, uint64_t pages, unsigned kind) except -1 nogil


cdef class DirectIntake(Intake):
    cdef readonly uint64_t saved          # data pages queued, superseded ones included

    cdef int zero_entry(self, uint64_t page) except -1 nogil


cdef class Spool(Intake):
    cdef object file
    cdef int file_fd
    cdef uint64_t run_first               # pages whose bytes are still in the buffer only
    cdef int run_pages
    cdef iovec parts[RUN_PAGES]
    cdef readonly uint64_t spooled_bytes

    cdef int flush(self) except -1 nogil
    cdef int put_data(self, uint64_t page, uint64_t pages) except -1 nogil


cdef class Census(Spool):
    cdef Arena count_room
    cdef uint16_t *counts                 # records of each page, at most 65535
    cdef int note(self, uint64_t page) except -1 nogil

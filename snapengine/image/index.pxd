from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

from snapengine.image.format cimport snap_record
from snapengine.image.runs cimport Runs
from snapengine.storage.source cimport Source, source_t


cdef struct chunk_t:
    uint64_t offset         # of the record in the file
    uint64_t record_bytes
    uint64_t first_page     # lowest and highest page in the page map
    uint64_t last_page
    uint32_t entries
    snap_record header      # valid once `map` is loaded
    uint64_t *map           # `entries` entries; NULL until loaded


cdef struct span_t:
    uint64_t first_page     # of `chunk`
    uint64_t highest        # highest page of this and all spans before it
    uint32_t chunk


cdef class PageIndex:
    # Maps pages to chunks. Page maps are loaded and verified on first use, then cached.
    cdef readonly str name
    cdef readonly Source source      # None: add() supplies the maps, and there are no payloads to read
    cdef const source_t *at          # the C interface of `source`
    cdef chunk_t *chunks
    cdef readonly size_t count
    cdef size_t capacity
    cdef span_t *spans               # sorted by first_page; NULL: not built yet
    cdef uint64_t entries            # in all page maps; counted with `spans`
    cdef readonly uint64_t wasted    # entries and chunks that `resolve` examined without a match
    cdef Runs resolved               # newest run of every page, once `wasted` is large; None until then
    cdef list unreadable             # chunks whose maps could not be loaded for `resolved`
    cdef int reserve(self, size_t count) except -1
    cdef int build_spans(self) except -1
    cdef int load(self, size_t number) except -1
    # Raises the exception for a non-zero result of `source_read`.
    cdef int read_failed(self, int err, uint64_t offset) except -1 with gil
    cdef int accept(self, size_t number, const unsigned char *data, size_t length) except -1
    cdef int collect(self, size_t number, uint64_t first, uint64_t end, Runs into) except -1
    cdef Runs overlapping(self, uint64_t first, uint64_t end)
    cdef int build_resolved(self) except -1
    cdef int check_unreadable(self, uint64_t first, uint64_t end) except -1
    cdef Runs clip_resolved(self, uint64_t first, uint64_t end)

from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

from snapengine.image.format cimport snap_record
from snapengine.image.runs cimport Runs
from snapengine.storage.source cimport Source, source_t


cdef struct chunk_t:
    uint64_t offset         # of the record in the file
    uint64_t record_bytes
    uint64_t first_page     # lowest and highest page in the map
    uint64_t last_page
    uint32_t entries
    snap_record header      # valid once `map` is loaded
    uint64_t *map           # NULL until it is needed; `entries` entries


cdef struct span_t:
    uint64_t first_page     # of `chunk`
    uint64_t highest        # highest page of this and all spans before it
    uint32_t chunk


cdef class PageIndex:
    # Which chunk holds which page. Page maps are loaded, verified and kept as they are needed.
    cdef readonly str name
    cdef readonly Source source      # None: maps were given by add(), no payloads to read
    cdef const source_t *at          # where `source` is read
    cdef chunk_t *chunks
    cdef readonly size_t count
    cdef size_t room
    cdef span_t *spans               # by first_page; NULL: not built yet
    cdef uint64_t entries            # in all page maps; counted with `spans`
    cdef readonly uint64_t wasted    # entries and chunks that `resolve` looked at for nothing
    cdef Runs all                    # every page's newest run, once enough was wasted; None until then
    cdef list unreadable             # the chunks whose maps could not be loaded for `all`
    cdef int reserve(self, size_t count) except -1
    cdef int build_spans(self) except -1
    cdef int load(self, size_t number) except -1
    # Raises what a result of `source_read` other than 0 means.
    cdef int read_failed(self, int err, uint64_t offset) except -1 with gil
    cdef int adopt(self, size_t number, const unsigned char *data, size_t length) except -1
    cdef int collect(self, size_t number, uint64_t first, uint64_t end, Runs into) except -1
    cdef Runs overlapping(self, uint64_t first, uint64_t end)
    cdef int resolve_all(self) except -1
    cdef int check_unreadable(self, uint64_t first, uint64_t end) except -1
    cdef Runs within(self, uint64_t first, uint64_t end)

from libc.stddef cimport size_t
from libc.stdint cimport uint16_t, uint32_t, uint64_t

from snapengine.image.format cimport snap_index, snap_record
from snapengine.storage.fd_writer cimport FdWriter


cdef class Writer:
    # Streams one image to a sink. One thread at a time may call it. No capture thread may.
    cdef readonly object sink
    cdef readonly uint64_t image_bytes    # bytes passed to the sink so far
    cdef readonly uint64_t chunks         # chunk records written
    cdef uint64_t cancelled               # set by cancel() (release); ends a throttled or blocked write

    cdef readonly uint64_t vmstate_parts  # VMST records written
    cdef readonly bytes image_id
    cdef readonly bytes parent_id
    cdef uint64_t seq                     # number of the next record
    cdef uint64_t regn_offset
    cdef int state                        # NEW, OPEN, DONE or BROKEN
    cdef int failed_errno                 # the reason for BROKEN
    cdef bint no_descriptor                # the sink has no descriptor: call its write()
    cdef FdWriter fd_writer               # writes to the sink's descriptor; applies the rate limit
    cdef snap_index *index                # index_count entries, in file order
    cdef size_t index_count
    cdef size_t index_capacity
    cdef set vmstate_names

    # Writes one chunk record. `entries` is the page map (format.h), `payload` its data pages as encoded,
    # `crc` the CRC-32C of the payload as stored. Raises SinkError.
    cdef int chunk(self, const uint64_t *entries, uint32_t n_entries,
                   const void *payload, uint64_t stored_bytes, uint64_t raw_bytes,
                   uint16_t encoding, uint32_t crc) except -1 nogil

    # Writes padding so that the payload of the next record is aligned.
    cdef int align(self, uint64_t before) except -1 nogil
    # Writes any record: fills in seq and header_crc, then sends header, meta and payload.
    cdef int record(self, snap_record *header, const void *meta, const void *payload) except -1 nogil
    # Sends three buffers to the sink, in order; any may be empty.
    cdef int send(self, const void *head, size_t head_bytes, const void *meta, size_t meta_bytes,
                  const void *payload, size_t payload_bytes) except -1 nogil
    cdef int add_index_entry(self, const snap_index *entry) except -1 nogil
    cdef int fail(self, int err) except -1 with gil
    cdef int send_to_sink(self, const void *data, size_t length) except -1 with gil

from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t


cdef class Writer:
    # Streams one image into a sink. One thread at a time may call it; no capture thread ever does.
    cdef readonly object sink
    cdef readonly uint64_t image_bytes    # bytes handed to the sink so far
    cdef readonly uint64_t chunks         # chunk records written
    cdef volatile int cancelled           # set by cancel(): a throttled or blocked write stops

    # One chunk record. `entries` is the page map (format.h), `payload` its data pages as encoded.
    # `crc` is the CRC-32C of the payload as stored. Raises SinkError.
    cdef int chunk(self, const uint64_t *entries, uint32_t n_entries,
                   const void *payload, uint64_t stored_bytes, uint64_t raw_bytes,
                   uint16_t encoding, uint32_t crc) except -1 nogil

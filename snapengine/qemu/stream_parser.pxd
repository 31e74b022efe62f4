from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    BUFFER_BYTES = 1 << 20
    BLOCKS_MAX = 1024       # a machine has a few dozen; find_block() searches them linearly


cdef struct block_t:
    uint64_t first_page      # pages of all blocks are numbered consecutively
    uint64_t pages
    unsigned char name_bytes
    char name[255]


cdef class StreamParser:
    # Parses a stream from front to back. Subclasses process the pages (on_page, on_zero).
    cdef readonly str name
    cdef int fd                       # -1: the whole stream is in the buffer
    cdef char *buffer                 # BUFFER_BYTES; [begin, end) is read but not yet parsed
    cdef size_t begin
    cdef size_t end
    cdef readonly uint64_t offset     # offset of buffer[begin] in the stream
    cdef bint ended                   # the descriptor reported end of file
    cdef uint64_t cancelled           # set by cancel() (release), polled every 50 ms
    cdef int state
    cdef bytearray head_bytes         # the head so far, while it is read
    cdef readonly bytes head
    cdef readonly bytes tail
    cdef readonly object machine_type  # None: the stream has no configuration section
    cdef readonly object domain_xml   # of a save file of libvirt: bytes; else None
    cdef readonly uint32_t section_id  # of "ram"
    cdef readonly bint has_end        # the RAM has an END section (background-snapshot writes none)
    cdef readonly uint64_t total_pages
    cdef readonly uint64_t pages      # PAGE records so far
    cdef readonly uint64_t zeros      # ZERO records so far
    cdef block_t *blocks
    cdef size_t n_blocks
    cdef block_t *current             # block of the last record, for RAM_CONTINUE

    # Process one record. `data` is 4096 bytes that remain valid until before_refill().
    cdef int on_page(self, uint64_t page, const char *data) except -1 nogil
    cdef int on_zero(self, uint64_t page) except -1 nogil
    # Called before the buffer is overwritten, which invalidates the `data` of all pages so far.
    cdef int before_refill(self) except -1 nogil

    # Make `count` bytes (at most BUFFER_BYTES) available at `begin`, or raise.
    cdef int need(self, size_t count) except -1 nogil
    cdef int read_some(self) except -1 nogil
    cdef int refuse(self, const char *what, uint64_t offset) except -1 with gil
    cdef int truncated(self) except -1 with gil
    cdef int bad_flags(self, uint64_t word, uint64_t offset) except -1 with gil
    cdef bytes take(self, size_t count)
    cdef int find_block(self) except -1 nogil
    cdef int records(self) except -1 nogil
    cdef int add_block(self, bytes name, uint64_t length, uint64_t offset) except -1

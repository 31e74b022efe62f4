"""Pages back: from verified chunks into memory or into a file. Any thread; needs the GIL only for zstd.

Each chunk is read once, whichever pages of it are still the newest. Where its payload belongs into one
piece of memory it is read straight there and verified in place; so after an error the destination's
content is undefined, and the caller must throw it away.
"""

from cpython.bytes cimport PyBytes_AS_STRING
from libc.stdlib cimport free, malloc, qsort
from libc.string cimport memcpy, memset

from snapengine.checksum cimport crc32c
from snapengine.fileio cimport pread_all, pwrite_all
from snapengine.image_format cimport (
    SNAP_CHUNK_MAX_BYTES, SNAP_DATA, SNAP_PAGE_BYTES, SNAP_RAW, snap_record,
)
from snapengine.reader cimport chunk_t
from snapengine.oserror cimport raise_oserror

from zstandard import ZstdError

from snapengine.errors import CorruptImageError, TruncatedImageError
from snapengine.records import decompress


cdef int by_payload(const void *a, const void *b) noexcept nogil:
    cdef const run_t *left = <const run_t *>a
    cdef const run_t *right = <const run_t *>b
    if left.chunk != right.chunk:
        return 1 if left.chunk > right.chunk else -1
    return (left.data_page > right.data_page) - (left.data_page < right.data_page)


cdef class Restorer:
    """A plan for bytes [low, high), where byte 4096 * p is the first of page p.

    `runs` cover the range without a gap and without a lost page (the caller has checked). The work is
    split in `jobs` that several threads may do at the same time.
    """

    def __cinit__(self, PageIndex index, Runs runs, uint64_t low, uint64_t high):
        self.index = index
        self.low = low
        self.high = high
        self.live = Runs()
        self.blank = Runs()
        self.plan(runs)

    def __dealloc__(self):
        free(self.starts)

    cdef int plan(self, Runs runs) except -1:
        cdef Runs into
        cdef size_t i
        for i in range(runs.count):
            into = self.live if runs.runs[i].kind == SNAP_DATA else self.blank
            if into.append(&runs.runs[i]):
                raise MemoryError
        if self.live.count:
            qsort(self.live.runs, self.live.count, sizeof(run_t), by_payload)
        self.starts = <size_t *>malloc((self.live.count + 1) * sizeof(size_t))
        if self.starts == NULL:
            raise MemoryError
        for i in range(self.live.count):
            if i == 0 or self.live.runs[i].chunk != self.live.runs[i - 1].chunk:
                self.starts[self.jobs] = i
                self.jobs += 1
        self.starts[self.jobs] = self.live.count
        return 0

    def into_memory(self, unsigned char[::1] buffer not None, size_t begin, size_t end):
        """Do the jobs [begin, end): their data pages into `buffer`, whose first byte is byte `low`.

        `ValueError`: the buffer is smaller than the range.
        """
        if <uint64_t>buffer.shape[0] < self.high - self.low:
            raise ValueError("the buffer is smaller than what is restored into it")
        if begin < end:
            self.run(<size_t>&buffer[0], -1, 0, begin, end)

    def into_file(self, int fd, uint64_t offset, size_t begin, size_t end):
        """Do the jobs [begin, end): their data pages into a file that has byte `low` at `offset`."""
        self.run(0, fd, offset, begin, end)

    def run(self, size_t to, int fd, uint64_t offset, size_t begin, size_t end):
        """The jobs [begin, end) with one scratch buffer (for `into_memory` and `into_file`)."""
        cdef size_t number
        cdef char *scratch = <char *>malloc(SNAP_CHUNK_MAX_BYTES)
        if scratch == NULL:
            raise MemoryError
        try:
            with nogil:
                for number in range(begin, min(end, self.jobs)):
                    self.job(number, <char *>to, fd, offset, scratch)
        finally:
            free(scratch)

    def clear_blanks(self, unsigned char[::1] buffer not None):
        """Zero the bytes of zero pages and holes (memory that is known to be fresh does not need it)."""
        cdef size_t i
        cdef uint64_t start
        cdef uint64_t end
        if <uint64_t>buffer.shape[0] < self.high - self.low:
            raise ValueError("the buffer is smaller than what is restored into it")
        if self.high == self.low:
            return
        cdef unsigned char *to = &buffer[0]
        with nogil:
            for i in range(self.blank.count):
                start = max(self.low, self.blank.runs[i].page * SNAP_PAGE_BYTES)
                end = min(self.high, (self.blank.runs[i].page + self.blank.runs[i].pages) * SNAP_PAGE_BYTES)
                if start < end:
                    memset(to + (start - self.low), 0, end - start)

    def spans(self, uint32_t kind):
        """(offset from `low`, bytes) of each zero run (kind 1) or hole (kind 2)."""
        cdef size_t i
        for i in range(self.blank.count):
            if self.blank.runs[i].kind == kind:
                start = max(self.low, self.blank.runs[i].page * SNAP_PAGE_BYTES)
                end = min(self.high, (self.blank.runs[i].page + self.blank.runs[i].pages) * SNAP_PAGE_BYTES)
                yield start - self.low, end - start

    cdef int job(self, size_t number, char *to, int to_fd, uint64_t to_offset, char *scratch) except -1 nogil:
        cdef const run_t *run = &self.live.runs[self.starts[number]]
        cdef chunk_t *chunk = &self.index.chunks[run.chunk]
        cdef uint64_t start = run.page * SNAP_PAGE_BYTES
        cdef uint64_t length = chunk.header.stored_bytes
        cdef bint whole = (
            to != NULL and chunk.header.encoding == SNAP_RAW and run.pages * SNAP_PAGE_BYTES == length
            and start >= self.low and start + length <= self.high
        )
        cdef char *into = to + (start - self.low) if whole else scratch
        cdef uint64_t payload = chunk.offset + sizeof(snap_record) + chunk.header.meta_bytes
        cdef int err = pread_all(self.index.fd, into, length, payload)
        if err:
            self.read_failed(err, chunk.offset)
        if crc32c(0, into, length) != chunk.header.payload_crc:
            self.damaged(chunk.offset)
        if whole:
            return 0
        if chunk.header.encoding == SNAP_RAW:
            return self.place(number, scratch, to, to_fd, to_offset)
        return self.place_zstd(number, scratch, to, to_fd, to_offset)

    cdef int place_zstd(self, size_t number, const char *frame, char *to, int to_fd,
                        uint64_t to_offset) except -1 with gil:
        """Decompress a verified payload (zstandard gives the GIL up meanwhile) and place its pages."""
        cdef chunk_t *chunk = &self.index.chunks[self.live.runs[self.starts[number]].chunk]
        cdef bytes raw
        try:
            raw = decompress(frame[:chunk.header.stored_bytes], chunk.header.raw_bytes)
        except (ValueError, ZstdError) as error:
            raise CorruptImageError(f"{self.index.name}: zstd: {error}", chunk.offset) from None
        cdef const char *payload = PyBytes_AS_STRING(raw)
        with nogil:
            self.place(number, payload, to, to_fd, to_offset)
        return 0

    cdef int place(self, size_t number, const char *payload, char *to, int to_fd,
                   uint64_t to_offset) except -1 nogil:
        """The newest pages of a decoded payload to where they belong."""
        cdef size_t i
        cdef uint64_t start
        cdef uint64_t end
        cdef const char *data
        cdef int err
        for i in range(self.starts[number], self.starts[number + 1]):
            start = self.live.runs[i].page * SNAP_PAGE_BYTES
            end = start + self.live.runs[i].pages * SNAP_PAGE_BYTES
            data = payload + <size_t>self.live.runs[i].data_page * SNAP_PAGE_BYTES
            if start < self.low:
                data += self.low - start
                start = self.low
            end = min(end, self.high)
            if start >= end:
                continue
            if to != NULL:
                memcpy(to + (start - self.low), data, end - start)
                continue
            err = pwrite_all(to_fd, data, end - start, to_offset + (start - self.low))
            if err:
                raise_oserror(err, b"pwrite")
        return 0

    cdef int read_failed(self, int err, uint64_t offset) except -1 with gil:
        if err > 0:
            raise_oserror(err, b"pread")
        raise TruncatedImageError(f"{self.index.name}: became shorter while it was read", offset)

    cdef int damaged(self, uint64_t offset) except -1 with gil:
        raise CorruptImageError(f"{self.index.name}: the payload's checksum of CHNK does not match", offset)

"""Pages back: from verified chunks into memory or into a file. Any thread; needs the GIL only for zstd.

Each chunk is read once, whichever pages of it are still the newest. A raw payload is read in pieces that are
still in the cache when they are checksummed, each straight to where it belongs if that is one piece of
memory. The checksum is of the whole payload: after an error the destination's content is undefined, and the
caller must throw it away.
"""

from cpython.buffer cimport PyBUF_READ
from cpython.bytes cimport PyBytes_AS_STRING
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.errno cimport EFAULT
from libc.stdlib cimport free, malloc, qsort

from snapengine.base.checksum cimport crc32c
from snapengine.base.fileio cimport pwrite_all
from snapengine.base.nofault cimport (
    guard_begin, guard_end, guard_thread, guarded_clear, guarded_crc, guarded_store,
)
from snapengine.image.format cimport (
    SNAP_CHUNK_MAX_BYTES, SNAP_DATA, SNAP_PAGE_BYTES, SNAP_RAW, snap_record,
)
from snapengine.image.index cimport chunk_t
from snapengine.base.oserror cimport raise_oserror
from snapengine.storage.source cimport source_read

from zstandard import ZstdDecompressor, ZstdError

from snapengine.errors import CorruptImageError
from snapengine.image.records import decompress


# Fits a second-level cache: pread and crc32c of 1 GiB on two threads take 100 to 108 ms with 64 to 256 KiB,
# 115 with 1 MiB, and 136 with 32 KiB (AMD Zen 4, 2 CPUs; 64 KiB to 1 MiB are within the noise).
cdef uint64_t PIECE_BYTES = 256 << 10


cdef uint64_t payload_offset(const chunk_t *chunk) noexcept nogil:
    return chunk.offset + sizeof(snap_record) + chunk.header.meta_bytes


cdef uint64_t payload_start(const run_t *run) noexcept nogil:
    return <uint64_t>run.data_page * SNAP_PAGE_BYTES


cdef uint64_t payload_end(const run_t *run) noexcept nogil:
    return (run.data_page + run.pages) * SNAP_PAGE_BYTES


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
            self._run(<size_t>&buffer[0], -1, 0, begin, end)

    def into_file(self, int fd, uint64_t offset, size_t begin, size_t end):
        """Do the jobs [begin, end): their data pages into a file that has byte `low` at `offset`."""
        self._run(0, fd, offset, begin, end)

    def _run(self, size_t to, int fd, uint64_t offset, size_t begin, size_t end):
        """The jobs [begin, end) with one scratch buffer (for `into_memory` and `into_file`)."""
        cdef size_t number
        cdef destination_t into
        cdef char *scratch = <char *>malloc(SNAP_CHUNK_MAX_BYTES)
        if scratch == NULL:
            raise MemoryError
        into.memory = <char *>to
        into.fd = fd
        into.offset = offset
        decompressor = ZstdDecompressor()
        guard_begin()               # the memory is the caller's: it may be gone before we are done
        try:
            with nogil:
                guard_thread()
                for number in range(begin, min(end, self.jobs)):
                    self.job(number, &into, scratch, decompressor)
        finally:
            guard_end()
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
        cdef char *to = <char *>&buffer[0]
        cdef int err = 0
        guard_begin()
        with nogil:
            guard_thread()
            for i in range(self.blank.count):
                start = max(self.low, self.blank.runs[i].page * SNAP_PAGE_BYTES)
                end = min(self.high, (self.blank.runs[i].page + self.blank.runs[i].pages) * SNAP_PAGE_BYTES)
                if start < end and not err:
                    err = guarded_clear(to + (start - self.low), end - start)
        guard_end()
        if err:
            self.no_memory()

    def spans(self, uint32_t kind):
        """(offset from `low`, bytes) of each zero run (kind 1) or hole (kind 2)."""
        cdef size_t i
        for i in range(self.blank.count):
            if self.blank.runs[i].kind == kind:
                start = max(self.low, self.blank.runs[i].page * SNAP_PAGE_BYTES)
                end = min(self.high, (self.blank.runs[i].page + self.blank.runs[i].pages) * SNAP_PAGE_BYTES)
                yield start - self.low, end - start

    cdef int job(self, size_t number, const destination_t *into, char *scratch,
                 object decompressor) except -1 nogil:
        cdef chunk_t *chunk = &self.index.chunks[self.live.runs[self.starts[number]].chunk]
        if chunk.header.encoding == SNAP_RAW:
            return self.copy_raw(number, into, scratch)
        cdef int err = source_read(self.index.at, scratch, chunk.header.stored_bytes, payload_offset(chunk))
        if err:
            self.read_failed(err, chunk.offset)
        if crc32c(0, scratch, chunk.header.stored_bytes) != chunk.header.payload_crc:
            self.damaged(chunk.offset)
        return self.unpack(number, into, scratch, decompressor)

    cdef int copy_raw(self, size_t number, const destination_t *into, char *scratch) except -1 nogil:
        """Read a raw payload in pieces, straight to where they belong if that is one piece of memory. What
        goes into a file waits in `scratch` until all of it is verified."""
        cdef chunk_t *chunk = &self.index.chunks[self.live.runs[self.starts[number]].chunk]
        cdef size_t run = self.starts[number]
        cdef uint64_t done = 0
        cdef uint64_t count
        cdef uint32_t crc = 0
        cdef char *data
        cdef char *direct
        cdef int err
        while done < chunk.header.stored_bytes:
            count = min(PIECE_BYTES, chunk.header.stored_bytes - done)
            self.skip_to(&run, number, done)
            direct = self.direct(run, number, done, count, into)
            data = direct if direct != NULL else scratch + done
            err = source_read(self.index.at, data, count, payload_offset(chunk) + done)
            if err:
                self.read_failed(err, chunk.offset)
            if guarded_crc(&crc, data, count):
                self.no_memory()
            if direct == NULL and into.memory != NULL:
                self.place(run, number, data, done, count, into)
            done += count
        if crc != chunk.header.payload_crc:
            self.damaged(chunk.offset)
        if into.memory == NULL:
            self.place(self.starts[number], number, scratch, 0, done, into)
        return 0

    cdef void skip_to(self, size_t *run, size_t number, uint64_t done) noexcept nogil:
        """Go on to the first run of the job that ends behind byte `done` of the payload."""
        while run[0] < self.starts[number + 1] and payload_end(&self.live.runs[run[0]]) <= done:
            run[0] += 1

    cdef char *direct(self, size_t run, size_t number, uint64_t done, uint64_t count,
                      const destination_t *into) noexcept nogil:
        """Where bytes [done, done + count) of the payload belong, if `run` has them all; else NULL."""
        cdef const run_t *at = &self.live.runs[run]
        cdef uint64_t start
        if into.memory == NULL or run == self.starts[number + 1]:
            return NULL
        if payload_start(at) > done or payload_end(at) < done + count:
            return NULL
        start = at.page * SNAP_PAGE_BYTES + (done - payload_start(at))
        if start < self.low or start + count > self.high:
            return NULL
        return into.memory + (start - self.low)

    cdef int unpack(self, size_t number, const destination_t *into, const char *frame,
                    object decompressor) except -1 with gil:
        """Decompress a verified payload (zstandard gives the GIL up meanwhile) and place its pages."""
        cdef chunk_t *chunk = &self.index.chunks[self.live.runs[self.starts[number]].chunk]
        cdef uint64_t length = chunk.header.raw_bytes
        cdef bytes raw
        view = PyMemoryView_FromMemory(<char *>frame, chunk.header.stored_bytes, PyBUF_READ)
        try:
            raw = decompress(view, length, decompressor)
        except (ValueError, ZstdError) as error:
            raise CorruptImageError(f"{self.index.name}: zstd: {error}", chunk.offset) from None
        cdef const char *payload = PyBytes_AS_STRING(raw)
        with nogil:
            self.place(self.starts[number], number, payload, 0, length, into)
        return 0

    cdef int place(self, size_t run, size_t number, const char *data, uint64_t done, uint64_t count,
                   const destination_t *into) except -1 nogil:
        """Of bytes [done, done + count) of a payload, which are at `data`, the newest to where they belong;
        the job's runs before `run` have none of them."""
        cdef const run_t *at
        cdef uint64_t start, end, first
        cdef size_t i
        cdef int err
        for i in range(run, self.starts[number + 1]):
            at = &self.live.runs[i]
            if payload_start(at) >= done + count:
                break
            first = at.page * SNAP_PAGE_BYTES - payload_start(at)   # where byte 0 would belong (modulo 2^64)
            start = max(first + max(payload_start(at), done), self.low)
            end = min(first + min(payload_end(at), done + count), self.high)
            if start >= end:
                continue
            if into.memory != NULL:
                err = guarded_store(into.memory + (start - self.low), data + (start - first - done),
                                    end - start)
                if err:
                    self.no_memory()
                continue
            err = pwrite_all(into.fd, data + (start - first - done), end - start,
                             into.offset + (start - self.low))
            if err:
                raise_oserror(err, b"pwrite")
        return 0

    cdef int no_memory(self) except -1 with gil:
        raise OSError(EFAULT, "the buffer was unmapped, protected or cut short: it cannot be filled")

    cdef int read_failed(self, int err, uint64_t offset) except -1 with gil:
        if err == EFAULT:
            self.no_memory()
        return self.index.read_failed(err, offset)

    cdef int damaged(self, uint64_t offset) except -1 with gil:
        raise CorruptImageError(f"{self.index.name}: the payload's checksum of CHNK does not match", offset)

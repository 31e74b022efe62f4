"""Restores pages from verified chunks to memory or to a file. Any thread; needs the GIL only for zstd.

Each chunk is read once. A raw payload is read in pieces, so that each is still in the cache when it is
checksummed. A piece is read directly into its destination if that is contiguous memory. The checksum covers
the whole payload: after an error the content of the destination is undefined, and the caller must discard it.
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


# Fits the L2 cache: pread and crc32c of 1 GiB on two threads take 100 to 108 ms with 64 to 256 KiB,
# 115 with 1 MiB, and 136 with 32 KiB (AMD Zen 4, 2 CPUs; 64 KiB to 1 MiB are within the noise).
cdef uint64_t PIECE_BYTES = 256 << 10


cdef uint64_t payload_offset(const chunk_t *chunk) noexcept nogil:
    return chunk.offset + sizeof(snap_record) + chunk.header.meta_bytes


cdef uint64_t payload_start(const run_t *run) noexcept nogil:
    return <uint64_t>run.data_page * SNAP_PAGE_BYTES


cdef uint64_t payload_end(const run_t *run) noexcept nogil:
    return (run.data_page + run.pages) * SNAP_PAGE_BYTES


cdef uint64_t run_end(const run_t *run) noexcept nogil:
    return (run.page + run.pages) * SNAP_PAGE_BYTES


cdef int by_payload(const void *a, const void *b) noexcept nogil:
    cdef const run_t *left = <const run_t *>a
    cdef const run_t *right = <const run_t *>b
    if left.chunk != right.chunk:
        return 1 if left.chunk > right.chunk else -1
    return (left.data_page > right.data_page) - (left.data_page < right.data_page)


cdef class Restorer:
    """Restores the bytes [low, high) of an image, where byte 4096 * p is the first of page p.

    `runs` must cover the range without a gap and without a lost page; the caller checks it. The work is
    divided into `jobs`, which several threads may run at the same time.
    """

    def __cinit__(self, PageIndex index, Runs runs, uint64_t low, uint64_t high):
        self.index = index
        self.low = low
        self.high = high
        self.data_runs = Runs()
        self.zero_runs = Runs()
        self.plan(runs)

    def __dealloc__(self):
        free(self.starts)

    cdef int plan(self, Runs runs) except -1:
        cdef Runs into
        cdef size_t i
        for i in range(runs.count):
            into = self.data_runs if runs.runs[i].kind == SNAP_DATA else self.zero_runs
            if into.append(&runs.runs[i]):
                raise MemoryError
        if self.data_runs.count:
            qsort(self.data_runs.runs, self.data_runs.count, sizeof(run_t), by_payload)
        self.starts = <size_t *>malloc((self.data_runs.count + 1) * sizeof(size_t))
        if self.starts == NULL:
            raise MemoryError
        for i in range(self.data_runs.count):
            if i == 0 or self.data_runs.runs[i].chunk != self.data_runs.runs[i - 1].chunk:
                self.starts[self.jobs] = i
                self.jobs += 1
        self.starts[self.jobs] = self.data_runs.count
        return 0

    def into_memory(self, unsigned char[::1] buffer not None, size_t begin, size_t end):
        """Run the jobs [begin, end): write their data pages to `buffer`, whose first byte is byte `low`.

        Raises ValueError if the buffer is smaller than the range.
        """
        if <uint64_t>buffer.shape[0] < self.high - self.low:
            raise ValueError("the buffer is smaller than what is restored into it")
        if begin < end:
            self._run(<size_t>&buffer[0], -1, 0, begin, end)

    def into_file(self, int fd, uint64_t offset, size_t begin, size_t end):
        """Run the jobs [begin, end): write their data pages to a file that has byte `low` at `offset`."""
        self._run(0, fd, offset, begin, end)

    def _run(self, size_t to, int fd, uint64_t offset, size_t begin, size_t end):
        """Run the jobs [begin, end) with one scratch buffer (for `into_memory` and `into_file`)."""
        cdef size_t number
        cdef destination_t into
        cdef char *scratch = <char *>malloc(SNAP_CHUNK_MAX_BYTES)
        if scratch == NULL:
            raise MemoryError
        into.memory = <char *>to
        into.fd = fd
        into.offset = offset
        decompressor = ZstdDecompressor()
        guard_begin()               # the memory is the caller's, who may unmap it meanwhile
        try:
            with nogil:
                guard_thread()
                for number in range(begin, min(end, self.jobs)):
                    self.job(number, &into, scratch, decompressor)
        finally:
            guard_end()
            free(scratch)

    def clear_zero_runs(self, unsigned char[::1] buffer not None):
        """Zero the bytes of zero pages and holes. Not needed for memory that is known to be zero."""
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
            for i in range(self.zero_runs.count):
                start = max(self.low, self.zero_runs.runs[i].page * SNAP_PAGE_BYTES)
                end = min(self.high, run_end(&self.zero_runs.runs[i]))
                if start < end and not err:
                    err = guarded_clear(to + (start - self.low), end - start)
        guard_end()
        if err:
            self.buffer_fault()

    def spans(self, uint32_t kind):
        """(offset from `low`, bytes) of each zero run (kind 1) or hole (kind 2)."""
        cdef size_t i
        for i in range(self.zero_runs.count):
            if self.zero_runs.runs[i].kind == kind:
                start = max(self.low, self.zero_runs.runs[i].page * SNAP_PAGE_BYTES)
                end = min(self.high, run_end(&self.zero_runs.runs[i]))
                yield start - self.low, end - start

    cdef int job(self, size_t number, const destination_t *into, char *scratch,
                 object decompressor) except -1 nogil:
        cdef chunk_t *chunk = &self.index.chunks[self.data_runs.runs[self.starts[number]].chunk]
        if chunk.header.encoding == SNAP_RAW:
            return self.copy_raw(number, into, scratch)
        cdef int err = source_read(self.index.at, scratch, chunk.header.stored_bytes, payload_offset(chunk))
        if err:
            self.read_failed(err, chunk.offset)
        if crc32c(0, scratch, chunk.header.stored_bytes) != chunk.header.payload_crc:
            self.checksum_mismatch(chunk.offset)
        return self.decompress_chunk(number, into, scratch, decompressor)

    cdef int copy_raw(self, size_t number, const destination_t *into, char *scratch) except -1 nogil:
        """Read a raw payload in pieces, directly into the destination if that is contiguous memory. Data for
        a file stays in `scratch` until the whole payload is verified."""
        cdef chunk_t *chunk = &self.index.chunks[self.data_runs.runs[self.starts[number]].chunk]
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
                self.buffer_fault()
            if direct == NULL and into.memory != NULL:
                self.write_out(run, number, data, done, count, into)
            done += count
        if crc != chunk.header.payload_crc:
            self.checksum_mismatch(chunk.offset)
        if into.memory == NULL:
            self.write_out(self.starts[number], number, scratch, 0, done, into)
        return 0

    cdef void skip_to(self, size_t *run, size_t number, uint64_t done) noexcept nogil:
        """Advance to the first run of the job that ends after byte `done` of the payload."""
        while run[0] < self.starts[number + 1] and payload_end(&self.data_runs.runs[run[0]]) <= done:
            run[0] += 1

    cdef char *direct(self, size_t run, size_t number, uint64_t done, uint64_t count,
                      const destination_t *into) noexcept nogil:
        """Address for bytes [done, done + count) of the payload, if they all lie in `run`; else NULL."""
        cdef const run_t *at = &self.data_runs.runs[run]
        cdef uint64_t start
        if into.memory == NULL or run == self.starts[number + 1]:
            return NULL
        if payload_start(at) > done or payload_end(at) < done + count:
            return NULL
        start = at.page * SNAP_PAGE_BYTES + (done - payload_start(at))
        if start < self.low or start + count > self.high:
            return NULL
        return into.memory + (start - self.low)

    cdef int decompress_chunk(self, size_t number, const destination_t *into, const char *frame,
                              object decompressor) except -1 with gil:
        """Decompress a verified payload (zstandard releases the GIL) and write out its pages."""
        cdef chunk_t *chunk = &self.index.chunks[self.data_runs.runs[self.starts[number]].chunk]
        cdef uint64_t length = chunk.header.raw_bytes
        cdef bytes raw
        view = PyMemoryView_FromMemory(<char *>frame, chunk.header.stored_bytes, PyBUF_READ)
        try:
            raw = decompress(view, length, decompressor)
        except (ValueError, ZstdError) as error:
            raise CorruptImageError(f"{self.index.name}: zstd: {error}", chunk.offset) from None
        cdef const char *payload = PyBytes_AS_STRING(raw)
        with nogil:
            self.write_out(self.starts[number], number, payload, 0, length, into)
        return 0

    cdef int write_out(self, size_t run, size_t number, const char *data, uint64_t done, uint64_t count,
                       const destination_t *into) except -1 nogil:
        """Write the live parts of bytes [done, done + count) of a payload, which are at `data`, to their
        destination. The job's runs before `run` have none of these bytes."""
        cdef const run_t *at
        cdef uint64_t start, end, first
        cdef size_t i
        cdef int err
        for i in range(run, self.starts[number + 1]):
            at = &self.data_runs.runs[i]
            if payload_start(at) >= done + count:
                break
            first = at.page * SNAP_PAGE_BYTES - payload_start(at)   # image offset of byte 0 (modulo 2^64)
            start = max(first + max(payload_start(at), done), self.low)
            end = min(first + min(payload_end(at), done + count), self.high)
            if start >= end:
                continue
            if into.memory != NULL:
                err = guarded_store(into.memory + (start - self.low), data + (start - first - done),
                                    end - start)
                if err:
                    self.buffer_fault()
                continue
            err = pwrite_all(into.fd, data + (start - first - done), end - start,
                             into.offset + (start - self.low))
            if err:
                raise_oserror(err, b"pwrite")
        return 0

    cdef int buffer_fault(self) except -1 with gil:
        raise OSError(EFAULT, "the buffer was unmapped, protected or cut short: it cannot be filled")

    cdef int read_failed(self, int err, uint64_t offset) except -1 with gil:
        if err == EFAULT:
            self.buffer_fault()
        return self.index.read_failed(err, offset)

    cdef int checksum_mismatch(self, uint64_t offset) except -1 with gil:
        raise CorruptImageError(f"{self.index.name}: the payload checksum of CHNK does not match", offset)

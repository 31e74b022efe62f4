"""Writes an image as a stream of checksummed records. FORMAT.md defines every byte.

Owns the index (malloc'ed, so that `chunk` needs no GIL), but no descriptor: the sink owns it. Runs on the
encoder threads, one at a time. It may wait for the sink without limit, so no capture thread may call it. A
failed write leaves a partial record in the sink; all later calls therefore fail too.
"""

import uuid
from array import array

from cpython.buffer cimport PyBUF_READ
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.errno cimport EIO, ENOMEM
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memset
from posix.uio cimport iovec

from snapengine.base.atomics cimport snap_store
from snapengine.base.checksum cimport crc32c
from snapengine.image.format cimport (
    SNAP_ALIGN_BYTES, SNAP_CHNK, SNAP_CHUNK_MAX_BYTES, SNAP_DATA, SNAP_FEATURES, SNAP_INDX, SNAP_LAST_PART,
    SNAP_MAGIC, SNAP_MAJOR, SNAP_MAY_IGNORE, SNAP_META_MAX_BYTES, SNAP_MINOR, SNAP_NAME_MAX_BYTES, SNAP_PADD,
    SNAP_PAGES_MAX, SNAP_PAGE_BYTES, SNAP_PART_MAX_BYTES, SNAP_RAW, SNAP_REGN, SNAP_STAT, SNAP_TRLR,
    SNAP_VMST, SNAP_ZSTD, snap_entry_kind, snap_entry_page, snap_entry_pages, snap_file_header, snap_trailer,
)
from snapengine.storage.fd_writer cimport ECANCELED

from snapengine.image import encode
from snapengine.base import names
from snapengine.errors import CaptureCancelled, SinkError

# Smallest payload to align. Unaligned copies are slower: restoring 1 GiB takes 112 ms instead of 93.
cdef uint64_t ALIGN_FROM_BYTES = 64 << 10

cdef enum:
    NEW = 0
    OPEN = 1
    DONE = 2
    BROKEN = 3

    NO_DESCRIPTOR = -2  # value of sink.fd: no descriptor, call sink.write


cdef const char *check_chunk(
    const uint64_t *entries, const snap_record *head, snap_index *item
) noexcept nogil:
    """The error in a chunk, or NULL. Stores the lowest and the highest page in `item`."""
    cdef uint64_t data_pages = 0
    cdef uint64_t last
    cdef uint32_t i
    item.first_page = SNAP_PAGES_MAX
    item.last_page = 0
    if item.entries == 0 or item.entries > SNAP_META_MAX_BYTES // 8:
        return b"the page map is empty or too long"
    for i in range(item.entries):
        last = snap_entry_page(entries[i]) + snap_entry_pages(entries[i]) - 1
        item.first_page = min(item.first_page, snap_entry_page(entries[i]))
        item.last_page = max(item.last_page, last)
        if snap_entry_kind(entries[i]) == SNAP_DATA:
            data_pages += snap_entry_pages(entries[i])
    if item.last_page >= SNAP_PAGES_MAX:
        return b"a page number is beyond 2^40"
    if head.raw_bytes != data_pages * SNAP_PAGE_BYTES:
        return b"raw_bytes is not the size of the data pages in the map"
    if head.raw_bytes > SNAP_CHUNK_MAX_BYTES:
        return b"more than 4 MiB of data pages"
    if head.encoding == SNAP_RAW:
        if head.stored_bytes != head.raw_bytes:
            return b"stored and raw size differ"
        return NULL
    if head.encoding != SNAP_ZSTD:
        return b"unknown encoding"
    if head.stored_bytes == 0 or head.stored_bytes >= head.raw_bytes:
        return b"a zstd payload must be smaller than raw"
    return NULL


cdef class Writer:
    """Writes an image to `sink` (see `snapengine.storage.sinks`), at most `rate_limit` bytes per second (0:
    no limit).

    `image_id` and `parent_id` are 16 bytes (default: a new UUID; zeros). Call `begin`, then `chunk` and
    `vmstate` in any order, then `finish`. The caller calls `commit` or `abort` of the sink.
    """

    def __cinit__(self, sink, *, image_id=None, parent_id=None, uint64_t rate_limit=0):
        self.sink = sink
        self.image_id = uuid.uuid4().bytes if image_id is None else bytes(image_id)
        self.parent_id = bytes(16) if parent_id is None else bytes(parent_id)
        if len(self.image_id) != 16 or len(self.parent_id) != 16:
            raise ValueError("image_id and parent_id must have 16 bytes")
        self.vmstate_names = set()
        self.no_descriptor = sink.fd == NO_DESCRIPTOR
        self.fd_writer = FdWriter(max(sink.fd, -1), rate_limit)
        self.fd_writer.cancelled = &self.cancelled

    def __dealloc__(self):
        free(self.index)

    def begin(self, regions):
        """Write the file header and the regions: a list of (`Region`, first page number).

        Raises ValueError if a region is malformed, or if two regions share a page number.
        """
        entries = encode.region_entries(regions)
        self._expect(NEW)
        self.state = OPEN
        cdef snap_file_header header
        cdef const unsigned char[::1] image_id = self.image_id
        cdef const unsigned char[::1] parent_id = self.parent_id
        memset(&header, 0, sizeof(header))
        memcpy(header.magic, <const char *>SNAP_MAGIC, 8)
        header.major = SNAP_MAJOR
        header.minor = SNAP_MINOR
        header.header_bytes = sizeof(header)
        header.features = SNAP_FEATURES
        memcpy(header.image_id, &image_id[0], 16)
        memcpy(header.parent_id, &parent_id[0], 16)
        header.crc = crc32c(0, &header, sizeof(header) - 4)
        with nogil:
            self.send(&header, sizeof(header), NULL, 0, NULL, 0)
        self.regn_offset = self.image_bytes
        for part, count, last in encode.region_parts(entries):
            self._write(SNAP_REGN, part, arg=count, flags=SNAP_LAST_PART if last else 0)

    cdef int chunk(self, const uint64_t *entries, uint32_t n_entries,
                   const void *payload, uint64_t stored_bytes, uint64_t raw_bytes,
                   uint16_t encoding, uint32_t crc) except -1 nogil:
        cdef snap_record header
        cdef snap_index item
        memset(&header, 0, sizeof(header))
        header.type = SNAP_CHNK
        header.encoding = encoding
        header.stored_bytes = stored_bytes
        header.raw_bytes = raw_bytes
        header.meta_bytes = n_entries * 8
        header.arg = <uint32_t>self.chunks
        header.payload_crc = crc
        item.type = SNAP_CHNK
        item.entries = n_entries
        item.offset = self.image_bytes
        item.record_bytes = sizeof(header) + header.meta_bytes + stored_bytes
        cdef const char *wrong = check_chunk(entries, &header, &item)
        if wrong != NULL:
            with gil:
                raise ValueError(f"chunk: {wrong.decode()}")
        if encoding == SNAP_RAW and stored_bytes >= ALIGN_FROM_BYTES:
            self.align(sizeof(header) + header.meta_bytes)
            item.offset = self.image_bytes
        self.record(&header, entries, payload)
        self.add_index_entry(&item)
        self.chunks += 1
        return 0

    cdef int align(self, uint64_t before) except -1 nogil:
        """Write padding so that the file offset `before` bytes after it is a multiple of 64."""
        cdef snap_record header
        cdef char[SNAP_ALIGN_BYTES] zeros
        cdef uint64_t over = (self.image_bytes + before) % SNAP_ALIGN_BYTES
        if over == 0:
            return 0
        memset(&header, 0, sizeof(header))
        memset(zeros, 0, sizeof(zeros))
        header.type = SNAP_PADD
        header.flags = SNAP_MAY_IGNORE
        header.meta_bytes = (SNAP_ALIGN_BYTES - (over + sizeof(header)) % SNAP_ALIGN_BYTES) % SNAP_ALIGN_BYTES
        return self.record(&header, zeros, NULL)

    def py_chunk(self, entries, data=b"", *, level=None):
        """Write one chunk from Python: `entries` is a list of (page, pages, kind), `data` the DATA pages.

        With a zstd `level` the payload is compressed if that makes it smaller.
        """
        if not entries:
            raise ValueError("chunk: the page map is empty")
        cdef uint64_t[::1] page_map = array("Q", [encode.pack_entry(*entry) for entry in entries])
        payload, encoding = encode.encode(data, level)
        cdef const unsigned char[::1] stored = payload
        cdef uint64_t length = stored.shape[0]
        cdef uint64_t raw_bytes = len(data)
        cdef uint32_t count = <uint32_t>page_map.shape[0]
        cdef uint16_t stored_as = encoding
        cdef const void *start = &stored[0] if length else NULL
        cdef const uint64_t *first = &page_map[0]
        with nogil:
            self.chunk(first, count, start, length, raw_bytes, stored_as, crc32c(0, start, length))

    def vmstate(self, name, blob_or_file, level=None):
        """Write a named blob (bytes-like, or a readable binary file that is read to its end).

        It is written in parts of 1 MiB. With a zstd `level` each part is compressed if that makes it smaller.
        Raises ValueError if the name is taken, empty, longer than 4096 bytes, or contains a NUL.
        """
        meta = names.encode(name)
        if b"\0" in meta:
            raise ValueError(f"vmstate: the name {name[:80]!r} contains a NUL")
        if not 0 < len(meta) <= SNAP_NAME_MAX_BYTES or name in self.vmstate_names:
            raise ValueError(f"vmstate: the name {name[:80]!r} is empty, too long or taken")
        self._expect(OPEN)
        self.vmstate_names.add(name)
        cdef snap_index item
        for number, (part, last) in enumerate(encode.blob_parts(blob_or_file)):
            payload, encoding = encode.encode(part, level)
            item.type = SNAP_VMST
            item.entries = 0
            item.offset = self.image_bytes
            item.first_page = number
            item.last_page = len(part)
            self._write(SNAP_VMST, payload, meta=meta, arg=number, raw_bytes=len(part),
                        encoding=encoding, flags=SNAP_LAST_PART if last else 0)
            item.record_bytes = self.image_bytes - item.offset
            self.add_index_entry(&item)
            self.vmstate_parts += 1

    def finish(self, stats):
        """Write `stats` (after setting "image_bytes"), index and trailer. Returns the image size in bytes."""
        self._expect(OPEN)
        cdef snap_trailer trailer
        cdef const unsigned char[::1] image_id = self.image_id
        memset(&trailer, 0, sizeof(trailer))
        per_part = SNAP_PART_MAX_BYTES // sizeof(snap_index)
        index_parts = max(1, (self.index_count + per_part - 1) // per_part)
        tail = (1 + index_parts + 1) * sizeof(snap_record) + sizeof(trailer)
        tail += self.index_count * sizeof(snap_index)
        text = encode.stats_text(stats, self.image_bytes + tail)
        total = stats["image_bytes"]
        trailer.regn_offset = self.regn_offset
        trailer.stat_offset = self.image_bytes
        self._write(SNAP_STAT, text)
        trailer.indx_offset = self.image_bytes
        self._write_index(per_part)
        trailer.records = self.seq + 1
        trailer.chunks = self.chunks
        trailer.vmstate_parts = self.vmstate_parts
        trailer.image_bytes = total
        memcpy(trailer.image_id, &image_id[0], 16)
        self._write(SNAP_TRLR, PyMemoryView_FromMemory(<char *>&trailer, sizeof(trailer), PyBUF_READ))
        self.state = DONE
        return total

    def cancel(self):
        """End a blocked or throttled write within 50 ms, and fail every later one. Any thread may call it."""
        snap_store(&self.cancelled, 1)

    def _expect(self, int state):
        if self.state == BROKEN:
            self.fail(self.failed_errno)
        if self.state != state:
            raise ValueError("the writer has " + ("not begun", "already begun", "finished")[self.state])

    def _write_index(self, size_t per_part):
        cdef size_t start = 0
        cdef size_t count
        while True:
            count = min(per_part, self.index_count - start)
            view = b""
            if count:
                room = count * sizeof(snap_index)
                view = PyMemoryView_FromMemory(<char *>(self.index + start), room, PyBUF_READ)
            start += count
            last = start == self.index_count
            self._write(SNAP_INDX, view, arg=count, flags=SNAP_LAST_PART if last else 0)
            if last:
                return

    def _write(self, uint32_t kind, payload, *, meta=b"", raw_bytes=None, uint32_t arg=0, int encoding=0,
               int flags=0):
        """Write one record from Python objects; the payload is stored as given."""
        cdef const unsigned char[::1] meta_view = meta
        cdef const unsigned char[::1] view = payload
        cdef snap_record header
        memset(&header, 0, sizeof(header))
        header.type = kind
        header.encoding = encoding
        header.flags = flags
        header.arg = arg
        header.meta_bytes = meta_view.shape[0]
        header.stored_bytes = view.shape[0]
        header.raw_bytes = header.stored_bytes if raw_bytes is None else raw_bytes
        cdef const void *start = &view[0] if view.shape[0] else NULL
        cdef const void *meta_start = &meta_view[0] if meta_view.shape[0] else NULL
        with nogil:
            header.payload_crc = crc32c(0, start, header.stored_bytes)
            self.record(&header, meta_start, start)

    cdef int record(self, snap_record *header, const void *meta, const void *payload) except -1 nogil:
        if self.state != OPEN:
            with gil:
                self._expect(OPEN)
        header.seq = self.seq
        header.header_crc = crc32c(0, header, sizeof(header[0]) - 4)
        header.header_crc = crc32c(header.header_crc, meta, header.meta_bytes)
        self.send(header, sizeof(header[0]), meta, header.meta_bytes, payload, header.stored_bytes)
        self.seq += 1
        return 0

    cdef int send(self, const void *head, size_t head_bytes, const void *meta, size_t meta_bytes,
                  const void *payload, size_t payload_bytes) except -1 nogil:
        cdef iovec parts[3]
        cdef int err
        parts[0] = iovec(<void *>head, head_bytes)
        parts[1] = iovec(<void *>meta, meta_bytes)
        parts[2] = iovec(<void *>payload, payload_bytes)
        if self.no_descriptor:
            for i in range(3):
                self.send_to_sink(parts[i].iov_base, parts[i].iov_len)
            return 0
        err = self.fd_writer.send(parts, 3, &self.image_bytes)
        return self.fail(err) if err else 0

    cdef int send_to_sink(self, const void *data, size_t length) except -1 with gil:
        """Write bytes to a sink without a descriptor, in pieces that the rate limit allows."""
        cdef size_t done = 0
        cdef size_t limit
        while done < length:
            with nogil:
                limit = self.fd_writer.acquire(length - done)
            if limit == 0:
                self.fail(ECANCELED)
            try:
                self.sink.write(PyMemoryView_FromMemory(<char *>data + done, limit, PyBUF_READ))
            except BaseException as error:
                self.state = BROKEN
                self.failed_errno = getattr(error, "errno", None) or EIO
                raise
            self.fd_writer.consume(limit)
            done += limit
            self.image_bytes += limit
        return 0

    cdef int add_index_entry(self, const snap_index *entry) except -1 nogil:
        cdef size_t room = max(<size_t>256, 2 * self.index_capacity)
        cdef snap_index *grown
        if self.index_count == self.index_capacity:
            grown = <snap_index *>realloc(self.index, room * sizeof(snap_index))
            if grown == NULL:
                return self.fail(ENOMEM)
            self.index = grown
            self.index_capacity = room
        self.index[self.index_count] = entry[0]
        self.index_count += 1
        return 0

    cdef int fail(self, int err) except -1 with gil:
        """Raise the error that ends the image; every later call raises it again."""
        self.state = BROKEN
        self.failed_errno = err
        if err == ECANCELED:
            raise CaptureCancelled(f"{self.sink.name}: cancelled")
        raise SinkError(err, f"{self.sink.name}: {self.sink.explain(err)}")

"""The page index: which chunk holds the newest version of a page.

Owns C arrays only; the `Image` owns the source. Any thread may call it: the GIL protects the tables, and is
released while a map is read. Every map is verified (`accept`) before any of its entries is used.
"""

from libc.errno cimport EBADF
from libc.stdlib cimport free, malloc, qsort, realloc
from libc.string cimport memcpy, memset

from snapengine.base.checksum cimport crc32c
from snapengine.image.format cimport (
    SNAP_CHNK, SNAP_CHUNK_MAX_BYTES, SNAP_DATA, SNAP_LAST_PART, SNAP_MAY_IGNORE, SNAP_META_MAX_BYTES,
    SNAP_PAGES_MAX, SNAP_PAGE_BYTES, SNAP_VMST, SNAP_ZSTD, snap_entry_kind, snap_entry_page,
    snap_entry_pages, snap_index,
)
from snapengine.base.oserror cimport raise_oserror
from snapengine.image.runs cimport newest, run_t
from snapengine.storage.source cimport Source, source_read, source_t

from snapengine.errors import CorruptImageError, ImageError, UnsupportedVersionError

cdef uint64_t ANY_PAGES = <uint64_t>-1  # last_page of a chunk that is in no index yet
cdef uint64_t WASTE_FACTOR = 4  # limit of `wasted`, as a multiple of the entries in the image


cdef int by_span(const void *a, const void *b) noexcept nogil:
    cdef uint64_t left = (<const span_t *>a).first_page
    cdef uint64_t right = (<const span_t *>b).first_page
    return (left > right) - (left < right)


cdef bint plausible(const snap_index *item) noexcept nogil:
    """Whether an index entry describes a chunk that the format permits."""
    cdef uint64_t head = sizeof(snap_record) + 8 * <uint64_t>item.entries
    return (
        item.type == SNAP_CHNK and 0 < item.entries <= SNAP_META_MAX_BYTES // 8
        and head <= item.record_bytes <= head + SNAP_CHUNK_MAX_BYTES
        and item.first_page <= item.last_page < SNAP_PAGES_MAX
    )


cdef bint sizes_match(const chunk_t *chunk, const snap_record *header, size_t number,
                      size_t length) noexcept nogil:
    """Whether a chunk's sizes and number match its index entry and are within the limits."""
    cdef bint stored_ok = header.stored_bytes == header.raw_bytes
    if header.encoding == SNAP_ZSTD:
        stored_ok = 0 < header.stored_bytes < header.raw_bytes
    return (
        stored_ok and header.type == SNAP_CHNK and header.arg == <uint32_t>number
        and 0 < header.meta_bytes <= SNAP_META_MAX_BYTES and length == sizeof(header[0]) + header.meta_bytes
        and header.raw_bytes <= SNAP_CHUNK_MAX_BYTES
        and header.meta_bytes == 8 * <uint64_t>chunk.entries
        and length + header.stored_bytes == chunk.record_bytes
    )


cdef bint map_matches(const uint64_t *entries, chunk_t *chunk, const snap_record *header) noexcept nogil:
    """Whether a page map matches the pages in the index entry and the size of the payload."""
    cdef uint64_t lowest = SNAP_PAGES_MAX
    cdef uint64_t highest = 0
    cdef uint64_t data_pages = 0
    cdef uint32_t i
    for i in range(chunk.entries):
        lowest = min(lowest, snap_entry_page(entries[i]))
        highest = max(highest, snap_entry_page(entries[i]) + snap_entry_pages(entries[i]) - 1)
        if snap_entry_kind(entries[i]) == SNAP_DATA:
            data_pages += snap_entry_pages(entries[i])
    if chunk.last_page == ANY_PAGES:  # a stream: its index comes later
        chunk.first_page = lowest
        chunk.last_page = highest
    return (
        lowest == chunk.first_page and highest == chunk.last_page and highest < SNAP_PAGES_MAX
        and header.raw_bytes == data_pages * SNAP_PAGE_BYTES
    )


cdef void clip(run_t *run, uint64_t first, uint64_t end) noexcept nogil:
    """Clip a run to the pages in [first, end), which it must overlap."""
    cdef uint64_t cut = first - run.page if run.page < first else 0
    run.page += cut
    run.pages = min(run.pages - cut, end - run.page)
    run.data_page += <uint32_t>cut if run.kind == SNAP_DATA else 0


cdef int read_nothing(void *self, void *into, size_t count, uint64_t offset) noexcept nogil:
    return EBADF


cdef source_t NO_SOURCE
NO_SOURCE.read = read_nothing


cdef class PageIndex:
    """The chunks of one image. `name` is the image's name for messages. Maps and payloads are read from
    `source`. Without a source (a stream), `add` supplies the maps, and there are no payloads to read."""

    def __cinit__(self, str name, Source source=None):
        self.name = name
        self.source = source
        self.at = &NO_SOURCE if source is None else &source.at

    def __dealloc__(self):
        cdef size_t i
        for i in range(self.count):
            free(self.chunks[i].map)
        free(self.chunks)
        free(self.spans)

    cdef int reserve(self, size_t count) except -1:
        cdef size_t capacity = max(count, 2 * self.capacity)
        cdef chunk_t *grown
        if count > self.capacity:
            grown = <chunk_t *>realloc(self.chunks, capacity * sizeof(chunk_t))
            if grown == NULL:
                raise MemoryError
            self.chunks = grown
            self.capacity = capacity
        return 0

    def add_index(self, const unsigned char[::1] payload not None, uint64_t start, uint64_t limit):
        """Add the entries of one INDX payload, whose records lie in [start, limit).

        Returns the end of its last record, and for each VMST record (offset, record bytes, part number, raw
        bytes, entries). Offsets must ascend: records then cannot overlap, and the file limits their number.
        """
        cdef snap_index item
        cdef size_t listed = <size_t>payload.shape[0] // sizeof(item)
        cdef size_t i
        vmstate = []
        self.reserve(self.count + listed)
        for i in range(listed):
            memcpy(&item, &payload[i * sizeof(item)], sizeof(item))
            if (item.record_bytes < sizeof(snap_record) or item.record_bytes > limit
                    or item.offset < start or item.offset > limit - item.record_bytes):
                raise CorruptImageError(f"{self.name}: an index entry points outside the records", limit)
            start = item.offset + item.record_bytes
            if item.type == SNAP_VMST:
                numbers = item.first_page, item.last_page, item.entries
                vmstate.append((item.offset, item.record_bytes, *numbers))
                continue
            if not plausible(&item):
                raise CorruptImageError(f"{self.name}: an index entry is invalid", limit)
            memset(&self.chunks[self.count], 0, sizeof(chunk_t))
            self.chunks[self.count].offset = item.offset
            self.chunks[self.count].record_bytes = item.record_bytes
            self.chunks[self.count].first_page = item.first_page
            self.chunks[self.count].last_page = item.last_page
            self.chunks[self.count].entries = item.entries
            self.count += 1
        return start, vmstate

    def add(self, const unsigned char[::1] head not None, uint64_t offset):
        """Add a chunk of a stream: `head` is its record header and page map."""
        cdef snap_record header
        memcpy(&header, &head[0], sizeof(header))
        self.reserve(self.count + 1)
        cdef chunk_t *chunk = &self.chunks[self.count]
        memset(chunk, 0, sizeof(chunk_t))
        chunk.offset = offset
        chunk.record_bytes = sizeof(header) + header.meta_bytes + header.stored_bytes
        chunk.entries = header.meta_bytes // 8
        chunk.last_page = ANY_PAGES
        self.count += 1
        self.accept(self.count - 1, &head[0], head.shape[0])

    def check(self, size_t number, const unsigned char[::1] head not None, uint64_t offset):
        """Compare a chunk record of the file with its index entry."""
        if number >= self.count or self.chunks[number].offset != offset:
            raise CorruptImageError(f"{self.name}: a chunk is not in the index", offset)
        if self.chunks[number].map == NULL:
            self.accept(number, &head[0], head.shape[0])

    def same_as(self, PageIndex other not None):
        """Whether both contain the same chunks."""
        cdef size_t i
        if self.count != other.count:
            return False
        for i in range(self.count):
            if (
                self.chunks[i].offset != other.chunks[i].offset
                or self.chunks[i].record_bytes != other.chunks[i].record_bytes
                or self.chunks[i].first_page != other.chunks[i].first_page
                or self.chunks[i].last_page != other.chunks[i].last_page
                or self.chunks[i].entries != other.chunks[i].entries
            ):
                return False
        return True

    def map_of(self, size_t number):
        """The page map of one chunk: a list of (page, pages, kind)."""
        if number >= self.count:
            raise IndexError(number)
        self.load(number)
        cdef const uint64_t *entries = self.chunks[number].map
        cdef uint32_t i
        result = []
        for i in range(self.chunks[number].entries):
            page = snap_entry_page(entries[i])
            result.append((page, snap_entry_pages(entries[i]), snap_entry_kind(entries[i])))
        return result

    def extent(self, size_t number):
        """(offset, record bytes, encoding) of one chunk."""
        self.load(number)
        cdef const chunk_t *chunk = &self.chunks[number]
        return chunk.offset, chunk.record_bytes, chunk.header.encoding

    def data_pages(self):
        """Number of data pages in all chunks, including superseded ones. Loads every map."""
        cdef uint64_t pages = 0
        cdef size_t i
        for i in range(self.count):
            self.load(i)
            pages += self.chunks[i].header.raw_bytes // SNAP_PAGE_BYTES
        return pages

    def resolve(self, uint64_t first, uint64_t end):
        """`Runs` of [first, end) by the newest entry of each page. Pages that no map has are left out.

        A lookup loads only the maps of chunks that overlap the range. In a hostile image all maps overlap all
        ranges, and n lookups in n entries would take quadratic time. The index therefore counts entries
        examined without a match (`wasted`). When the count exceeds `WASTE_FACTOR` times the entries of the
        image, the whole image is resolved once, and later lookups are binary searches: n lookups take
        O(n log n) time.
        """
        if first >= end:
            return Runs()
        self.build_spans()
        if self.resolved is None and self.wasted > WASTE_FACTOR * (self.entries + self.count):
            self.build_resolved()
        if self.resolved is not None:
            self.check_unreadable(first, end)
        if self.resolved is not None:
            return self.clip_resolved(first, end)
        cdef Runs items = self.overlapping(first, end)
        cdef size_t found = items.count
        items = newest(items)
        self.wasted += found - min(found, items.count)  # superseded entries
        return items

    cdef Runs overlapping(self, uint64_t first, uint64_t end):
        """The entries of all chunks, clipped to [first, end)."""
        cdef Runs items = Runs()
        cdef size_t low = 0
        cdef size_t high = self.count
        cdef size_t middle
        while low < high:  # the first span that begins at `end` or later
            middle = (low + high) // 2
            if self.spans[middle].first_page < end:
                low = middle + 1
            else:
                high = middle
        while low and self.spans[low - 1].highest >= first:
            low -= 1
            if self.chunks[self.spans[low].chunk].last_page >= first:
                self.collect(self.spans[low].chunk, first, end, items)
            else:
                self.wasted += 1
        return items

    cdef int build_resolved(self) except -1:
        """Build `resolved`. A damaged chunk fails only the lookups that it overlaps."""
        cdef Runs items = Runs()
        cdef list unreadable = []
        cdef size_t i
        for i in range(self.count):
            try:
                self.collect(i, 0, SNAP_PAGES_MAX, items)
            except (ImageError, OSError):
                unreadable.append(i)
        self.unreadable = unreadable
        self.resolved = newest(items)
        return 0

    cdef int check_unreadable(self, uint64_t first, uint64_t end) except -1:
        """Raise the error of an unreadable chunk that may overlap [first, end). If it is readable now,
        discard `resolved`."""
        cdef size_t number
        for number in self.unreadable:
            if self.chunks[number].first_page < end and self.chunks[number].last_page >= first:
                self.load(number)
                self.resolved = None
                return 0
        return 0

    cdef Runs clip_resolved(self, uint64_t first, uint64_t end):
        """The runs of `resolved`, clipped to [first, end)."""
        cdef Runs items = Runs()
        cdef Runs every = self.resolved
        cdef size_t low = 0
        cdef size_t high = every.count
        cdef size_t middle
        cdef run_t run
        while low < high:  # the first run that ends after `first`
            middle = (low + high) // 2
            if every.runs[middle].page + every.runs[middle].pages <= first:
                low = middle + 1
            else:
                high = middle
        while low < every.count and every.runs[low].page < end:
            run = every.runs[low]
            clip(&run, first, end)
            if items.append(&run):
                raise MemoryError
            low += 1
        return items

    cdef int build_spans(self) except -1:
        cdef uint64_t highest = 0
        cdef size_t i
        if self.spans != NULL:
            return 0
        self.spans = <span_t *>malloc((self.count + 1) * sizeof(span_t))
        if self.spans == NULL:
            raise MemoryError
        for i in range(self.count):
            self.spans[i].first_page = self.chunks[i].first_page
            self.spans[i].chunk = <uint32_t>i
            self.entries += self.chunks[i].entries
        qsort(self.spans, self.count, sizeof(span_t), by_span)
        for i in range(self.count):
            highest = max(highest, self.chunks[self.spans[i].chunk].last_page)
            self.spans[i].highest = highest
        return 0

    cdef int collect(self, size_t number, uint64_t first, uint64_t end, Runs into) except -1:
        """Append the chunk's entries, clipped to [first, end)."""
        cdef uint32_t data_page = 0
        cdef uint32_t i
        cdef run_t run
        self.load(number)
        run.chunk = <uint32_t>number
        for i in range(self.chunks[number].entries):
            run.entry = i
            run.page = snap_entry_page(self.chunks[number].map[i])
            run.pages = snap_entry_pages(self.chunks[number].map[i])
            run.kind = snap_entry_kind(self.chunks[number].map[i])
            run.data_page = data_page if run.kind == SNAP_DATA else 0
            if run.kind == SNAP_DATA:
                data_page += <uint32_t>run.pages
            if run.page >= end or run.page + run.pages <= first:
                self.wasted += 1
                continue
            clip(&run, first, end)
            if into.append(&run):
                raise MemoryError
        return 0

    cdef int load(self, size_t number) except -1:
        """Read and verify the page map of a chunk, unless it is loaded."""
        cdef chunk_t *chunk = &self.chunks[number]
        if chunk.map != NULL:
            return 0
        cdef uint64_t offset = chunk.offset
        cdef size_t length = sizeof(snap_record) + 8 * <size_t>chunk.entries
        cdef unsigned char *data = <unsigned char *>malloc(length)
        cdef int err
        if data == NULL:
            raise MemoryError
        try:
            with nogil:
                err = source_read(self.at, data, length, offset)
            if err:
                self.read_failed(err, offset)
            self.accept(number, data, length)
        finally:
            free(data)
        return 0

    cdef int read_failed(self, int err, uint64_t offset) except -1 with gil:
        if self.source is None:
            raise_oserror(err, b"read")
        return self.source.failed(err, offset)

    cdef int accept(self, size_t number, const unsigned char *data, size_t length) except -1:
        """Verify a chunk's record header and page map against checksum and index, and store them."""
        cdef chunk_t *chunk = &self.chunks[number]
        cdef snap_record header
        cdef uint32_t crc
        memcpy(&header, data, sizeof(header))
        crc = crc32c(0, data, sizeof(header) - 4)
        crc = crc32c(crc, data + sizeof(header), length - sizeof(header))
        if crc != header.header_crc:
            text = f"{self.name}: a chunk's header or page map is damaged: the checksum does not match"
            raise CorruptImageError(text, chunk.offset)
        if header.encoding > SNAP_ZSTD or header.flags & ~(SNAP_LAST_PART | SNAP_MAY_IGNORE):
            text = f"{self.name}: a chunk uses an unknown encoding or flag"
            raise UnsupportedVersionError(text, chunk.offset)
        cdef const uint64_t *entries = <const uint64_t *>(data + sizeof(header))
        if not sizes_match(chunk, &header, number, length) or not map_matches(entries, chunk, &header):
            text = f"{self.name}: a chunk is inconsistent with itself or with the index"
            raise CorruptImageError(text, chunk.offset)
        cdef uint64_t *page_map = <uint64_t *>malloc(length - sizeof(header))
        if page_map == NULL:
            raise MemoryError
        memcpy(page_map, entries, length - sizeof(header))
        if chunk.map != NULL:  # another thread has loaded it
            free(page_map)
            return 0
        chunk.header = header
        chunk.map = page_map
        return 0

"""Writing the pages of a migration stream to an image: directly, or through a spool file.

The tables have two bits per page, in memory that is populated on first write. So memory use grows with the
pages that a stream sends, not with the sizes that it states. One thread parses; encoder threads take filled
slots from the pool, as in a capture.
"""

import tempfile
from array import array

from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EINTR, ENOSPC, errno
from posix.uio cimport pwritev

from snapengine.base.atomics cimport snap_load, snap_store
from snapengine.base.fileio cimport pread_all
from snapengine.image.format cimport SNAP_DATA, SNAP_ENTRY_MAX_PAGES, SNAP_HOLE, SNAP_ZERO
from snapengine.base.iovec cimport iovec_skip
from snapengine.base.oserror cimport raise_oserror
from snapengine.base.pages cimport copy_page, page_nonzero
from snapengine.pipeline.pool cimport (
    lane_close, lane_entry, lane_open, lane_pages, lane_room, pool_finish, pool_fail,
)

from snapengine.errors import CaptureCancelled

cdef enum:
    PAGE_BYTES = 4096
    COUNT_MAX = 65535

cdef uint64_t ALL = <uint64_t>-1


cdef class Intake(StreamParser):
    """Base of `DirectIntake` and `Spool`: the page tables, and the queue to the encoders.

    Call `open_tables` after `read_head`, `attach` before pages are queued, and `close_lane` after the last.
    """

    def open_tables(self):
        """Allocate the tables for the RAM that the head describes."""
        self.seen_bits = Arena(self.total_pages // 8 + 8)
        self.data_bits = Arena(self.total_pages // 8 + 8)
        self.seen = <uint64_t *>self.seen_bits.base
        self.data = <uint64_t *>self.data_bits.base

    def attach(self, Pool pool not None, bint sums):
        """Queue pages in `pool` from now on. `sums`: compute their checksums."""
        self.pool = pool
        self.lane.computes_crc = sums
        cdef int err = lane_open(pool.pool, &self.lane)
        if err:
            raise_oserror(err, b"slot")

    def close_lane(self):
        """Queue the remaining pages, and mark the end of the queue."""
        cdef int err = lane_close(self.pool.pool, &self.lane)
        pool_finish(self.pool.pool)
        if err:
            raise_oserror(err, b"slot")

    def fail(self):
        """Stop the parser and the encoders. Any thread may call it. Idempotent."""
        snap_store(&self.cancelled, 1)
        if self.pool is not None:
            pool_fail(self.pool.pool)

    cdef bint mark(self, uint64_t page, bint nonzero) noexcept nogil:
        cdef uint64_t bit = <uint64_t>1 << (page & 63)
        cdef uint64_t *seen = &self.seen[page >> 6]
        cdef uint64_t *data = &self.data[page >> 6]
        cdef bint before = data[0] & bit != 0
        if seen[0] & bit:
            self.repeats += 1
            if before:
                self.data_pages -= 1
            else:
                self.zero_pages -= 1
        seen[0] |= bit
        if nonzero:
            data[0] |= bit
            self.data_pages += 1
        else:
            if before:
                data[0] &= ~bit
            self.zero_pages += 1
        return before

    cdef int run_at(self, uint64_t page, uint64_t end, uint64_t *pages) noexcept nogil:
        cdef uint64_t start = page
        cdef uint64_t seen, data
        cdef int kind = -1
        cdef int here
        while page < end:
            seen = self.seen[page >> 6]
            data = self.data[page >> 6]
            if page & 63 == 0 and page + 64 <= end and (
                seen == 0 or (seen == ALL and (data == 0 or data == ALL))
            ):
                here = SNAP_HOLE if seen == 0 else SNAP_ZERO if data == 0 else SNAP_DATA
                if kind >= 0 and here != kind:
                    break
                page += 64
            else:
                here = SNAP_DATA if data >> (page & 63) & 1 else SNAP_ZERO
                if not seen >> (page & 63) & 1:
                    here = SNAP_HOLE
                if kind >= 0 and here != kind:
                    break
                page += 1
            kind = here
        pages[0] = page - start
        return kind

    cdef int reserve(self) except -1 nogil:
        """Make room for one entry and one page in the open slot. Waits for the encoders."""
        cdef int err = lane_room(self.pool.pool, &self.lane, 1, True)
        return raise_oserror(err, b"slot") if err else 0

    cdef int put_blank(self, uint64_t page, uint64_t pages, unsigned kind) except -1 nogil:
        cdef uint64_t part
        while pages:
            part = min(pages, <uint64_t>SNAP_ENTRY_MAX_PAGES)
            self.reserve()
            lane_entry(&self.lane, page, part, kind)
            page += part
            pages -= part
        return 0

    cdef int before_refill(self) except -1 nogil:
        if self.pool is not None and snap_load(&self.pool.pool.failed):
            with gil:
                raise CaptureCancelled(f"{self.name}: the image cannot be written")
        return 0


cdef class DirectIntake(Intake):
    """Writes each page to the image when it arrives, for streams that rarely repeat pages.

    If a page arrives twice, the image contains both versions, and the later one is valid.
    """

    cdef int on_page(self, uint64_t page, const char *data) except -1 nogil:
        self.reserve()
        if not copy_page(self.lane.data + self.lane.used, data):
            return self.zero_entry(page)
        self.mark(page, True)
        self.lane.used += PAGE_BYTES
        lane_entry(&self.lane, page, 1, SNAP_DATA)
        self.saved += 1
        return 0

    cdef int on_zero(self, uint64_t page) except -1 nogil:
        self.reserve()
        return self.zero_entry(page)

    cdef int zero_entry(self, uint64_t page) except -1 nogil:
        self.mark(page, False)
        lane_entry(&self.lane, page, 1, SNAP_ZERO)
        return 0

    def put_holes(self):
        """Queue hole entries for the pages that never arrived."""
        cdef uint64_t page = 0
        cdef uint64_t pages = 0
        with nogil:
            while page < self.total_pages:
                if self.run_at(page, self.total_pages, &pages) == SNAP_HOLE:
                    self.put_blank(page, pages, SNAP_HOLE)
                page += pages


cdef class Spool(Intake):
    """Writes each page to its offset in an unnamed sparse file, where it replaces an older version.

    `put_all` queues the last versions in the order of their addresses. The file is in `spill_dir` (None: the
    system's temporary directory).
    """

    def __init__(self, source, spill_dir=None, *, name="stream"):
        self.file = tempfile.TemporaryFile(buffering=0, dir=spill_dir, prefix="snapengine-spool-")
        self.file_fd = self.file.fileno()

    def close(self):
        """Close the file, which frees its space. Idempotent."""
        self.file.close()

    cdef int on_page(self, uint64_t page, const char *data) except -1 nogil:
        if not page_nonzero(data):
            self.mark(page, False)
            return 0
        self.mark(page, True)
        if self.run_pages == RUN_PAGES or page != self.run_first + <uint64_t>self.run_pages:
            self.flush()
            self.run_first = page
        self.parts[self.run_pages].iov_base = <void *>data
        self.parts[self.run_pages].iov_len = PAGE_BYTES
        self.run_pages += 1
        return 0

    cdef int on_zero(self, uint64_t page) except -1 nogil:
        self.mark(page, False)
        return 0

    cdef int before_refill(self) except -1 nogil:
        self.flush()
        return Intake.before_refill(self)

    cdef int flush(self) except -1 nogil:
        """Write the run of pages that is in the parser's buffer to the file."""
        cdef uint64_t offset = self.run_first * PAGE_BYTES
        cdef int first = 0
        cdef ssize_t done
        while first < self.run_pages:
            done = pwritev(self.file_fd, &self.parts[first], self.run_pages - first, offset)
            if done < 0 and errno == EINTR:
                continue
            if done <= 0:
                return raise_oserror(errno if done < 0 else ENOSPC, b"spool file")
            offset += <uint64_t>done
            self.spooled_bytes += <uint64_t>done
            first += iovec_skip(&self.parts[first], self.run_pages - first, <size_t>done)
        self.run_pages = 0
        return 0

    cdef int put_data(self, uint64_t page, uint64_t pages) except -1 nogil:
        cdef uint64_t part
        cdef int err
        while pages:
            self.reserve()
            part = min(pages, lane_pages(self.pool.pool, &self.lane))
            err = pread_all(self.file_fd, self.lane.data + self.lane.used, part * PAGE_BYTES,
                            page * PAGE_BYTES)
            if err:
                return raise_oserror(err if err > 0 else ENOSPC, b"spool file")
            lane_entry(&self.lane, page, part, SNAP_DATA)
            self.lane.used += part * PAGE_BYTES
            page += part
            pages -= part
        return 0

    def put_all(self):
        """Queue every page once: as data, as zero, or as a hole if it never arrived."""
        cdef uint64_t page = 0
        cdef uint64_t pages = 0
        cdef int kind
        with nogil:
            while page < self.total_pages:
                Intake.before_refill(self)
                with gil:
                    PyErr_CheckSignals()
                kind = self.run_at(page, self.total_pages, &pages)
                if kind == SNAP_DATA:
                    pages = min(pages, <uint64_t>16384)  # check for errors and signals regularly
                    self.put_data(page, pages)
                else:
                    self.put_blank(page, pages, kind)
                page += pages


cdef class CountingSpool(Spool):
    """A spool that also counts the records of each page."""

    def open_tables(self):
        """Allocate the tables and the counters."""
        Spool.open_tables(self)
        self.counts_arena = Arena(self.total_pages * 2)
        self.counts = <uint16_t *>self.counts_arena.base

    cdef int count(self, uint64_t page) except -1 nogil:
        if self.counts[page] < COUNT_MAX:
            self.counts[page] += 1
        return 0

    cdef int on_page(self, uint64_t page, const char *data) except -1 nogil:
        self.count(page)
        return Spool.on_page(self, page, data)

    cdef int on_zero(self, uint64_t page) except -1 nogil:
        self.count(page)
        return Spool.on_zero(self, page)

    def histogram(self):
        """Return a dict: records per page -> number of such pages, ascending, 0 included.

        Pages with more than 65535 records are counted at 65535.
        """
        cdef uint64_t[::1] view
        cdef uint64_t *slots
        cdef uint64_t page = 0

        table = array("Q", bytes(8 * (COUNT_MAX + 1)))
        view = table
        slots = &view[0]
        with nogil:
            while page < self.total_pages:
                if page & 63 == 0 and self.seen[page >> 6] == 0 and page + 64 <= self.total_pages:
                    slots[0] += 64
                    page += 64
                    continue
                slots[self.counts[page]] += 1
                page += 1
        return {times: pages for times, pages in enumerate(table) if pages}

"""Drives the pool as capture threads and encoders do, for tests/test_pool.py."""

from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free

from snapengine.base.checksum cimport crc32c
from snapengine.image.format cimport SNAP_DATA, snap_entry_kind, snap_entry_page, snap_entry_pages
from snapengine.pipeline.pool cimport (
    NO_SLOT, Pool, chunk_ref, lane_close, lane_entry, lane_open, lane_room, lane_slot, pool_finish, pool_fail,
    pool_give_back, pool_read_back, pool_take, slot_data, slot_entries,
)

cdef enum:
    LANES = 8
    PAGE = 4096


cdef void fill(char *data, uint64_t page) noexcept nogil:
    """Every word of a page tells its number, so that a mixed-up or torn page shows."""
    cdef uint64_t *words = <uint64_t *>data
    cdef int i
    for i in range(PAGE // 8):
        words[i] = (page << 12 | <uint64_t>i) + 1


cdef bint is_filled(const char *data, uint64_t page) noexcept nogil:
    cdef const uint64_t *words = <const uint64_t *>data
    cdef int i
    for i in range(PAGE // 8):
        if words[i] != (page << 12 | <uint64_t>i) + 1:
            return False
    return True


cdef class Driver:
    """One pool and the lanes of its capture threads. Every call may come from a thread of its own."""

    cdef readonly Pool pool
    cdef lane_slot *lanes
    cdef readonly int summed            # taken chunks that had a checksum, and a correct one

    def __cinit__(self, Pool pool not None):
        cdef int i
        self.pool = pool
        self.lanes = <lane_slot *>calloc(LANES, sizeof(lane_slot))
        for i in range(LANES):
            self.lanes[i].slot = NO_SLOT

    def __dealloc__(self):
        free(self.lanes)

    @property
    def spill_fd(self):
        return self.pool.pool.spill_fd

    @property
    def free_slots(self):
        return self.pool.pool.n_free

    @property
    def reserve(self):
        return self.pool.pool.reserve

    @property
    def waiters(self):
        return self.pool.pool.waiters

    @property
    def slot_pages(self):
        return self.pool.pool.slot_bytes // PAGE

    @property
    def queued(self):
        """Chunks that nobody has taken yet."""
        return self.pool.pool.tail - self.pool.pool.head

    def open(self, int lane):
        cdef int err
        with nogil:
            err = lane_open(self.pool.pool, &self.lanes[lane])
        return err

    def sum_up(self, int lane):
        """From now on this lane's chunks have checksums. If one begins with an odd page, `save` sums that."""
        self.lanes[lane].computes_crc = True

    def room(self, int lane, uint64_t pages, bint wait):
        cdef int err
        with nogil:
            err = lane_room(self.pool.pool, &self.lanes[lane], pages, wait)
        return err

    def save(self, int lane, uint64_t first, uint64_t pages, bint wait):
        """Save data pages one by one, as a capture thread does. 0 or the first errno."""
        cdef lane_slot *slot = &self.lanes[lane]
        cdef uint64_t page
        cdef int err = 0
        with nogil:
            for page in range(first, first + pages):
                err = lane_room(self.pool.pool, slot, 1, wait)
                if err:
                    break
                fill(slot.data + slot.used, page)
                if slot.computes_crc and slot.crc_bytes == slot.used and page & 1:
                    slot.crc = crc32c(slot.crc, slot.data + slot.used, PAGE)
                    slot.crc_bytes += PAGE
                slot.used += PAGE
                lane_entry(slot, page, 1, SNAP_DATA)
        return err

    def entry(self, int lane, uint64_t page, uint64_t pages, unsigned kind):
        lane_entry(&self.lanes[lane], page, pages, kind)

    def entries(self, int lane):
        """(page, pages, kind) of the open slot's page map."""
        cdef lane_slot *slot = &self.lanes[lane]
        found = [slot.entries[i] for i in range(slot.n_entries)]
        return [(snap_entry_page(e), snap_entry_pages(e), snap_entry_kind(e)) for e in found]

    def close(self, int lane):
        cdef int err
        with nogil:
            err = lane_close(self.pool.pool, &self.lanes[lane])
        return err

    def end(self):
        with nogil:
            pool_finish(self.pool.pool)

    def fail(self):
        with nogil:
            pool_fail(self.pool.pool)

    def take(self, bint give_back=True):
        """The next chunk, checked: (status, ticket, spilled, data pages). Raises OSError where it cannot be
        read back, ValueError where its pages do not hold what was saved."""
        cdef chunk_ref chunk
        cdef uint64_t ticket = 0
        cdef uint64_t i, page, done = 0
        cdef int status, err = 0
        cdef char *data
        cdef uint64_t *entries
        cdef char *scratch = NULL
        with nogil:
            status = pool_take(self.pool.pool, &chunk, &ticket)
        if status <= 0:
            return status, 0, False, []
        if chunk.slot == NO_SLOT:
            scratch = <char *>calloc(1, self.pool.pool.stride)
            data = scratch
            entries = <uint64_t *>(scratch + self.pool.pool.slot_bytes)
            with nogil:
                err = pool_read_back(self.pool.pool, &chunk, data, entries)
        else:
            data = slot_data(self.pool.pool, chunk.slot)
            entries = slot_entries(self.pool.pool, chunk.slot)
        pages = []
        if not err:
            for i in range(chunk.n_entries):
                for page in range(snap_entry_page(entries[i]),
                                  snap_entry_page(entries[i]) + snap_entry_pages(entries[i])):
                    if snap_entry_kind(entries[i]) == SNAP_DATA:
                        if not is_filled(data + done, page):
                            err = -1
                        done += PAGE
                        pages.append(page)
            if done != chunk.data_bytes or (chunk.has_crc and crc32c(0, data, done) != chunk.crc):
                err = -1
            self.summed += chunk.has_crc
        free(scratch)
        if chunk.slot != NO_SLOT and give_back:
            with nogil:
                pool_give_back(self.pool.pool, chunk.slot)
        if err == -1:
            raise ValueError(f"chunk {ticket}: wrong content")
        if err:
            raise OSError(err, f"chunk {ticket}")
        return status, ticket, chunk.slot == NO_SLOT, pages

"""Sending the pages of an image as records of a migration stream. writev reads them from the decode buffer.

One thread per object. It waits for the reader of the stream without a timeout. Python signal handlers run
during the wait, and an exception from one ends it.
"""

from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EAGAIN, EINTR, errno
from libc.string cimport memcpy
from posix.uio cimport writev

from snapengine.image.format cimport SNAP_PAGE_BYTES, SNAP_ZERO
from snapengine.qemu.migration cimport RAM_CONTINUE, RAM_PAGE, RAM_ZERO, vm_store64
from snapengine.base.iovec cimport iovec_skip
from snapengine.base.oserror cimport raise_oserror
from snapengine.base.poll cimport POLLOUT, poll, pollfd
from snapengine.image.runs cimport run_t

cdef char[1] ZERO_BYTE = [0]


cdef class PageSender(Restorer):
    """Sends one RAM block. Construct it as a `Restorer` of whole pages; call `open`, then both `send_*`."""

    def open(self, int out, bytes name not None):
        """Set the descriptor `out` and the block's `name` (UTF-8, at most 255 bytes)."""
        if len(name) > 255 or self.low % SNAP_PAGE_BYTES or self.high % SNAP_PAGE_BYTES:
            raise ValueError(f"block {name!r}: not whole pages, or a name of more than 255 bytes")
        self.out = out
        self.first_page = self.low // SNAP_PAGE_BYTES
        self.block_name = name

    def send_data(self):
        """Send all data pages. Raises errors of the image and of the descriptor."""
        self._run(0, -1, 0, 0, self.jobs)

    def send_zeros(self, bint holes):
        """Send a record of 9 bytes for each zero page, and with `holes` also for each hole."""
        cdef size_t i
        cdef uint64_t page
        cdef const run_t *run
        with nogil:
            for i in range(self.zero_runs.count):
                run = &self.zero_runs.runs[i]
                if not holes and run.kind != SNAP_ZERO:
                    continue
                for page in range(run.page, run.page + run.pages):
                    self.add(page, ZERO_BYTE, 1, RAM_ZERO)
                    self.zero_pages += 1
            self.flush()

    cdef int write_out(self, size_t first, size_t number, const char *payload, uint64_t done, uint64_t count,
                       const destination_t *into) except -1 nogil:
        cdef size_t i
        cdef uint64_t page
        cdef const char *data
        cdef const run_t *run
        for i in range(first, self.starts[number + 1]):     # no destination: always a whole payload
            run = &self.data_runs.runs[i]
            data = payload + <size_t>run.data_page * SNAP_PAGE_BYTES
            for page in range(run.page, run.page + run.pages):
                self.add(page, data, SNAP_PAGE_BYTES, RAM_PAGE)
                data += SNAP_PAGE_BYTES
                self.data_pages += 1
        return self.flush()  # the payload is freed after this call

    cdef int add(self, uint64_t page, const char *data, size_t length, uint64_t flag) except -1 nogil:
        cdef iovec *part
        cdef uint64_t word = (page - self.first_page) * SNAP_PAGE_BYTES | flag
        cdef size_t n
        if self.queued == BATCH:
            self.flush()
        part = &self.parts[2 * self.queued]
        if self.named:
            vm_store64(self.heads[self.queued], word | RAM_CONTINUE)
            part[0].iov_base = self.heads[self.queued]
            part[0].iov_len = 8
        else:
            with gil:
                n = len(self.block_name)
                memcpy(self.first_head + 9, <const char *>self.block_name, n)
            vm_store64(self.first_head, word)
            self.first_head[8] = <char>n
            part[0].iov_base = self.first_head
            part[0].iov_len = 9 + n
            self.named = True
        part[1].iov_base = <void *>data
        part[1].iov_len = length
        self.queued += 1
        return 0

    cdef int flush(self) except -1 nogil:
        """Write the queued records."""
        cdef iovec *part = self.parts
        cdef int left = 2 * self.queued
        cdef int used
        cdef ssize_t done
        while left:
            done = writev(self.out, part, left)
            if done < 0:
                self.write_failed(errno)
                continue
            self.sent_bytes += <uint64_t>done
            used = iovec_skip(part, left, <size_t>done)
            part += used
            left -= used
        self.queued = 0
        return 0

    cdef int write_failed(self, int err) except -1 with gil:
        """Return if the write should be retried, after a wait for a non-blocking descriptor; else raise."""
        cdef pollfd entry
        PyErr_CheckSignals()
        if err == EAGAIN:
            entry.fd = self.out
            entry.events = <short>POLLOUT
            entry.revents = 0
            with nogil:
                poll(&entry, 1, 50)
        elif err != EINTR:
            raise_oserror(err, b"write to the reader of the stream")
        return 0

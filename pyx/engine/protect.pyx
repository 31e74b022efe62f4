"""Write-protecting a range while the target runs: in parts, past unmapped parts, and during a fork."""

from libc.errno cimport EAGAIN, ENOENT

from snapengine.base.atomics cimport snap_load
from snapengine.engine.events cimport drain_events
from snapengine.engine.fault_threads cimport serve_deferred
from snapengine.engine.state cimport capture_fail
from snapengine.kernel.uffd cimport protect_mapped, uffd_protect


cdef int protect_range(capture_t *capture, lane_t *lane, uint64_t addr, uint64_t length) noexcept nogil:
    cdef uint64_t piece = capture.arm_piece if capture.arm_piece else length
    cdef uint64_t end = addr + length
    cdef int err
    while addr < end:
        err = uffd_protect(capture.uffds[0], addr, min(piece, end - addr))
        if err == ENOENT and capture.attached:
            err = protect_mapped(capture.uffds[0], capture.maps, &capture.failed, addr,
                                 min(piece, end - addr))
        if err == EAGAIN:
            # The target forks: the event must be read before the kernel protects anything. Faults that are
            # read along with it are deferred until T. During pre-arming they are recorded and released at
            # once, since T may wait until their writers pause.
            if snap_load(&capture.failed):
                return err
            drain_events(capture, lane)
            serve_deferred(capture, lane)
            continue
        if err:
            capture_fail(capture, err, "UFFDIO_WRITEPROTECT", addr)
            return err
        addr += piece
    return 0

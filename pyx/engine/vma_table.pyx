"""The mappings of an attached target at T, in order: /proc/PID/maps parsed without the GIL or an allocation.

Used only on kernels without PROCMAP_QUERY. The first walker writes the table right after T; all walkers read
it in the scans that follow. Source: proc_pid_maps(5).
"""

from libc.errno cimport E2BIG, EINTR, EIO, ENOENT, errno
from libc.string cimport memchr, memmove
from posix.unistd cimport pread

from snapengine.kernel.procmaps_line cimport maps_file_t, maps_line_t, parse_file, parse_range
from snapengine.kernel.procmap_query cimport next_vma

cdef enum:
    TEXT_BYTES = 32768              # a line has a path of up to 4096 bytes, each shown as up to 4 characters


cdef bint _parse(const char *text, const char *end, vma_t *vma) noexcept nogil:
    """False if the line is incomplete."""
    cdef maps_line_t line
    cdef maps_file_t file
    if not parse_range(text, end, &line) or not parse_file(&line, &file):
        return False
    vma.start, vma.end, vma.offset = line.start, line.end, line.offset
    vma.flags = 0                   # not used in the table
    vma.device, vma.inode = file.device, file.inode
    return True


cdef int _take_lines(capture_t *capture, const char *text, uint64_t length, uint64_t *used) noexcept nogil:
    """Parse the complete lines of a chunk. A mapping that has grown between two reads appears in both chunks:
    the part that is in the table already is cut off."""
    cdef const char *line = text
    cdef const char *end
    cdef vma_t vma
    while True:
        end = <const char *>memchr(line, c"\n", text + length - line)
        if end == NULL:
            used[0] = line - text
            return 0
        if not _parse(line, end, &vma):
            return EIO
        line = end + 1
        if capture.vma_table.n and vma.start < capture.vma_table.vmas[capture.vma_table.n - 1].end:
            vma.offset += capture.vma_table.vmas[capture.vma_table.n - 1].end - vma.start
            vma.start = capture.vma_table.vmas[capture.vma_table.n - 1].end
        if vma.start >= vma.end:
            continue
        if capture.vma_table.n == capture.vma_table.room:
            return E2BIG
        capture.vma_table.vmas[capture.vma_table.n] = vma
        capture.vma_table.n += 1


cdef int note_vmas(capture_t *capture) noexcept nogil:
    cdef char text[TEXT_BYTES]
    cdef uint64_t have = 0
    cdef uint64_t used
    cdef long offset = 0
    cdef ssize_t got
    cdef int err
    capture.vma_table.n = 0
    while capture.vma_table.vmas != NULL:
        got = pread(capture.maps, text + have, TEXT_BYTES - have, offset)
        if got < 0 and errno == EINTR:
            continue
        if got <= 0:
            return errno if got < 0 else 0
        offset += got
        have += got
        err = _take_lines(capture, text, have, &used)
        if err:
            return err
        have -= used
        memmove(text, text + used, have)
    return 0


cdef int vma_at(capture_t *capture, uint64_t addr, vma_t *found) noexcept nogil:
    cdef uint64_t low = 0
    cdef uint64_t high = capture.vma_table.n
    cdef uint64_t middle
    if capture.vma_table.vmas == NULL:
        return next_vma(capture.maps, addr, found)
    while low < high:
        middle = (low + high) // 2
        if capture.vma_table.vmas[middle].end <= addr:
            low = middle + 1
        else:
            high = middle
    if low == capture.vma_table.n:
        return ENOENT
    found[0] = capture.vma_table.vmas[low]
    return 0

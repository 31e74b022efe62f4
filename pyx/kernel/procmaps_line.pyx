"""The parser of the lines of /proc/PID/maps (proc_pid_maps(5)), which `snapengine.kernel.procmaps` reads.

Compiled, because a process may have 65 000 mappings: 0.1 µs a line instead of 3. Adjacent mappings often have
the same permissions and file. Where these bytes equal those of the line before, the `Mapping` reuses the
Python objects of its predecessor.
"""

cimport cython
from libc.stdint cimport uint64_t
from libc.string cimport memchr, memcmp

from snapengine.base.names import decode


@cython.dataclasses.dataclass(frozen=True)
cdef class Mapping:
    """One line of /proc/PID/maps; ``start`` and ``end`` are byte addresses."""

    start: uint64_t
    end: uint64_t
    perms: str
    offset: uint64_t
    device: str
    inode: uint64_t
    path: str

    @property
    def shared(self):
        """A MAP_SHARED mapping: other mappings of the same memory may exist."""
        return self.perms[3] == "s"

    @property
    def has_file(self):
        """Whether it maps a file, possibly a kernel-internal one. (System V memory may have inode 0.)"""
        return self.inode != 0 or self.device != "00:00"

    @property
    def backing(self):
        """What its name suggests, for messages: anonymous memory, a memory file (memfd, /dev/shm), or a file.
        `snapengine.kernel.backing` asks the kernel instead."""
        if not self.shared and (not self.path or self.path.startswith("[")):
            return "anonymous"
        if self.path.startswith(("/memfd:", "/dev/shm/", "/dev/zero", "/SYSV", "/anon_hugepage", "[anon_")):
            return "memory file"
        return "file"

    def same_file(self, Mapping other not None):
        """Whether both are shared mappings of one file. Where their file ranges overlap, they share pages."""
        mine, its = (self.device, self.inode), (other.device, other.inode)
        return self.shared and other.shared and self.has_file and mine == its

    def __str__(self):
        kind = "shared" if self.shared else "private"
        name = f" {self.path}" if self.path else ""
        return f"{self.start:#x}-{self.end:#x} ({kind}, {self.backing}{name})"


cdef uint64_t _take_number(const char **at, const char *end, uint64_t base) noexcept nogil:
    """Digits up to the next other character, and past that."""
    cdef uint64_t value = 0
    cdef char c
    while at[0] < end:
        c = at[0][0]
        at[0] += 1
        if c >= c"0" and c <= c"9":
            value = value * base + <uint64_t>(c - c"0")
        elif base == 16 and c >= c"a" and c <= c"f":
            value = value * base + <uint64_t>(c - c"a" + 10)
        else:
            break
    return value


cdef bint _same(const char *one, const char *one_end, const char *other, const char *other_end) noexcept:
    return one_end - one == other_end - other and memcmp(one, other, one_end - one) == 0


cdef bint parse_range(const char *at, const char *line_end, maps_line_t *line) noexcept nogil:
    line.line_end = line_end
    line.start = _take_number(&at, line_end, 16)
    line.end = _take_number(&at, line_end, 16)
    if line_end - at < 5:
        return False
    line.perms = at
    at += 5                         # "rwxp "
    line.offset = _take_number(&at, line_end, 16)
    line.file = at
    return True


cdef bint parse_file(const maps_line_t *line, maps_file_t *found) noexcept nogil:
    cdef const char *at = line.file
    found.device_end = <const char *>memchr(at, c" ", line.line_end - at)
    if found.device_end == NULL:
        return False
    found.device = _take_number(&at, found.device_end, 16) << 32
    found.device |= _take_number(&at, found.device_end, 16)
    at = found.device_end + 1
    found.inode = _take_number(&at, line.line_end, 10)
    while at < line.line_end and at[0] == c" ":
        at += 1
    found.path = at
    return True


cdef Mapping _parse(const char *at, const char *end, maps_line_t *line, const maps_line_t *before,
                    Mapping last):
    """The line from `at` to `end`. `last` is the mapping of the line `before`, or None."""
    cdef Mapping found = Mapping.__new__(Mapping)
    cdef maps_file_t file
    if not parse_range(at, end, line):
        raise ValueError("a line of /proc/PID/maps is cut")
    found.start, found.end, found.offset = line.start, line.end, line.offset
    if last is not None and memcmp(line.perms, before.perms, 4) == 0:
        found.perms = last.perms
    else:
        found.perms = line.perms[:4].decode("ascii")
    if last is not None and _same(line.file, line.line_end, before.file, before.line_end):
        found.device, found.inode, found.path = last.device, last.inode, last.path
        return found
    if not parse_file(line, &file):
        raise ValueError("a line of /proc/PID/maps is cut")
    found.device = line.file[:file.device_end - line.file].decode("ascii")
    found.inode = file.inode
    found.path = decode(file.path[:end - file.path]) if file.path < end else ""
    return found


def parse_line(bytes line not None):
    """One line, without its line feed. Every byte of the name is kept, spaces too."""
    cdef const char *at = line
    cdef maps_line_t parts
    return _parse(at, at + len(line), &parts, NULL, None)


def parse_maps(bytes text not None, start=0, end=1 << 64):
    """The mappings that overlap [start, end), by address."""
    cdef const char *at = text
    cdef const char *text_end = at + len(text)
    cdef uint64_t low = max(start, 0)
    cdef uint64_t high = min(end, (1 << 64) - 1)
    cdef const char *line_end
    cdef maps_line_t line, before
    cdef Mapping found
    cdef Mapping last = None
    cdef list mappings = []
    while at < text_end:
        # Only a line feed ends a line: the kernel leaves a carriage return in a name as it is.
        line_end = <const char *>memchr(at, c"\n", text_end - at)
        if line_end == NULL:
            line_end = text_end
        found = _parse(at, line_end, &line, &before, last)
        if found.start >= high:
            break
        if found.end > low:
            mappings.append(found)
        at = line_end + 1
        before = line
        last = found
    return without_overlaps(mappings)


cdef Mapping _rest(Mapping mapping, uint64_t start):
    """The part of a mapping from `start` on."""
    cdef bint moves = mapping.has_file
    cdef uint64_t offset = mapping.offset + start - mapping.start if moves else mapping.offset
    return Mapping(start, mapping.end, mapping.perms, offset, mapping.device, mapping.inode, mapping.path)


def without_overlaps(list mappings not None):
    """The mappings without what an earlier one already holds.

    The kernel returns the list in pieces of a page. A mapping that grew or was merged between two pieces is
    in both, with the same start: of the second only the part behind the first is kept."""
    cdef Mapping mapping
    cdef uint64_t known = 0
    cdef list found = []
    for mapping in mappings:
        if mapping.end <= known:
            continue
        found.append(mapping if mapping.start >= known else _rest(mapping, known))
        known = mapping.end
    return found

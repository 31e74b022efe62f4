"""The lines of /proc/PID/maps (proc_pid_maps(5)), taken apart. See `snapengine.kernel.procmaps`, which reads
them.

Compiled, because a process may have 65 000 of them: 0.1 µs a line instead of 3. Neighbours are mostly of one
kind, so a line takes over the texts of the one before where its bytes are the same.
"""

cimport cython
from libc.stdint cimport uint64_t
from libc.string cimport memchr, memcmp

from snapengine.base.names import decode

cdef struct line_t:                 # parts of one line, in the text
    const char *perms               # four letters
    const char *device              # from here on, with inode and name
    const char *end


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
        """Whether a file is behind it, be it only the kernel's own. (The inode may be 0: System V memory.)"""
        return self.inode != 0 or self.device != "00:00"

    @property
    def backing(self):
        """What its name says of it, for messages: nothing but this mapping holds the pages, a memory file
        (memfd, /dev/shm), or a file. (`snapengine.kernel.backing` knows.)"""
        if not self.shared and (not self.path or self.path.startswith("[")):
            return "anonymous"
        if self.path.startswith(("/memfd:", "/dev/shm/", "/dev/zero", "/SYSV", "/anon_hugepage", "[anon_")):
            return "memory file"
        return "file"

    def same_file(self, Mapping other not None):
        """Whether both are shared mappings of one file: where their ranges overlap, of the same pages."""
        mine, its = (self.device, self.inode), (other.device, other.inode)
        return self.shared and other.shared and self.has_file and mine == its

    def __str__(self):
        kind = "shared" if self.shared else "private"
        name = f" {self.path}" if self.path else ""
        return f"{self.start:#x}-{self.end:#x} ({kind}, {self.backing}{name})"


cdef uint64_t take_number(const char **at, const char *end, uint64_t base) noexcept nogil:
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


cdef Mapping _parse(const char *at, line_t *line, const line_t *before, Mapping last):
    """The line from `at` to `line.end`. `last` is what the line `before` held, or None."""
    cdef Mapping found = Mapping.__new__(Mapping)
    cdef const char *inode
    found.start = take_number(&at, line.end, 16)
    found.end = take_number(&at, line.end, 16)
    if line.end - at < 5:
        raise ValueError("a line of /proc/PID/maps is cut")
    line.perms = at
    at += 5
    found.offset = take_number(&at, line.end, 16)
    line.device = at
    if last is not None and memcmp(line.perms, before.perms, 4) == 0:
        found.perms = last.perms
    else:
        found.perms = line.perms[:4].decode("ascii")
    if last is not None and _same(line.device, line.end, before.device, before.end):
        found.device, found.inode, found.path = last.device, last.inode, last.path
        return found
    inode = <const char *>memchr(at, c" ", line.end - at)
    if inode == NULL:
        raise ValueError("a line of /proc/PID/maps is cut")
    found.device = at[:inode - at].decode("ascii")
    at = inode + 1
    found.inode = take_number(&at, line.end, 10)
    while at < line.end and at[0] == c" ":
        at += 1
    found.path = decode(at[:line.end - at]) if at < line.end else ""
    return found


def parse_line(bytes line not None):
    """One line, without its line feed. Of the name every byte counts, spaces too."""
    cdef const char *at = line
    cdef line_t parts
    parts.end = at + len(line)
    return _parse(at, &parts, NULL, None)


def parse_maps(bytes text not None, start=0, end=1 << 64):
    """The mappings that overlap [start, end), by address."""
    cdef const char *at = text
    cdef const char *text_end = at + len(text)
    cdef uint64_t low = max(start, 0)
    cdef uint64_t high = min(end, (1 << 64) - 1)
    cdef line_t line, before
    cdef Mapping found
    cdef Mapping last = None
    cdef list mappings = []
    while at < text_end:
        # Only a line feed ends a line: the kernel leaves a carriage return in a name as it is.
        line.end = <const char *>memchr(at, c"\n", text_end - at)
        if line.end == NULL:
            line.end = text_end
        found = _parse(at, &line, &before, last)
        if found.start >= high:
            break
        if found.end > low:
            mappings.append(found)
        at = line.end + 1
        before = line
        last = found
    return without_overlaps(mappings)


cdef Mapping _rest(Mapping mapping, uint64_t start):
    """The part of a mapping from `start` on."""
    cdef bint moves = mapping.has_file
    cdef uint64_t offset = mapping.offset + start - mapping.start if moves else mapping.offset
    return Mapping(start, mapping.end, mapping.perms, offset, mapping.device, mapping.inode, mapping.path)


def without_overlaps(list mappings not None):
    """The kernel gives the list in pieces of a page. A mapping that has grown or was merged between two of
    them is in both, from its begin: of the second only what the first has not."""
    cdef Mapping mapping
    cdef uint64_t known = 0
    cdef list found = []
    for mapping in mappings:
        if mapping.end <= known:
            continue
        found.append(mapping if mapping.start >= known else _rest(mapping, known))
        known = mapping.end
    return found

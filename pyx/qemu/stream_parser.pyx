"""Parser of QEMU's migration stream: head, pages and tail, in one pass and in bounded memory.

    header │ configuration │ START ram │ PART ram … [END ram] │ device state, EOF, description
    └────────────── head ────────────┘ └─────── pages ──────┘ └──────────── tail ────────────┘

Head and tail are kept byte for byte; a subclass processes the pages. Unknown elements are rejected with their
name and offset, because a wrong guess would corrupt the machine's memory. Sizes in the stream are untrusted:
the buffer is fixed, head and tail are bounded. One thread at a time may use a parser. It owns the buffer, but
not `fd`.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcmp, memcpy, memmove
from posix.unistd cimport read

from snapengine.base.atomics cimport snap_load, snap_store
from snapengine.qemu.migration cimport (
    RAM_COMPRESS_PAGE, RAM_CONTINUE, RAM_EOS, RAM_HOOK, RAM_MEM_SIZE, RAM_MULTIFD_FLUSH, RAM_PAGE,
    RAM_XBZRLE, RAM_ZERO, VM_CMD_SWITCHOVER_START, VM_COMMAND, VM_CONFIGURATION, VM_END, VM_EOF, VM_FOOTER,
    VM_FULL, VM_MAGIC, VM_PART, VM_RAM_VERSION, VM_START, VM_SUBSECTION, VM_VERSION, vm_load64,
)
from snapengine.base.oserror cimport raise_oserror

from snapengine.errors import CaptureCancelled, StreamError
from snapengine.base.poll cimport POLLIN, poll, pollfd
from snapengine.qemu.libvirt_save import HEADER_BYTES, parse_header
from snapengine.qemu.other_files import identify

HEAD_MAX_BYTES = BUFFER_BYTES
TAIL_MAX_BYTES = 256 << 20
RAM_MAX_BYTES = 1 << 44
"""16 TiB: bounds the size of the tables that a stream can make its reader allocate."""

cdef enum:
    PAGE_BYTES = 4096
    POLL_MS = 50             # longest wait between two checks of `cancelled`
    NAME_MAX = 255

    NEW = 0
    IN_PAGES = 1
    IN_TAIL = 2
    DONE = 3

_SECTION_NAMES = {VM_EOF: "EOF", VM_START: "START", VM_PART: "PART", VM_END: "END", VM_FULL: "FULL",
                  VM_SUBSECTION: "SUBSECTION", VM_CONFIGURATION: "CONFIGURATION", VM_COMMAND: "COMMAND"}
_COMMANDS = {1: "OPEN_RETURN_PATH", 2: "PING", 3: "POSTCOPY_ADVISE", 4: "POSTCOPY_LISTEN", 5: "POSTCOPY_RUN",
             6: "POSTCOPY_RAM_DISCARD"}
_FLAGS = {RAM_XBZRLE: "xbzrle pages", RAM_HOOK: "an RDMA hook", RAM_COMPRESS_PAGE: "compressed pages",
          RAM_MULTIFD_FLUSH: "multifd pages, which are in other streams"}


cdef class StreamParser:
    """A parser of the stream from `source`: a readable descriptor, or a bytes object of at most 1 MiB.

    Call `read_head`, `read_pages` and `read_tail`, in this order. They raise `StreamError` (with the offset)
    if the stream is truncated, damaged or uses an unsupported feature, ``OSError`` if it cannot be read, and
    `CaptureCancelled` after `cancel`. This class counts pages and discards them.
    """

    def __cinit__(self, source, *args, name="stream", **kwargs):
        cdef const unsigned char[::1] data
        self.fd = -1 if isinstance(source, bytes) else source
        self.name = name
        self.head_bytes = bytearray()
        self.buffer = <char *>malloc(BUFFER_BYTES)
        if self.buffer == NULL:
            raise MemoryError
        if self.fd < 0:
            data = source
            if data.shape[0] > BUFFER_BYTES:
                raise ValueError(f"{len(source)} bytes are more than {BUFFER_BYTES}: give a descriptor")
            if data.shape[0]:
                memcpy(self.buffer, &data[0], data.shape[0])
            self.end = data.shape[0]
            self.ended = True

    def __dealloc__(self):
        free(self.buffer)
        free(self.blocks)

    def cancel(self):
        """Make a waiting or running read raise within 50 ms. Any thread may call it."""
        snap_store(&self.cancelled, 1)

    @property
    def ram_blocks(self):
        """The RAM blocks in the head: a list of (name, bytes in use)."""
        cdef size_t i
        return [
            (self.blocks[i].name[:self.blocks[i].name_bytes].decode(), self.blocks[i].pages * PAGE_BYTES)
            for i in range(self.n_blocks)
        ]

    # -- bytes --

    cdef int need(self, size_t count) except -1 nogil:
        if self.end - self.begin >= count:
            return 0
        self.before_refill()
        if self.begin:
            memmove(self.buffer, self.buffer + self.begin, self.end - self.begin)
            self.end -= self.begin
            self.begin = 0
        while self.end < count:
            if self.ended:
                return self.truncated()
            self.read_some()
        return 0

    cdef int read_some(self) except -1 nogil:
        """Wait for data, and append what is available to the buffer."""
        cdef pollfd entry
        cdef ssize_t got
        entry.fd = self.fd
        entry.events = <short>POLLIN
        while True:
            with gil:
                PyErr_CheckSignals()
                if snap_load(&self.cancelled):
                    raise CaptureCancelled(f"{self.name}: cancelled")
            entry.revents = 0
            if poll(&entry, 1, POLL_MS) <= 0:
                continue
            got = read(self.fd, self.buffer + self.end, BUFFER_BYTES - self.end)
            if got < 0 and (errno == EINTR or errno == EAGAIN):
                continue
            if got < 0:
                return raise_oserror(errno, b"read")
            self.ended = got == 0
            self.end += <size_t>got
            return 0

    cdef int refuse(self, const char *what, uint64_t offset) except -1 with gil:
        raise StreamError(f"{self.name}: {what.decode()}", offset)

    cdef int truncated(self) except -1 with gil:
        raise StreamError(f"{self.name}: the stream ends early", self.offset + (self.end - self.begin))

    cdef int bad_flags(self, uint64_t word, uint64_t offset) except -1 with gil:
        cdef uint64_t flags = word & (PAGE_BYTES - 1)
        found = [text for flag, text in _FLAGS.items() if flags & flag]
        what = ", ".join(found) if found else f"a record with unknown flags {flags:#x}"
        raise StreamError(f"{self.name}: section 'ram' holds {what}", offset)

    cdef bytes take(self, size_t count):
        """Return the next bytes, and add them to the head while it is read. Cold code, for few bytes."""
        if self.end - self.begin < count:
            with nogil:
                self.need(count)
        data = PyBytes_FromStringAndSize(self.buffer + self.begin, count)
        self.begin += count
        self.offset += count
        if self.state == NEW:
            self.head_bytes += data
            if len(self.head_bytes) > HEAD_MAX_BYTES:
                self.refuse(b"the head is longer than 1 MiB", self.offset)
        return data

    def _u8(self):
        return self.take(1)[0]

    def _u32(self):
        return int.from_bytes(self.take(4), "big")

    def _u64(self):
        return int.from_bytes(self.take(8), "big")

    def _text(self, length, what):
        start = self.offset
        text = self.take(length).decode(errors="surrogateescape")
        if not text.isprintable():  # a lone surrogate is not printable either
            raise StreamError(f"{self.name}: {what} is not text", start)
        return text

    def _peek(self):
        if self.end == self.begin:
            with nogil:
                self.need(1)
        return <unsigned char>self.buffer[self.begin]

    # -- the head --

    def read_head(self):
        """Parse everything up to the START section of the RAM, inclusive. Sets `head` and its fields."""
        self._expect(NEW)
        magic = self.take(4)
        if magic == b"Libv":
            self._libvirt_header(magic)
            magic = self.take(4)
        if magic != VM_MAGIC.to_bytes(4, "big"):
            kind = identify(magic)
            text = f"{self.name}: not a migration stream of QEMU{kind and ', but '}{kind}"
            raise StreamError(text, self.offset - 4)
        version = self._u32()
        if version != VM_VERSION:
            raise StreamError(f"{self.name}: stream version {version}; this program reads {VM_VERSION}", 4)
        if self._peek() == VM_CONFIGURATION:
            self._configuration()
        while True:
            start = self.offset
            kind = self._u8()
            if kind == VM_COMMAND:
                self._command(start)
            elif kind == VM_START or kind == VM_FULL:
                self._start(kind, start)
                break
            else:
                raise StreamError(f"{self.name}: {self._kind(kind)} in place of the RAM section", start)
        self.head = bytes(self.head_bytes)
        self.head_bytes = bytearray()
        self.state = IN_PAGES

    def _libvirt_header(self, magic):
        """What libvirt puts before the stream is not part of the head."""
        cdef size_t left
        header = magic + self.take(HEADER_BYTES - len(magic))
        try:
            parsed = parse_header(header)
        except ValueError as error:
            raise StreamError(f"{self.name}: {error}", 0) from None
        data = bytearray()
        left = parsed.data_bytes
        while left:
            self.head_bytes = bytearray()
            data += self.take(min(left, <size_t>65536))
            left = parsed.data_bytes - len(data)
        self.head_bytes = bytearray()
        self.domain_xml = parsed.domain_xml(bytes(data))
        self.name += " (a save file of libvirt)"

    def _expect(self, int state):
        if self.state != state:
            raise ValueError("read_head, read_pages and read_tail are called once each, in this order")

    def _kind(self, int kind):
        name = _SECTION_NAMES.get(kind)
        return f"a {name} section" if name else f"an unknown section type {kind:#x}"

    def _configuration(self):
        self._u8()
        start = self.offset
        length = self._u32()
        if not 0 < length <= NAME_MAX:
            raise StreamError(f"{self.name}: a machine type with a name of {length} bytes", start)
        self.machine_type = self._text(length, "the machine type's name")
        while self._peek() == VM_SUBSECTION:
            start = self.offset
            self._u8()
            subsection = self._text(self._u8(), "a subsection's name")
            version = self._u32()
            if version != 1:
                raise StreamError(f"{self.name}: section {subsection!r} of version {version}", start)
            self._subsection(subsection, start)

    def _subsection(self, subsection, start):
        if subsection == "configuration/target-page-bits":
            bits = self._u32()
            if bits != 12:
                raise StreamError(f"{self.name}: section {subsection!r}: pages of 2^{bits} bytes", start)
        elif subsection == "configuration/capabilities":
            # The list has only capabilities that change the format; this parser supports none of them.
            count = self._u32()
            names = [self._text(self._u8(), "a capability's name") for _ in range(min(count, 16))]
            if names:
                raise StreamError(f"{self.name}: section {subsection!r} has {', '.join(names)}", start)
        elif subsection == "configuration/uuid":
            self.take(16)
        else:
            raise StreamError(f"{self.name}: unknown section {subsection!r}", start)

    def _command(self, start):
        """Accept SWITCHOVER_START only, which has no effect if RAM is the only iterative section."""
        number = int.from_bytes(self.take(2), "big")
        length = int.from_bytes(self.take(2), "big")
        if number != VM_CMD_SWITCHOVER_START or length:
            name = _COMMANDS.get(number, f"number {number}")
            raise StreamError(f"{self.name}: command {name} is not supported", start)

    def _start(self, kind, start):
        self.section_id = self._u32()
        section = self._text(self._u8(), "a section's name")
        self._u32()
        version = self._u32()
        if section != "ram" or kind != VM_START:
            raise StreamError(f"{self.name}: section {section!r} before the pages of the RAM", start)
        if version != VM_RAM_VERSION:
            raise StreamError(f"{self.name}: section 'ram' of version {version}; this program reads "
                              f"{VM_RAM_VERSION}", start)
        self._blocks()
        self._footer()

    def _blocks(self):
        """Parse the list of RAM blocks. Their sizes must add up to the total, which precedes the list."""
        start = self.offset
        word = self._u64()
        if word % PAGE_BYTES != RAM_MEM_SIZE:
            self.bad_flags(word, start)
        total = word - RAM_MEM_SIZE
        if not 0 < total <= RAM_MAX_BYTES:
            raise StreamError(f"{self.name}: section 'ram' of {total} bytes", start)
        names = set()
        while self.total_pages * PAGE_BYTES < total:
            start = self.offset
            name = self._text(self._u8(), "a RAM block's name")
            length = self._u64()
            left = total - self.total_pages * PAGE_BYTES
            if not name or name in names or length % PAGE_BYTES or not 0 < length <= left:
                raise StreamError(f"{self.name}: section 'ram': block {name!r} with {length} bytes, but "
                                  f"{left} remain", start)
            names.add(name)
            self.add_block(name.encode(), length, start)
        start = self.offset
        word = self._u64()
        if word != RAM_EOS:
            self.bad_flags(word, start)

    cdef int add_block(self, bytes name, uint64_t length, uint64_t offset) except -1:
        cdef block_t *grown
        cdef block_t *block
        if self.n_blocks == BLOCKS_MAX:
            return self.refuse(b"section 'ram': more than 1024 blocks", offset)
        if self.n_blocks % 64 == 0:
            grown = <block_t *>realloc(self.blocks, (self.n_blocks + 64) * sizeof(block_t))
            if grown == NULL:
                raise MemoryError
            self.blocks = grown
        block = &self.blocks[self.n_blocks]
        block.first_page = self.total_pages
        block.pages = length // PAGE_BYTES
        block.name_bytes = <unsigned char>len(name)
        memcpy(block.name, <const char *>name, len(name))
        self.n_blocks += 1
        self.total_pages += block.pages
        return 0

    def _footer(self):
        start = self.offset
        if self._u8() != VM_FOOTER or self._u32() != self.section_id:
            raise StreamError(f"{self.name}: the footer of section 'ram' is missing", start)

    # -- the pages --

    def read_pages(self):
        """Parse all PART and END sections of the RAM, up to the first device section."""
        self._expect(IN_PAGES)
        while True:
            kind = self._peek()
            start = self.offset
            if kind == VM_FULL:
                break
            self._u8()
            if kind == VM_COMMAND:
                self._command(start)
                continue
            if kind != VM_PART and kind != VM_END:
                what = self._kind(kind)
                if kind == VM_START:
                    self._u32()
                    what = f"section {self._text(self._u8(), 'a section name')!r}"
                raise StreamError(f"{self.name}: {what} among the pages of the RAM", start)
            section_id = self._u32()
            if section_id != self.section_id or self.has_end:
                raise StreamError(f"{self.name}: a part of section {section_id}, which is not open", start)
            with nogil:
                self.records()
            self._footer()
            self.has_end = kind == VM_END
        self.before_refill()
        self.state = IN_TAIL

    cdef int records(self) except -1 nogil:
        """Parse the records of one section, up to its EOS."""
        cdef uint64_t word, page
        cdef size_t used
        while True:
            self.need(8)
            word = vm_load64(self.buffer + self.begin)
            if word == RAM_EOS:
                self.begin += 8
                self.offset += 8
                return 0
            if word & (PAGE_BYTES - 1) & ~RAM_CONTINUE != RAM_PAGE \
                    and word & (PAGE_BYTES - 1) & ~RAM_CONTINUE != RAM_ZERO:
                return self.bad_flags(word, self.offset)
            used = 8
            if not word & RAM_CONTINUE:
                self.need(9)
                used = 9 + <unsigned char>self.buffer[self.begin + 8]
                self.need(used)
                self.find_block()
            elif self.current == NULL:
                return self.refuse(b"section 'ram': a page before any block was named", self.offset)
            page = word // PAGE_BYTES
            if page >= self.current.pages:
                return self.refuse(b"section 'ram': a page beyond the end of its block", self.offset)
            page += self.current.first_page
            if word & RAM_PAGE:
                self.need(used + PAGE_BYTES)
                self.on_page(page, self.buffer + self.begin + used)
                self.pages += 1
                used += PAGE_BYTES
            else:
                self.need(used + 1)
                if self.buffer[self.begin + used]:
                    return self.refuse(b"section 'ram': a page of one byte other than zero", self.offset)
                self.on_zero(page)
                self.zeros += 1
                used += 1
            self.begin += used
            self.offset += used

    cdef int find_block(self) except -1 nogil:
        """Set `current` to the block that the record at `begin` names."""
        cdef const char *record = self.buffer + self.begin
        cdef size_t length = <unsigned char>record[8]
        cdef size_t i
        for i in range(self.n_blocks):
            if self.blocks[i].name_bytes == length and memcmp(self.blocks[i].name, record + 9, length) == 0:
                self.current = &self.blocks[i]
                return 0
        return self.refuse(b"section 'ram': a page of a block that is not in its list", self.offset)

    cdef int on_page(self, uint64_t page, const char *data) except -1 nogil:
        return 0

    cdef int on_zero(self, uint64_t page) except -1 nogil:
        return 0

    cdef int before_refill(self) except -1 nogil:
        return 0

    # -- the tail --

    def read_tail(self):
        """Read from the first device section to the end of the stream. Sets `tail`, of at most 256 MiB.

        It is not parsed here; see `snapengine.qemu.tail`.
        """
        self._expect(IN_TAIL)
        data = bytearray()
        while True:
            data += PyBytes_FromStringAndSize(self.buffer + self.begin, self.end - self.begin)
            self.offset += self.end - self.begin
            self.begin = self.end = 0
            if len(data) > TAIL_MAX_BYTES:
                self.refuse(b"the device state is longer than 256 MiB", self.offset)
            if self.ended:
                break
            with nogil:
                self.read_some()
        self.tail = bytes(data)
        self.state = DONE

"""Export of the image of a process as an ELF core. `snapengine.export.elf_notes` packs headers and notes.

Memory is in one of three states in the core:

- *stored*: in a PT_LOAD whose p_filesz is its whole size. Zero pages and holes are holes in the sparse file.
- *blank*: a hole of 64 MiB or more that reads as zeros, such as a reservation. It is in a PT_LOAD with
  p_filesz 0, which debuggers read as zeros. It has no range in the file, which could otherwise exceed the
  size limit of the file system.
- *absent*: in no PT_LOAD. A debugger reads it from the mapped file if NT_FILE names one, and otherwise
  reports that it cannot access the memory. (The kernel writes a PT_LOAD with p_filesz 0, which gdb 13.1 reads
  as zeros unless it finds a file.) NT_FILE names a file only for memory that has the content of the file:
  memory that is stored, memory that the process cannot write, and private pages that were not populated.

```
mapping     r-x libc      rw- libc .data            rw- heap
image                   │▒▒▒▒▒▒▒│  hole │ lost  │▒▒▒▒▒▒▒▒│  hole
core        absent      │stored │absent │absent │stored (sparse)
NT_FILE     libc        │libc   │libc   │       │
```
"""

from __future__ import annotations

import itertools
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from snapengine.base.names import encode
from snapengine.errors import CorruptImageError, ImageError, LostPagesError
from snapengine.export.elf_notes import (
    EHDR,
    PHDR,
    FileRange,
    Load,
    elf_header,
    flags_of,
    notes,
    program_headers,
    section_headers,
)
from snapengine.export.raw import pieces
from snapengine.image.encode import HOLE, LOST
from snapengine.image.restorer import Restorer
from snapengine.image.sections import ImageRegion, page_text
from snapengine.kernel.procmaps import Mapping
from snapengine.process.record import ProcessRecord, process_of
from snapengine.regions import PAGE_BYTES
from snapengine.storage.sink import write_all
from snapengine.storage.sinks import FileSink, Sink, atomic_output

if TYPE_CHECKING:
    from snapengine.image import Image

Lost = Literal["refuse", "omit"]
MAX_FILE_BYTES = (1 << 63) - 1
MAX_FILE_NOTE_BYTES = 256 << 20
LARGE_BYTES = 64 << 20  # smallest hole without a range in the file


@dataclass(frozen=True, slots=True)
class CoreFile:
    """The result of `export_core`. ``file_bytes`` is the length of the sparse file, not its allocation."""

    file_bytes: int
    segments: int
    threads: int
    stored_bytes: int
    absent_bytes: int
    lost_bytes: int
    """Absent bytes that were lost at capture time."""


class Piece(NamedTuple):
    """A part of one mapping. ``position`` is its offset from the start of the memory in the file, if it is
    ``stored`` and not ``blank``.

    ``from_file``: NT_FILE may name the file of the mapping for this part.
    """

    mapping: Mapping
    start: int
    end: int
    stored: bool
    from_file: bool
    position: int
    lost: bool = False
    blank: bool = False


class Span(NamedTuple):
    """A part of a region with a range in the file: its addresses, and ``position`` as in `Piece`."""

    start: int
    end: int
    position: int
    region: ImageRegion


def export_core(
    image: Image, out: str | os.PathLike[str] | Sink, *, lost: Lost = "refuse"
) -> CoreFile:
    """Write an ELF core. A file has mode 0600, as an image, and gets its name at the end, when it is
    complete. A sink that is not a file is written sequentially, including all zeros.

    An image with pages that were lost at capture time is rejected. With ``lost="omit"`` these pages are
    absent from the core and from NT_FILE; gdb then reports that it cannot access them.

    Raises `ImageError` if the image has no process or is damaged, `LostPagesError` if it has lost pages,
    `SinkError` if the file cannot be written. After an error no partial file is left.
    """
    record = process_of(image)
    if record is None:
        raise ImageError(f"{image.name}: a core requires a process record, and this image has none")
    if lost == "refuse":
        _refuse_lost(image)
    layout = Layout(image, record)
    with atomic_output(out) as sink:
        if isinstance(sink, FileSink):
            layout.write(sink.fd)
        else:
            layout.write_in_order(sink)
    return layout.summary()


def _refuse_lost(image: Image) -> None:
    for region in image.regions:
        page = image.resolve(region, 0, region.length).first_of(LOST)
        if page is not None:
            raise LostPagesError(f"{image.name}: {page_text(region, page)} was lost at capture time")


class Layout:
    """The layout of the file: headers, notes, and the regions without their large holes. A region is stored
    contiguously otherwise, so that each chunk is read once."""

    def __init__(self, image: Image, record: ProcessRecord) -> None:
        self._image = image
        self._regions = sorted(image.regions, key=lambda region: region.addr)
        self._starts = [region.addr for region in self._regions]
        self._check_regions()
        mappings = with_unmapped(record.mappings, self._regions)
        # Positions are relative to the start of the memory, which depends on the number of segments.
        self._spans, self._memory_bytes = self._place_regions()
        self._span_ends = [span.end for span in self._spans]
        self._pieces = list(merged(piece for mapping in mappings for piece in self._pieces_of(mapping)))
        self._notes = notes(record, self._files())
        self._threads = len(record.threads)
        self._segments = 1 + sum(piece.stored for piece in self._pieces)
        head = EHDR.size + PHDR.size * self._segments + len(section_headers(self._segments))
        self._notes_at = head
        self._memory_at = -(-(head + len(self._notes)) // PAGE_BYTES) * PAGE_BYTES
        if self._memory_at + self._memory_bytes > MAX_FILE_BYTES:
            raise CorruptImageError(f"{image.name}: its regions exceed the maximum size of a file")

    def _files(self) -> list[FileRange]:
        """The entries of NT_FILE. The note repeats a name for each range, so its size is limited."""
        files, total = [], 0
        for item in file_ranges(self._pieces):
            files.append(item)
            total += 24 + len(item.path) + 1
            if total > MAX_FILE_NOTE_BYTES:
                raise CorruptImageError(f"{self._image.name}: has more mapped files than a process can have")
        return files

    def _check_regions(self) -> None:
        for one, two in itertools.pairwise(self._regions):
            if one.addr + one.length > two.addr:
                raise CorruptImageError(f"{self._image.name}: two regions contain address {two.addr:#x}")
        for region in self._regions:
            if region.addr + region.length == 1 << 64:  # in no process; a `Mapping` cannot end there
                text = f"{self._image.name}: a region contains the last page of the address space"
                raise CorruptImageError(text)
            runs = self._image.resolve(region, 0, region.length)
            gap = runs.first_gap(region.first_page, region.first_page + region.pages)
            if gap is not None:
                raise ImageError(f"{self._image.name}: {page_text(region, gap)} is not in the image")

    def _place_regions(self) -> tuple[list[Span], int]:
        """The parts with their positions, congruent to the addresses modulo p_align, and the end."""
        spans, end = [], 0
        for region in self._regions:
            for start, stop in self._without_large_holes(region):
                end += (start - end) % PAGE_BYTES
                spans.append(Span(start, stop, end, region))
                end += stop - start
        return spans, end

    def _without_large_holes(self, region: ImageRegion) -> Iterator[tuple[int, int]]:
        """The address ranges between holes or lost memory of at least `LARGE_BYTES`."""
        at = region.addr
        shift = region.addr - region.start_byte
        for page, pages, kind in self._image.resolve(region, 0, region.length):
            if kind not in (HOLE, LOST) or pages * PAGE_BYTES < LARGE_BYTES:
                continue
            start = max(page * PAGE_BYTES + shift, region.addr)
            if at < start:
                yield at, start
            at = (page + pages) * PAGE_BYTES + shift
        if at < region.addr + region.length:
            yield at, region.addr + region.length

    def _pieces_of(self, mapping: Mapping) -> Iterator[Piece]:
        """The parts of a mapping, divided at region boundaries and at absent pages."""
        at = mapping.start
        for number in range(max(bisect_right(self._starts, at) - 1, 0), len(self._regions)):
            region = self._regions[number]
            if region.addr >= mapping.end:
                break
            low, high = max(at, region.addr), min(mapping.end, region.addr + region.length)
            if low < high:
                yield from _not_captured(mapping, at, low)
                yield from self._captured(mapping, number, low, high)
                at = high
        yield from _not_captured(mapping, at, mapping.end)

    def _captured(self, mapping: Mapping, number: int, low: int, high: int) -> Iterator[Piece]:
        region = self._regions[number]
        shift = region.addr - region.start_byte
        for page, pages, kind in self._image.resolve(region, low - region.addr, high - low):
            start = max(page * PAGE_BYTES + shift, low)
            end = min((page + pages) * PAGE_BYTES + shift, high)
            stored = kind != LOST and (kind != HOLE or holes_are_zero(mapping))
            at = bisect_right(self._span_ends, start)
            placed = at < len(self._spans) and self._spans[at].start <= start
            position = self._spans[at].position + start - self._spans[at].start if placed else 0
            blank = stored and not placed
            from_file = (placed and stored) or (kind == HOLE and not mapping.shared and not blank)
            yield Piece(mapping, start, end, stored, from_file, position, kind == LOST, blank)

    def write(self, fd: int) -> None:
        """Write the core to an empty file. Raises OSError and ImageError."""
        os.ftruncate(fd, self._memory_at + self._memory_bytes)  # unwritten ranges are holes
        _write_all(fd, self._head())
        for start, end, position, region in self._spans:
            runs = self._image.resolve(region, start - region.addr, end - start)
            shift = region.start_byte - region.addr
            plan = Restorer(self._image.index, runs, start + shift, end + shift)
            plan.into_file(fd, self._memory_at + position, 0, plan.jobs)

    def write_in_order(self, sink: Sink) -> None:
        """Write the core to a pipe. Raises OSError and ImageError."""
        head = self._head()
        write_all(sink, head.ljust(self._memory_at, b"\0"))
        at = 0
        for start, end, position, region in self._spans:
            write_all(sink, bytes(position - at))  # less than a page
            for piece in pieces(self._image, region, start - region.addr, end - region.addr):
                write_all(sink, piece)
            at = position + end - start

    def _head(self) -> bytes:
        """The bytes before the memory: headers and notes."""
        loads = [
            Load(
                piece.start,
                piece.end,
                flags_of(piece.mapping.perms),
                self._memory_at + piece.position,
                in_file=not piece.blank,
            )
            for piece in self._pieces
            if piece.stored
        ]
        headers = program_headers(self._notes_at, len(self._notes), loads)
        head = (elf_header(self._segments), *headers, section_headers(self._segments), self._notes)
        return b"".join(head)

    def summary(self) -> CoreFile:
        """The result for the caller of `export_core`."""
        sizes = {True: 0, False: 0}
        for piece in self._pieces:
            sizes[piece.stored] += piece.end - piece.start
        return CoreFile(
            file_bytes=self._memory_at + self._memory_bytes,
            segments=self._segments,
            threads=self._threads,
            stored_bytes=sizes[True],
            absent_bytes=sizes[False],
            lost_bytes=sum(piece.end - piece.start for piece in self._pieces if piece.lost),
        )


def holes_are_zero(mapping: Mapping) -> bool:
    """Whether an unpopulated page of the mapping reads as zeros.

    In a private file mapping it reads as the file; in [vdso] and the like it reads as data of the kernel.
    """
    if mapping.path.startswith("[v"):
        return False
    anonymous = ("/dev/zero", "/anon_hugepage")  # the kernel's files of anonymous memory
    if mapping.shared:
        return True  # only memory files and deleted files are in the image
    return mapping.inode == 0 or mapping.path.startswith(anonymous)


def _not_captured(mapping: Mapping, start: int, end: int) -> Iterator[Piece]:
    if start < end:
        yield Piece(mapping, start, end, stored=False, from_file=mapping.perms[1] == "-", position=0)


def with_unmapped(mappings: list[Mapping], regions: list[ImageRegion]) -> list[Mapping]:
    """The mappings, and unnamed ones for the parts of regions (sorted by address) that are in no mapping."""
    found: list[Mapping] = []
    starts = [mapping.start for mapping in mappings]
    for region in regions:
        at, end = region.addr, region.addr + region.length
        for number in range(max(bisect_right(starts, at) - 1, 0), len(mappings)):
            mapping = mappings[number]
            if mapping.start >= end:
                break
            if at < mapping.start:
                found.append(_unnamed(at, mapping.start))
            at = max(at, mapping.end)
        if at < end:
            found.append(_unnamed(at, end))
    return sorted(mappings + found, key=lambda mapping: mapping.start)


def _unnamed(start: int, end: int) -> Mapping:
    return Mapping(start, end, "rw-p", 0, "00:00", 0, "")


def merged(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Merge adjacent pieces with equal attributes, so that a zero page does not start a new segment."""
    last: Piece | None = None
    for piece in pieces:
        if last is not None and _continues(last, piece):
            last = last._replace(end=piece.end)
            continue
        if last is not None:
            yield last
        last = piece
    if last is not None:
        yield last


def _continues(last: Piece, piece: Piece) -> bool:
    same = last.mapping is piece.mapping and last.end == piece.start
    kind = (last.stored, last.from_file, last.lost, last.blank) == (
        piece.stored, piece.from_file, piece.lost, piece.blank
    )  # fmt: skip
    in_file = not last.stored or last.blank or last.position + (last.end - last.start) == piece.position
    return same and kind and in_file


def file_ranges(pieces: Iterable[Piece]) -> Iterator[FileRange]:
    """The entries of NT_FILE: the parts of file mappings that may be read from the file."""
    last: FileRange | None = None
    for piece in pieces:
        mapping = piece.mapping
        if not (piece.from_file and mapping.path.startswith("/")):
            continue
        offset = mapping.offset + piece.start - mapping.start
        if last is not None and last.end == piece.start and piece.start != mapping.start:
            last = last._replace(end=piece.end)
            continue
        if last is not None:
            yield last
        last = FileRange(piece.start, piece.end, offset, file_name(mapping))
    if last is not None:
        yield last


def file_name(mapping: Mapping) -> bytes:
    r"""The file name of a mapping: /proc/PID/maps escapes a newline as ``\012`` (proc(5))."""
    return encode(mapping.path).replace(b"\\012", b"\n")


def _write_all(fd: int, data: bytes) -> None:
    view, position = memoryview(data), 0
    while position < len(view):
        position += os.pwrite(fd, view[position:], position)

"""Random-access reading of images: `open_image`. For pipes see `snapengine.image.stream`.

Opening reads the file header, the trailer, the regions and the index. Page maps and payloads are read on
demand. No data is used before its checksum is verified.
"""

from __future__ import annotations

import io
import mmap
import os
import uuid
from collections.abc import Iterator
from typing import Any, Literal, Self

from snapengine.base.buffers import ExportedBuffer
from snapengine.base.descriptor import Descriptor
from snapengine.base.jobs import run_jobs
from snapengine.base.names import encode, printable
from snapengine.errors import (
    CorruptImageError,
    ImageError,
    LostPagesError,
    NoSuchRegionError,
    TruncatedImageError,
)
from snapengine.image.describe import SizedBlobs, describe
from snapengine.image.encode import LOST
from snapengine.image.headers import Record
from snapengine.image.index import PageIndex
from snapengine.image.input import corrupt
from snapengine.image.records import diagnose, read_file_header, read_payload, read_record
from snapengine.image.restorer import Restorer
from snapengine.image.rules import VmstateEntry, check_vmstate_entry
from snapengine.image.runs import Runs
from snapengine.image.sections import (
    TRAILER_RECORD_BYTES,
    ImageRegion,
    VmStateParts,
    check_regions,
    page_text,
    parse_index,
    parse_regions,
    parse_stats,
    parse_trailer,
)
from snapengine.image.verify import VerifyReport, verify_image
from snapengine.regions import PAGE_BYTES
from snapengine.storage.source import FileSource, MemorySource, Source

__all__ = ["RUN_KINDS", "Image", "ImageRegion", "VerifyReport", "VmState", "open_image"]

MEMFD_NAME_BYTES = 249  # limit of memfd_create(2)
RUN_KINDS = ("data", "zero", "hole", "lost")
LostPages = Literal["refuse", "zero"]  # see `open_image`
RegionSpec = ImageRegion | str | int


class VmState(SizedBlobs):
    """The named blobs of an image; each is read and verified on access."""

    def __init__(self, source: Source, parts: dict[str, list[Record]]) -> None:
        self._source = source
        self._parts = parts

    def __getitem__(self, name: str) -> bytes:
        return b"".join(read_payload(self._source, part) for part in self._parts[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def sizes(self) -> dict[str, int]:
        """Bytes of each blob, without reading it."""
        return {name: sum(part.raw_bytes for part in parts) for name, parts in self._parts.items()}


class Image:
    """One complete image. Close it, or use it in a ``with`` statement.

    Any thread may call it. Every method raises an `ImageError` for a damaged image (`CorruptImageError`,
    `TruncatedImageError`, with ``offset``) and for pages that are not in the image, and `LostPagesError` for
    pages that the capture reported as lost.
    """

    def __init__(self, source: Source, *, lost: LostPages = "refuse") -> None:
        """Open the image. It takes over `source`, which is closed with the image, or if this raises."""
        self._source = source
        self.name = source.name
        self.lost: LostPages = lost
        """What reads do with pages that were lost at capture time: see `open_image`."""
        try:
            self._load()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the source. Idempotent; no other thread may be reading."""
        self._source.close()

    def _load(self) -> None:
        source = self._source
        self.header = read_file_header(source)
        self.trailer_record = self._find_trailer()
        payload = read_payload(source, self.trailer_record)
        self.trailer = parse_trailer(source, self.trailer_record, payload, self.header)
        self.regions = self._load_regions()
        self.index = PageIndex(self.name, source)
        self.vmstate = VmState(source, self._load_vmstate(self._load_index()))

    def _find_trailer(self) -> Record:
        source = self._source
        try:
            record = read_record(source, max(source.size - TRAILER_RECORD_BYTES, 0), expect=b"TRLR")
            read_payload(source, record)
        except (CorruptImageError, TruncatedImageError):
            raise diagnose(source) from None
        return record

    def _load_regions(self) -> list[ImageRegion]:
        regions: list[ImageRegion] = []
        offset = self.trailer.regn_offset
        while True:
            record = read_record(self._source, offset, expect=b"REGN")
            regions += parse_regions(self._source, record, read_payload(self._source, record))
            offset = record.end
            if record.last_part:
                check_regions(self._source, regions)
                self._memory_start = record.end
                return regions

    def _load_index(self) -> list[VmstateEntry]:
        offset = self.trailer.indx_offset
        end_of_records = self._memory_start
        vmstate: list[VmstateEntry] = []
        while True:
            record = read_record(self._source, offset, expect=b"INDX")
            entries = parse_index(self._source, record, read_payload(self._source, record))
            end_of_records, parts = self.index.add_index(entries, end_of_records, self.trailer.stat_offset)
            vmstate += map(VmstateEntry._make, parts)
            offset = record.end
            if record.last_part:
                break
        if self.index.count != self.trailer.chunks or len(vmstate) != self.trailer.vmstate_parts:
            raise corrupt(self, "the index is not complete", self.trailer.indx_offset)
        return vmstate

    def _load_vmstate(self, entries: list[VmstateEntry]) -> dict[str, list[Record]]:
        collector = VmStateParts(self._source)
        for entry in entries:
            record = read_record(self._source, entry.offset, expect=b"VMST")
            check_vmstate_entry(self._source, record, entry)
            collector.add(record)
        return collector.finish()

    @property
    def id(self) -> uuid.UUID:
        """The image's id."""
        return uuid.UUID(bytes=self.header.image_id)

    @property
    def stats(self) -> dict[str, Any]:
        """The statistics of the capture (`Result.to_json`)."""
        record = read_record(self._source, self.trailer.stat_offset, expect=b"STAT")
        stats = parse_stats(self._source, record, read_payload(self._source, record))
        if stats.get("image_bytes") != self._source.size:
            raise corrupt(self, "the size in the statistics is wrong", record.offset)
        return stats

    def info(self) -> dict[str, Any]:
        """Description of the image in JSON types. Reads all page maps, but no payload."""
        encodings = {"raw": 0, "zstd": 0}
        for number in range(self.index.count):
            encodings[("raw", "zstd")[self.index.extent(number)[2]]] += 1
        return {
            **describe(self.header, self.regions, self.vmstate.sizes()),
            "file_bytes": self._source.size,
            "chunks": self.index.count,
            "encodings": encodings,
            "stats": self.stats,
        }

    def region(self, spec: RegionSpec) -> ImageRegion:
        """The region with this name or index; an `ImageRegion` is returned as it is.

        NAME@ADDR (hexadecimal) selects one of several regions of the same name, which images of earlier
        versions may have. A name may also be given as `snapengine info` prints it, with escapes for
        non-printable characters. Raises `NoSuchRegionError` if no region matches, or several do.
        """
        if isinstance(spec, ImageRegion):
            return spec
        if isinstance(spec, int):
            if not 0 <= spec < len(self.regions):
                raise NoSuchRegionError(f"{self.name}: there is no region number {spec}")
            return self.regions[spec]
        found = self._named(spec)
        if len(found) == 1:
            return found[0]
        if not found:
            known = ", ".join(printable(region.name) for region in self.regions) or "none"
            raise NoSuchRegionError(f"{self.name}: there is no region {printable(spec)}; it has: {known}")
        each = ", ".join(printable(f"{region.name}@{region.addr:x}") for region in found)
        raise NoSuchRegionError(f"{self.name}: {len(found)} regions are named {printable(spec)}: use {each}")

    def _named(self, name: str) -> list[ImageRegion]:
        """The regions that match `name` by the first interpretation with a match."""
        for text_of in (lambda r: r.name, lambda r: f"{r.name}@{r.addr:x}", lambda r: printable(r.name)):
            if found := [region for region in self.regions if text_of(region) == name]:
                return found
        return []

    def resolve(self, region: ImageRegion, offset: int, length: int) -> Runs:
        """The newest runs of the pages of these bytes. Raises ValueError if they are outside the region."""
        if offset < 0 or length < 0 or offset + length > region.length:
            raise ValueError(f"{region.name}: [{offset}, {offset + length}) is not within {region.length}")
        first = region.start_byte + offset
        end = -(-(first + length) // PAGE_BYTES) if length else first // PAGE_BYTES
        return self.index.resolve(first // PAGE_BYTES, end)

    def runs(self, region: RegionSpec) -> Iterator[tuple[int, int, str]]:
        """(offset, bytes, kind) in ascending order; kind is one of `RUN_KINDS`.

        Bytes that are not in the image are in no run.
        """
        chosen = self.region(region)
        low = chosen.start_byte
        for page, pages, kind in self.resolve(chosen, 0, chosen.length):
            start = max(page * PAGE_BYTES - low, 0)
            yield start, min((page + pages) * PAGE_BYTES - low, chosen.length) - start, RUN_KINDS[kind]

    def checked_runs(self, region: ImageRegion, offset: int, length: int) -> Runs:
        """`resolve`, with a check that the image has all of these bytes."""
        runs = self.resolve(region, offset, length)
        low = region.start_byte + offset
        end = -(-(low + length) // PAGE_BYTES) if length else low // PAGE_BYTES
        gap = runs.first_gap(low // PAGE_BYTES, end)
        if gap is not None:
            raise ImageError(f"{self.name}: {page_text(region, gap)} is not in the image")
        lost = runs.first_of(LOST) if self.lost == "refuse" else None
        if lost is not None:
            raise LostPagesError(f"{self.name}: {page_text(region, lost)} was lost at capture time")
        return runs

    def lost_pages(self) -> int:
        """How many pages were lost at capture time."""
        return sum(self.resolve(region, 0, region.length).totals()[LOST] for region in self.regions)

    def restorer(self, region: ImageRegion, offset: int, length: int) -> Restorer:
        """A `Restorer` for these bytes, with a check that the image has all of them."""
        low = region.start_byte + offset
        return Restorer(self.index, self.checked_runs(region, offset, length), low, low + length)

    def read(self, region: RegionSpec, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` in a region."""
        chosen = self.region(region)
        plan = self.restorer(chosen, offset, length)  # before the allocation: checks the length
        buffer = bytearray(length)
        plan.into_memory(buffer, 0, plan.jobs)
        return bytes(buffer)

    def read_at(self, addr: int, length: int) -> bytes:
        """`length` bytes at an address of the target. `NoSuchRegionError`: they are not in one region."""
        for region in self.regions:
            if region.addr <= addr and addr + length <= region.addr + region.length:
                return self.read(region, addr - region.addr, length)
        raise NoSuchRegionError(f"{self.name}: [{addr:#x}, {addr + length:#x}) is not within one region")

    def restore_into(
        self,
        region: RegionSpec,
        buffer: Any,
        *,
        offset: int | None = None,
        fresh: bool = False,
        threads: int = 0,
    ) -> None:
        """Fill a writable buffer or CPU tensor with the bytes of a region.

        Without `offset` the buffer must have the size of the region. With `offset` it is filled with the
        bytes from there on. `fresh` states that the buffer is all zero: zero pages and holes are then
        skipped, and stay unpopulated in new memory. With 0 `threads`: one per usable CPU, at most 4. After an
        error the content of the buffer is undefined.

        Raises TypeError or ValueError if the buffer cannot be filled (read-only, Python objects, not
        contiguous, wrong size), OSError (EFAULT) if its memory is unmapped, protected or truncated.
        """
        chosen = self.region(region)
        exported = ExportedBuffer(chosen.name, buffer)
        if offset is None and exported.length < chosen.length:
            raise ValueError(
                f"{chosen.name}: {chosen.length} bytes do not fit a buffer of {exported.length}: use one of "
                "the size and type that was saved, or give an offset to restore a part"
            )
        view = exported.view()
        plan = self.restorer(chosen, offset or 0, exported.length)
        if not fresh:
            plan.clear_zero_runs(view)
        run_jobs(plan.jobs, threads, lambda begin, end: plan.into_memory(view, begin, end))

    def restore_memfd(self, region: RegionSpec, *, threads: int = 0) -> int:
        """Create a memfd with the bytes of a region; the caller closes it. Zero pages and holes are holes."""
        chosen = self.region(region)
        plan = self.restorer(chosen, 0, chosen.length)
        file = Descriptor.memfd(_memfd_name(chosen.name))
        os.ftruncate(file.fd, chosen.length)
        with mmap.mmap(file.fd, chosen.length) as memory, memoryview(memory) as view:
            run_jobs(plan.jobs, threads, lambda begin, end: plan.into_memory(view, begin, end))
        return file.detach()

    def verify(self) -> VerifyReport:
        """Read and verify the whole file: all records, the index, and that no page is missing."""
        return verify_image(self)

    @property
    def source(self) -> Source:
        """The source of the image."""
        return self._source


def _memfd_name(name: str) -> bytes:
    return (b"snapengine:" + encode(name).replace(b"\0", b"?"))[:MEMFD_NAME_BYTES]


def open_image(image: Any, *, lost: LostPages = "refuse") -> Image:
    """Open an image: a path, a readable binary file object, or a `snapengine.storage.source.Source`.

    A file object remains the caller's. The position of a file on disk and of a `BytesIO` does not matter; a
    `BytesIO` is not copied. Any other object is read to its end and kept in memory. A source is closed with
    the image, or if this raises.

    `lost`: what reads, restores and exports do with pages that were lost at capture time. "refuse" raises
    `LostPagesError`. With "zero" such pages read as zeros, which is right only where their content does not
    matter: memory that a guest gave back (a balloon, virtio-mem), or that a process has discarded.

    Raises ValueError for another `lost`, `ImageError` if it is empty, not an image, truncated or damaged,
    OSError if it cannot be opened.
    """
    if lost not in ("refuse", "zero"):
        raise ValueError(f"lost: {lost!r} is neither 'refuse' nor 'zero'")
    return Image(image if isinstance(image, Source) else _source_of(image), lost=lost)


def _source_of(file: Any) -> Source:
    if isinstance(file, (str, os.PathLike)):
        return FileSource(file)
    name = str(getattr(file, "name", type(file).__name__))
    if isinstance(file, io.BytesIO):  # no copy: the bytes are shared until the next write
        return MemorySource(file.getvalue(), name)
    try:
        number = file.fileno()
    except (AttributeError, OSError):
        return MemorySource(b"".join(iter(lambda: file.read(1 << 20), b"")), name)
    return FileSource(number, name)

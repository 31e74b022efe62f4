"""What is in a migration stream that QEMU wrote to a file, and what it would take as an image."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from snapengine.options import Options
from snapengine.pipeline.pipeline import Encoding
from snapengine.qemu.image_end import regions_of, write_end
from snapengine.qemu.stream_pages import Census
from snapengine.qemu.tail import DeviceSection, check_tail, device_sections, end_of_sections
from snapengine.regions import PAGE_BYTES
from snapengine.storage.sinks import NullSink

__all__ = ["Analysis", "analyze"]


@dataclass(frozen=True, slots=True)
class Analysis:
    """A migration stream in figures. Sizes are bytes, pages have 4096."""

    stream_bytes: int
    machine_type: str | None
    ram_blocks: list[tuple[str, int]]
    """(name, bytes in use)."""
    ram_end: bool
    """Whether the RAM has an END section: `migrate` writes one, background-snapshot does not."""
    pages_total: int
    page_records: int
    zero_records: int
    data_pages: int
    """Pages whose last version holds anything but zeros."""
    zero_pages: int
    absent_pages: int
    """Pages that the stream does not mention."""
    times_sent: dict[int, int]
    """How many pages came so often: times -> pages, 0 included."""
    head_bytes: int
    ram_bytes: int
    """Everything between head and tail: pages, their headers, the sections around them."""
    devices: list[DeviceSection]
    description_bytes: int
    """What follows the last device: the EOF byte and QEMU's description of the device state."""
    image_bytes: dict[str, int]
    """Size of the image by compression: ``"none"`` and one zstd level, each by really making it."""

    @property
    def duplicate_records(self) -> int:
        """Records that a later one makes useless."""
        return self.page_records + self.zero_records - self.data_pages - self.zero_pages

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types."""
        fields = asdict(self)
        fields["ram_blocks"] = [{"name": name, "used": used} for name, used in self.ram_blocks]
        fields["times_sent"] = {str(times): pages for times, pages in self.times_sent.items()}
        fields["devices"] = [device._asdict() for device in self.devices]
        return fields | {"duplicate_records": self.duplicate_records}


def analyze(stream_fd: int, *, compress: str = "zstd", spill_dir: str | None = None, name: str = "stream",
            ) -> Analysis:  # fmt: skip
    """Read a stream from a descriptor to its end, and make its image twice, into nothing.

    `compress` is the second one's, as in `Options`. In `spill_dir` (None: the system's) there must be room
    for all pages that are not zero. `StreamError`: as for `ingest`. ValueError: `compress` is wrong.
    """
    if Options(compress=compress).level_follows_sink:
        raise ValueError("compress: zstd:auto follows a sink, and there is none")
    ways = [Options(compress=way, spill_dir=spill_dir) for way in dict.fromkeys(("none", compress))]
    census = Census(stream_fd, spill_dir, name=name)
    try:
        census.read_head()
        census.open_tables()
        census.read_pages()
        ram_bytes = census.offset - len(census.head)
        census.read_tail()
        check_tail(census.tail, census.offset, name)
        sizes = {options.compress: image_size(census, options) for options in ways}
    finally:
        census.close()
    end = end_of_sections(census.tail)
    assert end is not None
    return Analysis(
        stream_bytes=census.offset,
        machine_type=census.machine_type,
        ram_blocks=census.ram_blocks,
        ram_end=census.has_end,
        pages_total=census.total_pages,
        page_records=census.pages,
        zero_records=census.zeros,
        data_pages=census.data_pages,
        zero_pages=census.zero_pages,
        absent_pages=census.total_pages - census.data_pages - census.zero_pages,
        times_sent=census.histogram(),
        head_bytes=len(census.head),
        ram_bytes=ram_bytes,
        devices=device_sections(census.tail),
        description_bytes=len(census.tail) - end,
        image_bytes=sizes,
    )


def image_size(census: Census, options: Options) -> int:
    """Bytes of the image that `ingest` would make."""
    began = time.monotonic_ns()
    total = sum(used for _, used in census.ram_blocks) // PAGE_BYTES
    if options.zstd_level is not None and not options.compress_always:  # nobody waits for this image
        options = replace(options, compress=f"{options.compress}:always")
    encoding = Encoding(NullSink(), options, total, census.fail)
    try:
        encoding.start(regions_of(census.ram_blocks))
        census.attach(encoding.pool, options.zstd_level is None)
        census.put_all()
        census.close_lane()
        encoding.join()
        result = write_end(encoding.writer, census, options, {}, {}, began, encoding.peak_bytes)
    except BaseException:
        census.fail()
        raise
    finally:
        encoding.stop()
        encoding.close()
    return result.image_bytes

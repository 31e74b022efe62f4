"""Analysis of a migration stream: its contents, and the size of the image that it would become."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from snapengine.options import Options
from snapengine.pipeline.pipeline import Pipeline
from snapengine.qemu.image_end import finish_image, regions_of
from snapengine.qemu.stream_pages import CountingSpool
from snapengine.qemu.tail import DeviceSection, check_tail, device_sections, end_of_sections
from snapengine.regions import PAGE_BYTES
from snapengine.storage.sinks import NullSink

__all__ = ["Analysis", "analyze"]


@dataclass(frozen=True, slots=True)
class Analysis:
    """Statistics of a migration stream. Sizes are in bytes; a page has 4096 bytes."""

    stream_bytes: int
    machine_type: str | None
    ram_blocks: list[tuple[str, int]]
    """(name, bytes in use)."""
    ram_end: bool
    """Whether the RAM has an END section. `migrate` writes one; background-snapshot does not."""
    pages_total: int
    page_records: int
    zero_records: int
    data_pages: int
    """Pages whose last version is not all zeros."""
    zero_pages: int
    absent_pages: int
    """Pages without a record in the stream."""
    times_sent: dict[int, int]
    """Records per page -> number of such pages; 0 is included."""
    head_bytes: int
    ram_bytes: int
    """Everything between head and tail: pages, record headers, section headers and footers."""
    devices: list[DeviceSection]
    description_bytes: int
    """Bytes after the last device: the EOF byte and QEMU's description of the device state."""
    image_bytes: dict[str, int]
    """Compression -> size of the image, for ``"none"`` and one zstd level. Measured by encoding it."""

    @property
    def duplicate_records(self) -> int:
        """Records that a later record of the same page supersedes."""
        return self.page_records + self.zero_records - self.data_pages - self.zero_pages

    def to_json(self) -> dict[str, Any]:
        """Return a dict of JSON types."""
        fields = asdict(self)
        fields["ram_blocks"] = [{"name": name, "used": used} for name, used in self.ram_blocks]
        fields["times_sent"] = {str(times): pages for times, pages in self.times_sent.items()}
        fields["devices"] = [device._asdict() for device in self.devices]
        return fields | {"duplicate_records": self.duplicate_records}


def analyze(stream_fd: int, *, compress: str = "zstd", spill_dir: str | None = None, name: str = "stream",
            ) -> Analysis:  # fmt: skip
    """Read a stream from a descriptor to its end, and measure its image size with and without compression.

    `compress` is a value of `Options.compress`. `spill_dir` (None: the system's temporary directory) needs
    space for all nonzero pages.

    Raises `StreamError` as `ingest` does, and ValueError if `compress` is invalid.
    """
    if Options(compress=compress).level_follows_sink:
        raise ValueError("compress: zstd:auto adapts to the sink, and analyze writes to none: give a level")
    variants = [Options(compress=level, spill_dir=spill_dir) for level in dict.fromkeys(("none", compress))]
    spool = CountingSpool(stream_fd, spill_dir, name=name)
    try:
        spool.read_head()
        spool.open_tables()
        spool.read_pages()
        ram_bytes = spool.offset - len(spool.head)
        spool.read_tail()
        check_tail(spool.tail, spool.offset, name)
        sizes = {options.compress: image_size(spool, options) for options in variants}
    finally:
        spool.close()
    end = end_of_sections(spool.tail)
    assert end is not None
    return Analysis(
        stream_bytes=spool.offset,
        machine_type=spool.machine_type,
        ram_blocks=spool.ram_blocks,
        ram_end=spool.has_end,
        pages_total=spool.total_pages,
        page_records=spool.pages,
        zero_records=spool.zeros,
        data_pages=spool.data_pages,
        zero_pages=spool.zero_pages,
        absent_pages=spool.total_pages - spool.data_pages - spool.zero_pages,
        times_sent=spool.histogram(),
        head_bytes=len(spool.head),
        ram_bytes=ram_bytes,
        devices=device_sections(spool.tail),
        description_bytes=len(spool.tail) - end,
        image_bytes=sizes,
    )


def image_size(spool: CountingSpool, options: Options) -> int:
    """Return the size of the image that `ingest` would write."""
    start_ns = time.monotonic_ns()
    total = sum(used for _, used in spool.ram_blocks) // PAGE_BYTES
    if options.zstd_level is not None and not options.compress_always:  # store no chunk raw: nothing waits
        options = replace(options, compress=f"{options.compress}:always")
    encoding = Pipeline(NullSink(), options, total, spool.fail)
    try:
        encoding.start(regions_of(spool.ram_blocks))
        spool.attach(encoding.pool, options.zstd_level is None)
        spool.put_all()
        spool.close_lane()
        encoding.join()
        result = finish_image(encoding.writer, spool, options, {}, {}, start_ns, encoding.peak_bytes)
    except BaseException:
        spool.fail()
        raise
    finally:
        encoding.stop()
        encoding.close()
    return result.image_bytes

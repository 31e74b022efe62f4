"""The parts of an image of a migration stream that are not pages: regions, blobs, statistics."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from snapengine.image.writer import Writer
from snapengine.options import DIRTY_LOGGING, WRITE_TRACKING, Options
from snapengine.qemu.blobs import DOMAIN_XML, HEAD, MACHINE, TAIL, VIA_STREAM, machine_blob
from snapengine.qemu.stream_pages import DirectIntake, Spool
from snapengine.regions import PAGE_BYTES, Region
from snapengine.result import COMPLETED, Result


def regions_of(blocks: Sequence[tuple[str, int]]) -> list[tuple[Region, int]]:
    """Return (region, first page number) for each RAM block (name, bytes in use).

    The regions are placed one after the other from address 0, because a stream contains no addresses.
    """
    regions = []
    at = 0
    for name, used in blocks:
        regions.append((Region(name, at, used), at // PAGE_BYTES))
        at += used
    return regions


def finish_image(
    writer: Writer,
    intake: DirectIntake | Spool,
    options: Options,
    blobs: dict[str, bytes],
    members: dict[str, Any],
    start_ns: int,
    peak_bytes: int,
    sender_fields: dict[str, Any] | None = None,
) -> Result:
    """Write the blobs, the index and the trailer; return the result.

    `intake` must have read the whole stream, and all of its pages must be written. `members` are added to the
    machine description. `start_ns` is the monotonic clock at the start. `sender_fields` are fields of the
    result that the sender measured.
    """
    for name, blob in {**_stream_blobs(intake, members), **blobs}.items():
        writer.vmstate(name, blob, options.zstd_level)
    stats = _result(writer, intake, start_ns, peak_bytes).to_json() | (sender_fields or {})
    writer.finish(stats)
    return Result(**stats)


def _stream_blobs(intake: DirectIntake | Spool, members: dict[str, Any]) -> dict[str, bytes]:
    stream = {
        "bytes": intake.offset,
        "pages": intake.pages,
        "zero_pages": intake.zeros,
        "repeated": intake.repeats,
        "ram_end": intake.has_end,
    }
    machine = machine_blob(VIA_STREAM, intake.machine_type, intake.ram_blocks, {"stream": stream, **members})
    blobs = {MACHINE: machine, HEAD: intake.head, TAIL: intake.tail}
    return blobs if intake.domain_xml is None else {**blobs, DOMAIN_XML: intake.domain_xml}


def _result(writer: Writer, intake: DirectIntake | Spool, start_ns: int, peak_bytes: int) -> Result:
    direct = isinstance(intake, DirectIntake)
    saved = intake.saved if isinstance(intake, DirectIntake) else intake.data_pages
    return Result(
        # QEMU's background-snapshot, which sends each page once, writes no END section.
        method=WRITE_TRACKING if direct or not intake.has_end else DIRTY_LOGGING,
        status=COMPLETED,
        image_bytes=writer.image_bytes,
        region_bytes=intake.total_pages * PAGE_BYTES,
        nonzero_bytes=intake.data_pages * PAGE_BYTES,
        pages_total=intake.total_pages,
        pages_saved=saved,
        zero_pages=intake.zero_pages,
        hole_pages=intake.total_pages - intake.data_pages - intake.zero_pages,
        duplicate_pages=saved - intake.data_pages,
        faults=0,
        rounds=0,
        arm_ns=0,
        stop_ns=0,
        duration_ns=time.monotonic_ns() - start_ns,
        fault_ns={"p50": 0, "p99": 0, "max": 0},
        peak_buffer_bytes=peak_bytes,
        spilled_bytes=0 if isinstance(intake, DirectIntake) else intake.spooled_bytes,
    )

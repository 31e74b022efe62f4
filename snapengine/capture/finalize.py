"""After the capture threads have ended: the rest of the image, its figures, and the commit."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from snapengine.capture.copied import write_copied
from snapengine.capture.counts import Extra, figures
from snapengine.capture.resources import Resources
from snapengine.errors import LostPagesError
from snapengine.options import Options
from snapengine.process.record import not_captured_object
from snapengine.result import COMPLETED, Result


@dataclass(slots=True)
class Times:
    """When things happened, in nanoseconds; 0: not yet, or never."""

    began: int = 0
    """The start of the capture, by CLOCK_MONOTONIC."""
    stop: int = 0
    """How long the target was paused."""
    t_unix: int = 0
    """T, by CLOCK_REALTIME."""


def finish_image(
    parts: Resources, options: Options, vmstate: dict[str, bytes], status: str, times: Times
) -> Result:
    """Write what follows the memory, and commit the sink, if the capture is complete.

    `LostPagesError`: pages are lost, and ``options.strict``; `SinkError`.
    """
    assert parts.writer is not None
    assert parts.sink is not None
    extra = Extra()
    if status == COMPLETED:
        blobs = {**vmstate, **_attached_blobs(parts, options.zstd_level, extra)}
        for name, blob in blobs.items():
            parts.writer.vmstate(name, blob, options.zstd_level)
    result = _make_result(parts, options, status, times, extra)
    if status != COMPLETED:
        return result
    if options.strict and result.lost_pages:
        raise LostPagesError(
            f"{result.lost_pages} pages were discarded by the target before they were saved (strict)"
        )
    stats = result.to_json()
    parts.writer.finish(stats)
    parts.sink.commit()
    pairs = {"lost_runs": result.lost_runs, "fault_histogram": result.fault_histogram}
    return Result(**{**stats, **pairs})


def _attached_blobs(parts: Resources, level: int | None, extra: Extra) -> dict[str, bytes]:
    """Write what an attached target's `copied_regions` held at T; what describes it."""
    if parts.attached is None:
        return {}
    assert parts.writer is not None
    for number, (region, first_page) in enumerate(parts.copied):
        write_copied(parts.writer, region, first_page, parts.attached.copied_bytes(number), level, extra)
    return parts.attached.record()


def _make_result(
    parts: Resources, options: Options, status: str, times: Times, extra: Extra
) -> Result:
    assert parts.session is not None
    assert parts.writer is not None
    assert parts.plan is not None
    assert parts.encoder is not None
    return Result(
        method=options.method,
        status=status,
        image_bytes=parts.writer.image_bytes,
        stop_ns=times.stop,
        duration_ns=time.monotonic_ns() - times.began,
        t_monotonic_ns=parts.session.t_ns,
        t_unix_ns=times.t_unix,
        peak_buffer_bytes=parts.session.pool.peak_bytes + parts.encoder.scratch_bytes,
        warnings=parts.warnings + parts.plan.warnings + _late_warnings(parts),
        **_about_attached(parts),
        **figures(parts.session, parts.plan, options.method, extra),
    )


def _about_attached(parts: Resources) -> dict[str, Any]:
    target = parts.attached
    if target is None:
        return {}
    left_out = [not_captured_object(item) for item in target.not_captured]
    return {
        "cut": target.cut,
        "injection_ns": target.injection_ns,
        "not_captured": left_out,
        "stop_parts_ns": dict(target.stop_parts_ns),
    }


def _late_warnings(parts: Resources) -> list[str]:
    """What an attached target did to its shared memory that no check of a page can tell."""
    if parts.attached is None:
        return []
    return parts.attached.late_warnings()

"""After the capture threads have ended: the rest of the image, its figures, and the commit."""

from __future__ import annotations

import time
from typing import Any

from snapengine.capture.copied import CopiedCounts, write_copied
from snapengine.capture.region_plan import Plan
from snapengine.capture.resources import Resources
from snapengine.engine.session import Session
from snapengine.errors import LostPagesError
from snapengine.options import DIRTY_LOGGING, Options
from snapengine.process.record import not_captured_object
from snapengine.regions import PAGE_BYTES
from snapengine.result import COMPLETED, Result


def finish_image(
    resources: Resources, options: Options, vmstate: dict[str, bytes], status: str
) -> Result:
    """Write what follows the memory, and commit the sink, if the capture is complete.

    `LostPagesError`: pages are lost, and ``options.strict``; `SinkError`.
    """
    assert resources.writer is not None
    assert resources.sink is not None
    copied = CopiedCounts()
    if status == COMPLETED:
        blobs = {**vmstate, **_attached_blobs(resources, options.zstd_level, copied)}
        for name, blob in blobs.items():
            resources.writer.vmstate(name, blob, options.zstd_level)
    result = _make_result(resources, options, status, copied)
    if status != COMPLETED:
        return result
    if options.strict and result.lost_pages:
        raise LostPagesError(
            f"{result.lost_pages} pages were discarded by the target before they were saved (strict)"
        )
    stats = result.to_json()
    resources.writer.finish(stats)
    resources.sink.commit()
    pairs = {"lost_runs": result.lost_runs, "fault_histogram": result.fault_histogram}
    return Result(**{**stats, **pairs})


def _attached_blobs(resources: Resources, level: int | None, copied: CopiedCounts) -> dict[str, bytes]:
    """Write what an attached target's `copied_regions` held at T; what describes it."""
    if resources.attached is None:
        return {}
    assert resources.writer is not None
    for number, (region, first_page) in enumerate(resources.copied):
        copy = resources.attached.copied_bytes(number)
        write_copied(resources.writer, region, first_page, copy, level, copied)
    return resources.attached.record()


def _make_result(
    resources: Resources, options: Options, status: str, copied: CopiedCounts
) -> Result:
    assert resources.session is not None
    assert resources.writer is not None
    assert resources.plan is not None
    assert resources.encoder is not None
    return Result(
        method=options.method,
        status=status,
        image_bytes=resources.writer.image_bytes,
        stop_ns=resources.times.stop,
        duration_ns=time.monotonic_ns() - resources.times.began,
        t_monotonic_ns=resources.session.t_ns,
        t_unix_ns=resources.times.t_unix,
        peak_buffer_bytes=resources.session.pool.peak_bytes + resources.encoder.scratch_bytes,
        warnings=resources.warnings + resources.plan.warnings + _late_warnings(resources),
        **_about_attached(resources),
        **_from_engine(resources.session, resources.plan, options.method, copied),
    )


def _from_engine(session: Session, plan: Plan, method: str, copied: CopiedCounts) -> dict[str, Any]:
    """The fields of `Result` that the engine knows."""
    counts = session.counters()
    data, holes = counts["data"] + copied.data, counts["hole"] + copied.hole
    total = session.total_pages + copied.data + copied.zero + copied.hole + copied.lost
    final = data
    zeros = counts["zero"] + copied.zero
    runs = session.lost_runs()
    lost = sum(length for _, length in runs) // PAGE_BYTES + copied.lost
    if method == DIRTY_LOGGING:
        final = session.final_pages() + copied.data
        zeros = total - final - holes - lost
    return {
        "region_bytes": sum(plan.region.length for plan in plan.regions) + copied.bytes,
        "nonzero_bytes": final * PAGE_BYTES,
        "pages_total": total,
        "pages_saved": data,
        "zero_pages": zeros,
        "hole_pages": holes,
        "duplicate_pages": data - final,
        "faults": counts["faults"],
        "rounds": session.rounds,
        "arm_ns": session.arm_ns,
        "pause_ns": session.pause_ns,
        "arming_faults": counts["arming_faults"],
        "fault_ns": session.fault_ns(),
        "fault_histogram": session.fault_histogram(),
        "spilled_bytes": session.pool.spilled_bytes,
        "lost_pages": lost,
        "lost_runs": runs,
    }


def _about_attached(resources: Resources) -> dict[str, Any]:
    target = resources.attached
    if target is None:
        return {}
    left_out = [not_captured_object(item) for item in target.not_captured]
    return {
        "cut": target.cut,
        "injection_ns": target.injection_ns,
        "not_captured": left_out,
        "stop_parts_ns": dict(target.stop_parts_ns),
    }


def _late_warnings(resources: Resources) -> list[str]:
    """What an attached target did to its shared memory that no check of a page can tell."""
    if resources.attached is None:
        return []
    return resources.attached.late_warnings()

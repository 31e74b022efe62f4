"""The figures of one capture in a few lines, the same after `save` and in `info`."""

from __future__ import annotations

import time

from snapengine.base.names import without_controls
from snapengine.base.units import format_count, format_ns, format_size
from snapengine.options import DIRTY_LOGGING
from snapengine.result import COMPLETED, Result, fitted_parts


def figures_rows(result: Result) -> list[tuple[str, str]]:
    """Name and value of each line. Figures that are usually zero are left out when they are."""
    rows = [
        ("method", without_controls(result.method)),
        ("status", without_controls(result.status)),
        ("instant", _instant(result)),
        ("image", _image(result)),
        ("memory", f"{format_size(result.region_bytes)}, {format_size(result.nonzero_bytes)} of it not zero"),
        ("pages", _pages(result)),
        ("time", f"{format_ns(result.duration_ns)}, arming {_arming(result)}"),
    ]
    if result.faults:
        waits = (f"{name} {format_ns(result.fault_ns[name])}" for name in ("p50", "p99", "max"))
        rows.append(("faults", f"{format_count(result.faults)}, served in {', '.join(waits)}"))
    if result.method == DIRTY_LOGGING:
        rows.append(("rounds", format_count(result.rounds)))
    if result.stop_ns:
        rows.append(("target paused", _pause(result)))
    spilled = f", {format_size(result.spilled_bytes)} spilled" if result.spilled_bytes else ""
    rows.append(("buffer, peak", format_size(result.peak_buffer_bytes) + spilled))
    if result.lost_pages:
        rows.append(("lost pages", format_count(result.lost_pages)))
    return rows


def _instant(result: Result) -> str:
    """T as local time with the offset from UTC."""
    if result.status != COMPLETED:
        return "none: there is no image"
    if not result.t_unix_ns:
        return "not known"
    seconds, ns = divmod(result.t_unix_ns, 10**9)
    local = time.localtime(seconds)
    offset = time.strftime("%z", local)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', local)}.{ns // 1000:06d} {offset[:3]}:{offset[3:5]}"


def _arming(result: Result) -> str:
    """How long arming took, and how long writers waited for T if that was shorter."""
    less = f" (writers waited {format_ns(result.pause_ns)})" if 0 < result.pause_ns < result.arm_ns else ""
    return format_ns(result.arm_ns) + less


def _pause(result: Result) -> str:
    """The pause and its parts. "guest" is left out: it is their sum by another clock."""
    parts = fitted_parts(result.stop_parts_ns, result.stop_ns)  # images of earlier versions hold more
    spent = ((without_controls(name), ns) for name, ns in parts.items() if name != "guest")
    texts = [f"{name} {format_ns(ns)}" for name, ns in spent]
    return format_ns(result.stop_ns) + (f" ({', '.join(texts)})" if texts else "")


def _image(result: Result) -> str:
    if not result.nonzero_bytes:
        return format_size(result.image_bytes)
    ratio = result.image_bytes / result.nonzero_bytes
    return f"{format_size(result.image_bytes)}, {ratio:.3f} x the memory that is not zero"


def _pages(result: Result) -> str:
    counts = [(result.pages_saved, "saved"), (result.duplicate_pages, "of them more than once"),
              (result.zero_pages, "zero"), (result.hole_pages, "holes")]  # fmt: skip
    return ", ".join(f"{format_count(count)} {word}" for count, word in counts if count) or "none"

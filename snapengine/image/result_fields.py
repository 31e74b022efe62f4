"""Type checks of the statistics in an image (its STAT record) against `snapengine.result.Result`.

A program that writes images itself may omit statistics and add its own. Members that `Result` has must have
the same type there, so that code that prints or sums them needs no checks.
"""

from __future__ import annotations

from snapengine.base.jsonfields import Fields

TEXTS = ("method", "status", "cut")
QUANTILES = ("p50", "p99", "max")
PAIRS = ("lost_runs", "fault_histogram")
NUMBERS = (
    "image_bytes", "region_bytes", "nonzero_bytes", "pages_total", "pages_saved", "zero_pages", "hole_pages",
    "duplicate_pages", "faults", "rounds", "arm_ns", "stop_ns", "duration_ns", "peak_buffer_bytes",
    "spilled_bytes", "lost_pages", "injection_ns", "pause_ns", "arming_faults",
    "t_monotonic_ns", "t_unix_ns",
)  # fmt: skip
BITS = 64


def check_statistics(stats: Fields) -> None:
    """Raise ValueError with the name of a member that has a wrong type or is out of range."""
    for name in filter(stats.has, TEXTS):
        stats.string(name)
    for name in filter(stats.has, NUMBERS):
        stats.number(name, BITS)
    for name in filter(stats.has, PAIRS):
        stats.pairs(name, BITS)
    if stats.has("fault_ns"):
        _check_quantiles(stats.object("fault_ns"))
    if stats.has("stop_parts_ns"):
        stats.object("stop_parts_ns").numbers(BITS)
    if stats.has("warnings"):
        stats.strings("warnings")
    if stats.has("not_captured"):
        for item in stats.objects("not_captured"):
            _check_not_captured(item)


def _check_quantiles(times: Fields) -> None:
    times.numbers(BITS)
    for name in QUANTILES:
        times.number(name, BITS)


def _check_not_captured(item: Fields) -> None:
    for name in ("start", "end"):
        item.number(name, BITS)
    for name in ("perms", "path", "reason"):
        item.text(name)

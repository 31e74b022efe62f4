"""The figures of one capture: what `save --json` prints and the image's stats record holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

COMPLETED = "completed"
NOT_CONVERGED = "not-converged"


@dataclass(frozen=True, slots=True)
class NotCaptured:
    """Memory of a process that is not in the image, and why. ``start`` and ``end`` are byte addresses."""

    start: int
    end: int
    perms: str
    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Result:
    """Figures of one capture. Counts are pages of 4096 bytes, times are nanoseconds.

    ``pages_total == pages_saved - duplicate_pages + zero_pages + hole_pages + lost_pages``.
    """

    method: str
    status: str
    """``"completed"`` or ``"not-converged"`` (dirty logging; there is no image then)."""
    image_bytes: int
    region_bytes: int
    """Bytes of memory that the image describes."""
    nonzero_bytes: int
    """Bytes of the pages that hold anything but zeros, once each."""
    pages_total: int
    pages_saved: int
    """Data pages written into the image, superseded ones included."""
    zero_pages: int
    """Populated pages that hold only zeros."""
    hole_pages: int
    """Pages that were not populated; the capture did not populate them."""
    duplicate_pages: int
    """Data pages in the image that a later record supersedes."""
    faults: int
    """Write and missing faults served."""
    rounds: int
    arm_ns: int
    """From the first registration until faults are served, without the wait for the target's pause."""
    stop_ns: int
    """How long the target was paused; 0 if it never was."""
    duration_ns: int
    fault_ns: dict[str, int]
    """``p50``, ``p99``, ``max``: from reading a fault to its release."""
    peak_buffer_bytes: int
    spilled_bytes: int
    lost_pages: int = 0
    lost_runs: list[tuple[int, int]] = field(default_factory=list)
    """(address, length in bytes) of memory that the target discarded, unmapped or remapped after T and
    before it was saved. Reading it from the image raises `LostPagesError`."""
    warnings: list[str] = field(default_factory=list)

    cut: str = ""
    """Of an attached process: ``"soft"`` (no thread was stopped while its memory was protected; the image has
    no registers) or ``"stop"`` (all threads were stopped)."""
    injection_ns: int = 0
    """Of an attached process: how long one thread was stopped before the capture to open the userfaultfd."""
    not_captured: list[dict[str, Any]] = field(default_factory=list)
    """Mappings of an attached process that are not in the image: ``start``, ``end``, ``perms``, ``path`` and
    ``reason``."""

    pause_ns: int = 0
    """The part of ``arm_ns`` in which no fault was answered: the longest that a writer waited for T."""
    arming_faults: int = 0
    """Faults before T that were recorded and released (two-step arming); not among ``faults``."""

    t_monotonic_ns: int = 0
    """The instant T by CLOCK_MONOTONIC (`time.monotonic_ns`), in nanoseconds. Comparable on this host until
    it reboots. 0: not known (a migration stream does not tell when its machine was stopped)."""
    t_unix_ns: int = 0
    """The same instant by CLOCK_REALTIME (`time.time_ns`), in nanoseconds since 1970-01-01 00:00 UTC:
    converted with readings of both clocks taken after T, as soon as the target runs again. 0: not known."""

    stop_parts_ns: dict[str, int] = field(default_factory=dict)
    """Of a QEMU machine: the parts of its stop (see `snapengine.qemu.target.QemuTarget`)."""

    fault_histogram: list[tuple[int, int]] = field(default_factory=list)
    """All of the times of `fault_ns`: (least ns of the bucket, faults), ascending; 8 buckets for each power
    of two, those without a fault left out. Their counts add up to `faults`."""

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types, keys in the order of the fields."""
        names = ("fault_histogram", "lost_runs")
        pairs = {name: [list(pair) for pair in getattr(self, name)] for name in names}
        return asdict(self) | pairs


def fitted_parts(parts: dict[str, int], whole_ns: int) -> dict[str, int]:
    """The parts of a machine's stop, reduced to a sum of at most `whole_ns`. ``"guest"``, the whole, is kept.

    QEMU's commands take longer than the guest is stopped: it runs until QEMU handles `stop`, and runs again
    before `cont` is answered.
    """
    found = dict(parts)
    excess = sum(ns for name, ns in found.items() if name != "guest") - whole_ns
    for name in ("stop", "cont", *found):
        less = max(0, min(excess, found.get(name, 0))) if name != "guest" else 0
        if less:
            found[name] -= less
            excess -= less
    return found

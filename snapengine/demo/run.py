"""One measurement of the demo: a guest, one live capture of it, and the check of the image."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snapengine.capture.capture import snapshot
from snapengine.demo.rows import Row
from snapengine.guest.image import check_image
from snapengine.guest.params import GuestParams
from snapengine.guest.process import GuestProcess
from snapengine.handover.peer import PeerTarget
from snapengine.image import open_image
from snapengine.options import Options
from snapengine.report.progress import follow
from snapengine.report.terminal import say
from snapengine.result import COMPLETED, Result

SETTLE_SECONDS = 0.3
UNDISTURBED_SECONDS = 0.5

Stats = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Span:
    """The guest between two readings of its counters."""

    before: Stats
    after: Stats

    @property
    def writes_per_second(self) -> float:
        """Of all writers together."""
        writes: int = sum(self.after["writes"]) - sum(self.before["writes"])
        nanoseconds: int = self.after["now_ns"] - self.before["now_ns"]
        return writes * 1e9 / nanoseconds

    def stalls(self) -> dict[str, int]:
        """``p50``, ``p99`` and ``max`` of the stalled writes; 0 if there were none.

        From histograms with eight buckets per power of two; only a new maximum is exact.
        """
        earlier = {floor: count for floor, count in self.before["stalls"]["histogram"]}
        counts = [
            (floor, count - earlier.get(floor, 0)) for floor, count in self.after["stalls"]["histogram"]
        ]
        counts = sorted((floor, count) for floor, count in counts if count > 0)
        if not counts:
            return {"p50": 0, "p99": 0, "max": 0}
        longest = self.after["stalls"]["max_ns"]
        if longest == self.before["stalls"]["max_ns"]:
            longest = counts[-1][0]
        return {"p50": percentile(counts, 0.50), "p99": percentile(counts, 0.99), "max": longest}


def percentile(counts: list[tuple[int, int]], share: float) -> int:
    """The least value that `share` of the values do not exceed; `counts`: sorted (value, count)."""
    rank = share * sum(count for _, count in counts)
    seen = 0
    for value, count in counts:
        seen += count
        if seen >= rank:
            return value
    return counts[-1][0]


def observe(guest: GuestProcess, seconds: float) -> Span:
    """Observe the guest without a capture."""
    before = guest.stats()
    time.sleep(seconds)
    return Span(before, guest.stats())


def capture(guest: GuestProcess, socket: Path, options: Options, image: Path) -> tuple[Result, Span]:
    """One live capture, and the guest's counters around it."""
    before = guest.stats()
    with snapshot(PeerTarget(socket, method=options.method), str(image), options) as running:
        follow(running)
    return running.result, Span(before, guest.stats())


def is_consistent(image: Path) -> bool:
    """Verify every checksum, restore the memory, and check that it is a consistent cut."""
    with open_image(image) as opened:
        opened.verify()
        report = check_image(opened)
    if not report.consistent:
        say(f"{image.name} is not consistent: {report.violation}")
    return report.consistent


def measure(params: GuestParams, rate: int | None, options: Options, socket: Path, image: Path) -> Row:
    """Measure one row. `rate`: pages per second, None for full speed. The image is left in `image`."""
    with GuestProcess(socket, params, rate) as guest:
        time.sleep(SETTLE_SECONDS)
        undisturbed = observe(guest, UNDISTURBED_SECONDS).writes_per_second
        result, span = capture(guest, socket, options, image)
    stalls = span.stalls()
    stalls["max"] = max(stalls["max"], result.stop_ns)  # a pause stalls every writer between two writes
    return Row(
        result=result,
        write_rate=undisturbed if rate is None else rate,
        at_most=rate is None,
        consistent=is_consistent(image) if result.status == COMPLETED else None,
        stall_ns=stalls,
        writes_kept=span.writes_per_second / undisturbed if undisturbed else None,
    )

"""The instant T by the wall clock."""

from __future__ import annotations

import time

READINGS = 3


def to_unix_ns(monotonic_ns: int) -> int:
    """CLOCK_REALTIME at an instant of CLOCK_MONOTONIC, both in nanoseconds; 0 for 0, which is no instant.

    The difference of the clocks is taken now, so call it soon: what sets the wall clock in between moves the
    answer. Of three pairs of readings the closest counts, so that a thread switch in one does no harm.
    """
    return monotonic_ns and monotonic_ns + min(_pair() for _ in range(READINGS))[1]


def _pair() -> tuple[int, int]:
    """How far apart the readings are, and CLOCK_REALTIME minus CLOCK_MONOTONIC."""
    before = time.monotonic_ns()
    wall = time.time_ns()
    after = time.monotonic_ns()
    return after - before, wall - (before + after) // 2

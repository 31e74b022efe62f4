"""Effect of a snapshot on a guest's writers: stalls of single writes, lost work, and writes per 10 ms."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

BASELINE_S = 1.0
POLL_S = 0.0005
BIN_NS = 10_000_000
Histogram = dict[int, int]  # lower bound of the bucket in ns -> count
Bins = Sequence[tuple[int, int]]


def stalls_between(before: dict[str, Any], after: dict[str, Any]) -> Histogram:
    """The stalls that ended between two `stats` of a guest."""
    counts = dict(map(tuple, after["stalls"]["histogram"]))
    for floor, count in before["stalls"]["histogram"]:
        counts[floor] -= count
    return {floor: count for floor, count in sorted(counts.items()) if count}


def quantile(histogram: Histogram, share: float) -> int:
    """The lower bound of the bucket with that quantile, in ns; 0 if the histogram is empty."""
    total, seen = sum(histogram.values()), 0
    for floor, count in sorted(histogram.items()):
        seen += count
        if seen >= share * total:
            return floor
    return 0


def spread(histogram: Histogram) -> dict[str, int]:
    """Count, p50, p99 and the longest."""
    return {
        "stalls": sum(histogram.values()),
        "p50_ns": quantile(histogram, 0.5),
        "p99_ns": quantile(histogram, 0.99),
        "longest_ns": max(histogram, default=0),
    }


def stall_quantiles(before: dict[str, Any], after: dict[str, Any]) -> dict[str, int]:
    """Count, p50 and p99 of a guest's stalls between two of its `stats`."""
    found = spread(stalls_between(before, after))
    return {name: found[name] for name in ("stalls", "p50_ns", "p99_ns")}


def after_arming(stats: Callable[[], dict[str, Any]], timeout_s: float = 5.0) -> dict[str, Any]:
    """A guest's `stats` after every stall that began before T has ended. Call it after T.

    A write that is blocked by arming completes some time after T. When every writer has completed a write
    since a reading that was taken after T, the write that was blocked at T is complete and in `stats`.
    """
    first = stats()
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        now = stats()
        if all(new > old for new, old in zip(now["writes"], first["writes"], strict=True)):
            return now
        time.sleep(POLL_S)
    raise TimeoutError(f"a writer has not completed one write in {timeout_s:g} s")


def agreement(stalls: Histogram, faults: Iterable[tuple[int, int]]) -> dict[str, float]:
    """Compare the writer's measurement of its own stores with the engine's measurement of its faults.

    `stalls` are those after T. `faults` has none from before T, except the one that blocks each writer at T.
    Each write fault is one stall, so both counts should be nearly equal. A stall without a fault is a write
    that the walk released before a fault thread read its message (the kernel then withdraws the message), or
    a write that the scheduler or an interrupt delayed.

    Times differ: the engine measures from reading a fault to the ioctl that releases it. The writer's time
    also includes the trap, the fault thread's wake-up, and its own wake-up and wait for a CPU. So no quantile
    of the writer may be below the engine's by more than a bucket.
    """
    engine = dict(faults)
    counts = sorted((sum(stalls.values()), sum(engine.values())))
    found = {"counts_agree_ratio": counts[0] / max(counts[1], 1)}
    for share, name in ((0.5, "p50"), (0.99, "p99")):
        found[f"writer_by_engine_{name}_ratio"] = quantile(stalls, share) / max(quantile(engine, share), 1)
    return found


def add_up(total: Histogram, other: Histogram) -> None:
    """Add the counts of `other` to `total`."""
    for floor, count in other.items():
        total[floor] = total.get(floor, 0) + count


def written(bins: Bins, until_ns: int) -> int:
    """Writes in the bins that begin before `until_ns`."""
    return sum(writes for at, writes in bins if at < until_ns)


def lost_work_ms(bins: Bins, began_ns: int, ended_ns: int, rate: float) -> float:
    """Milliseconds of lost work: missing writes between two times / `rate` (writes per second)."""
    return (ended_ns - began_ns) / 1e6 - written(bins, ended_ns) / rate * 1e3


def undisturbed(bins_since: Callable[[int], Bins]) -> float:
    """Writes per second, measured now for BASELINE_S."""
    began = time.monotonic_ns()
    time.sleep(BASELINE_S)
    ended = time.monotonic_ns()
    return written(bins_since(began), ended) / ((ended - began) / 1e9)


def bins_around(bins: Bins, began_ns: int, ended_ns: int) -> dict[str, Any]:
    """For a picture: writes per bin, with times in ns since the snapshot began, and its end."""
    first, last = bins[0][0], bins[-1][0]
    by_time = dict(bins)
    times = range(first, last + BIN_NS, BIN_NS)
    return {
        "at_ns": [at - began_ns for at in times],
        "writes": [by_time.get(at, 0) for at in times],
        "ended_ns": ended_ns - began_ns,
    }

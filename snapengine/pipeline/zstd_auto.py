"""Choice of the zstd level by the speed of the sink: the highest level at which compression is no slower than
writing. A smaller image then costs CPU time, but does not prolong the capture.

The encoder threads report the cost of each chunk and ask for the level of the next one, with the GIL held.
The level changes by one step at a time, because the cost of the sink is known only for the current level:
while compression is the bottleneck, a sink with a limited rate appears faster than it is.

Levels are compared on the same chunks (`probe`), since the compression ratio varies more between parts of
memory than between levels.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

# Level: ns of one thread per byte, and stored bytes per byte, for the files of Python's library in chunks of
# 1 MiB (AMD Zen 4). Only the ratios between levels are used. Level 4 performs like 3, levels above 6 like 6.
# Levels below 1 save hardly any time, and images grow by a quarter or more (bench/NOTES.md).
TYPICAL = {1: (1.88, 0.291), 2: (2.15, 0.278), 3: (2.57, 0.267), 5: (5.44, 0.256), 6: (7.69, 0.250)}
LEVELS = tuple(TYPICAL)
START = 1
STEP_CHUNKS = 16  # minimum at one level: several times the burst that a rate limit permits
PROBES = 4  # chunks that are also compressed at the next level before it is chosen
PROBE_LIFETIME_CHUNKS = 256  # after these, the results of probes are outdated
OLD_WEIGHT = 0.8  # of the moving averages: weight of the old value
MAX_SIZE_RATIO = 0.98  # a higher level is chosen only if it reduces the size to this, and takes no longer
MAX_TIME_RATIO = 0.95  # a lower level, which enlarges the image, only if it reduces the time to this


@dataclass(slots=True)
class Step:
    """Cost and size at a level, relative to the next lower level."""

    cost: float
    ratio: float
    probes: int = 0
    chunk: int = 0


def _typical(at: int) -> Step:
    (low_cost, low_ratio), (cost, ratio) = TYPICAL[LEVELS[at - 1]], TYPICAL[LEVELS[at]]
    return Step(cost / low_cost, ratio / low_ratio)


class Levels:
    """The level for the next chunks. `threads` threads compress in parallel; one at a time writes."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._lock = threading.Lock()
        self._at = LEVELS.index(START)
        self._chunks = 0
        self._steps = [_typical(max(at, 1)) for at in range(len(LEVELS))]  # [i]: relative to i - 1
        self._restart()

    def _restart(self) -> None:
        self._probing = False
        self._level_chunks = 0
        self._cost = self._ratio = 0.0

    @property
    def level(self) -> int:
        """The level for the next chunk."""
        return LEVELS[self._at]

    def probe(self, level: int) -> int | None:
        """The level at which to recompress a chunk that was compressed at `level`; None: no probe is due."""
        above = LEVELS.index(level) + 1
        return LEVELS[above] if self._probing and level == self.level and above < len(LEVELS) else None

    def compare(self, level: int, cost: float, ratio: float) -> None:
        """Report a probe: cost and size of a chunk at `level`, relative to the next lower level."""
        with self._lock:
            step = self._steps[LEVELS.index(level)]
            if self._chunks - step.chunk > PROBE_LIFETIME_CHUNKS:
                step.probes = 0
            step.cost = (step.cost * step.probes + cost) / (step.probes + 1)
            step.ratio = (step.ratio * step.probes + ratio) / (step.probes + 1)
            step.probes += 1
            step.chunk = self._chunks

    def note(self, level: int, cost: float, ratio: float, sink_cost: float) -> None:
        """Report a chunk compressed at `level`: `cost` in ns of a thread, `ratio` in stored bytes, per byte.

        `sink_cost` is the measured cost of the sink in ns per stored byte; 0 if nothing was written yet.
        """
        with self._lock:
            self._chunks += 1
            if level != self.level:
                return  # compression began before the last change of the level
            weight = OLD_WEIGHT if self._level_chunks else 0.0
            self._cost = weight * self._cost + (1 - weight) * cost
            self._ratio = weight * self._ratio + (1 - weight) * ratio
            self._level_chunks += 1
            if self._level_chunks >= STEP_CHUNKS and sink_cost > 0:
                self._choose(sink_cost)

    def _choose(self, sink_cost: float) -> None:
        self._probing = False
        pace = self._pace(1, 1, sink_cost)
        if self._at and self._is_faster_below(self._steps[self._at], pace, sink_cost):
            self._at -= 1
            self._restart()
        elif self._at + 1 < len(LEVELS) and self._is_smaller_above(self._at + 1, pace, sink_cost):
            if self._is_known(self._at + 1):
                self._at += 1
                self._restart()
            else:
                self._probing = True

    def _is_known(self, at: int) -> bool:
        step = self._steps[at]
        return step.probes >= PROBES and self._chunks - step.chunk <= PROBE_LIFETIME_CHUNKS

    def _is_faster_below(self, step: Step, pace: float, sink_cost: float) -> bool:
        max_ratio = MAX_TIME_RATIO if step.ratio <= MAX_SIZE_RATIO else 1.0
        return self._pace(1 / step.cost, 1 / step.ratio, sink_cost) < pace * max_ratio

    def _is_smaller_above(self, at: int, pace: float, sink_cost: float) -> bool:
        step = self._steps[at] if self._is_known(at) else _typical(at)
        return step.ratio <= MAX_SIZE_RATIO and self._pace(step.cost, step.ratio, sink_cost) <= pace

    def _pace(self, cost: float, ratio: float, sink_cost: float) -> float:
        """Nanoseconds per byte of data if cost and size were the given multiples of the current ones. Each
        thread compresses, then writes; only one writes at a time."""
        write = self._ratio * ratio * sink_cost
        return max(write, (self._cost * cost + write) / self._threads)

"""Which zstd level fits the sink: the highest that does not take longer than writing does, so that a smaller
image costs CPU time, but no time.

Fed by the encoder threads with what each chunk took, asked for the level of the next; needs nothing else, and
is called with the GIL only. It goes one level at a time, as the sink's cost is known for the present one
only: while compression is the bottleneck, a sink with a limited rate looks faster than it is.

Levels are compared on the same chunks (`probe`): from one part of memory to the next sizes differ by more
than from level to level.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

# Level: ns of a thread per byte and stored bytes per byte, of the files of Python's library in chunks of
# 1 MiB (AMD Zen 4). Only the steps between them count. Level 4 does as 3 does, those above 6 as 6. Below 1
# images grow by a quarter and more for hardly any time (bench/NOTES.md).
TYPICAL = {1: (1.88, 0.291), 2: (2.15, 0.278), 3: (2.57, 0.267), 5: (5.44, 0.256), 6: (7.69, 0.250)}
LEVELS = tuple(TYPICAL)
START = 1
STEP_CHUNKS = 16  # at one level before the next: several times the burst that a rate limit lets through
PROBES = 4  # chunks that are compressed at the next level, too, before it is chosen
FORGET_CHUNKS = 256  # until levels are compared anew
KEEP = 0.8  # of the old estimate, for each new chunk
SMALLER = 0.98  # what a higher level must make of the size; it may not take longer
FASTER = 0.95  # what a lower level must make of the time, as it makes the image larger


@dataclass(slots=True)
class Step:
    """What a level makes of the cost and of the size at the level below."""

    cost: float
    ratio: float
    probes: int = 0
    chunk: int = 0


def _typical(at: int) -> Step:
    (low_cost, low_ratio), (cost, ratio) = TYPICAL[LEVELS[at - 1]], TYPICAL[LEVELS[at]]
    return Step(cost / low_cost, ratio / low_ratio)


class Levels:
    """The level for the chunks to come; `threads` compress beside each other and write by turns."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._lock = threading.Lock()
        self._at = LEVELS.index(START)
        self._chunks = 0
        self._steps = [_typical(max(at, 1)) for at in range(len(LEVELS))]  # [at]: from at - 1 to at
        self._restart()

    def _restart(self) -> None:
        self._probing = False
        self._since = 0
        self._cost = self._ratio = 0.0

    @property
    def level(self) -> int:
        """The level for the next chunk."""
        return LEVELS[self._at]

    def probe(self, level: int) -> int | None:
        """At which level to compress a chunk, too, that was compressed at `level`, to `compare` them."""
        above = LEVELS.index(level) + 1
        return LEVELS[above] if self._probing and level == self.level and above < len(LEVELS) else None

    def compare(self, level: int, cost: float, ratio: float) -> None:
        """What `probe`, then `level`, made of the cost and the size that a chunk had at the level below."""
        with self._lock:
            step = self._steps[LEVELS.index(level)]
            if self._chunks - step.chunk > FORGET_CHUNKS:
                step.probes = 0
            step.cost = (step.cost * step.probes + cost) / (step.probes + 1)
            step.ratio = (step.ratio * step.probes + ratio) / (step.probes + 1)
            step.probes += 1
            step.chunk = self._chunks

    def note(self, level: int, cost: float, ratio: float, sink_cost: float) -> None:
        """A chunk was compressed at `level`: `cost` ns of a thread and `ratio` stored bytes per byte of data.

        `sink_cost`: ns per stored byte, by what was written so far; 0: nothing yet.
        """
        with self._lock:
            self._chunks += 1
            if level != self.level:
                return  # begun before the last change
            keep = KEEP if self._since else 0.0
            self._cost = keep * self._cost + (1 - keep) * cost
            self._ratio = keep * self._ratio + (1 - keep) * ratio
            self._since += 1
            if self._since >= STEP_CHUNKS and sink_cost > 0:
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
        return step.probes >= PROBES and self._chunks - step.chunk <= FORGET_CHUNKS

    def _is_faster_below(self, step: Step, pace: float, sink_cost: float) -> bool:
        wanted = FASTER if step.ratio <= SMALLER else 1.0
        return self._pace(1 / step.cost, 1 / step.ratio, sink_cost) < pace * wanted

    def _is_smaller_above(self, at: int, pace: float, sink_cost: float) -> bool:
        step = self._steps[at] if self._is_known(at) else _typical(at)
        return step.ratio <= SMALLER and self._pace(step.cost, step.ratio, sink_cost) <= pace

    def _pace(self, cost: float, ratio: float, sink_cost: float) -> float:
        """Nanoseconds per byte of data with so many times the present cost and size: a thread compresses,
        then writes; only one writes at a time."""
        write = self._ratio * ratio * sink_cost
        return max(write, (self._cost * cost + write) / self._threads)

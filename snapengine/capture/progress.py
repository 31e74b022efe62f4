"""How far a capture is."""

from __future__ import annotations

import time
from dataclasses import dataclass

from snapengine.capture.resources import Resources
from snapengine.options import WRITE_TRACKING, Options


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a capture is. ``phase``: ``"arming"``, ``"saving"``, ``"writing"`` or ``"done"``."""

    phase: str
    pages_total: int
    pages_done: int
    image_bytes: int
    faults: int
    rounds: int
    seconds: float


def progress_of(resources: Resources, options: Options, done: bool, ended: int) -> Progress:
    """The progress now. `done`: the capture has ended, at `ended` (CLOCK_MONOTONIC, nanoseconds; 0: not yet).
    Any thread, at any time."""
    session, writer = resources.session, resources.writer
    began, now = resources.times.began, ended or time.monotonic_ns()
    seconds = (now - began) / 1e9 if began else 0.0
    if session is None:
        return Progress("done" if done else "arming", 0, 0, 0, 0, 0, seconds)
    counts = session.counters()
    pages = counts["data"] + counts["zero"] + counts["hole"] + counts["lost"]
    phase = "saving" if session.armed else "arming"
    if session.armed and pages >= session.total_pages and options.method == WRITE_TRACKING:
        phase = "writing"
    return Progress(
        phase="done" if done else phase,
        pages_total=session.total_pages,
        pages_done=pages,
        image_bytes=writer.image_bytes if writer is not None else 0,
        faults=counts["faults"],
        rounds=session.rounds,
        seconds=seconds,
    )

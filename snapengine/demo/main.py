"""`snapengine demo`: compare both methods on the same guest at several write rates."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from snapengine.base.units import format_count, format_size
from snapengine.demo.plot import draw
from snapengine.demo.rows import Row, print_rows, summary
from snapengine.demo.run import measure
from snapengine.errors import UnsupportedError
from snapengine.guest.params import GuestParams
from snapengine.options import METHODS, Options
from snapengine.report.plots import check_plot
from snapengine.report.terminal import EXIT_ERROR, EXIT_OK, print_json, say

DEFAULT_RATES = "0,2000,10000,40000,max"
GIVE_UP_FACTOR = 4
"""Dirty logging gives up after this multiple of the time that one pass through the sink takes."""
MIN_SECONDS = 4.0


def parse_rates(text: str) -> tuple[int | None, ...]:
    """Parse ``0,2000,max`` as pages per second; None: no limit. Raises ValueError."""
    rates: list[int | None] = []
    for word in (part.strip() for part in text.split(",")):
        if word != "max" and not (word.isascii() and word.isdigit()):
            raise ValueError(f"rates: {word!r} is neither a whole number of pages per second nor max")
        rates.append(None if word == "max" else int(word))
    return tuple(rates)


@dataclass(frozen=True, slots=True)
class Plan:
    """Settings of the demo. `size` is in bytes, `sink_rate` in bytes per second (0: no limit)."""

    size: int
    rates: tuple[int | None, ...]
    sink_rate: int
    keep: str | None = None
    """Directory for the images; None: remove each image after its check."""

    def params(self) -> GuestParams:
        """The guest: shared memory like a VMM's, 10 % zero pages, 10 % not populated at the start.

        With fewer than four CPUs it has one writer, so that writers and engine do not compete for CPUs.
        Otherwise it has two, whose order the check verifies, too. Raises ValueError.
        """
        writers = 1 if len(os.sched_getaffinity(0)) < 4 else 2
        return GuestParams(size=self.size, backing="memfd", threads=writers, zero_percent=10, hole_percent=10)

    def options(self, method: str) -> Options:
        """Options of a capture. The time limit of dirty logging follows from size and sink rate."""
        one_pass = self.size / self.sink_rate if self.sink_rate else 0.0
        return Options(
            method=method,
            rate_limit=self.sink_rate,
            max_seconds=max(GIVE_UP_FACTOR * one_pass, MIN_SECONDS),
        )

    def title(self) -> str:
        """The title of table and picture."""
        sink = f"{format_size(self.sink_rate)}/s" if self.sink_rate else "not limited"
        return f"Guest of {format_size(self.size)}, sink {sink}"


@contextmanager
def directories(keep: str | None) -> Iterator[tuple[Path, Path]]:
    """A temporary directory for the socket, and the directory for the images (`keep`, or the same)."""
    with tempfile.TemporaryDirectory(prefix="snapengine-demo-") as name:
        images = Path(keep or name)
        images.mkdir(parents=True, exist_ok=True)
        yield Path(name), images


def measure_all(plan: Plan) -> list[Row]:
    """Capture by every method at every rate."""
    rows = []
    params = plan.params()
    with directories(plan.keep) as (temporary, images):
        for rate in plan.rates:
            for method in METHODS:
                speed = "full speed" if rate is None else f"{format_count(rate)} writes/s"
                say(f"{method}, guest at {speed}")
                image = images / f"{method}-{'max' if rate is None else rate}.img"
                rows.append(measure(params, rate, plan.options(method), temporary / "guest.sock", image))
                if plan.keep is None:
                    image.unlink(missing_ok=True)
    return rows


def can_plot(path: str | None) -> bool:
    """Whether to draw. Without matplotlib, warn that there will be no picture."""
    if path is None:
        return False
    try:
        check_plot(path)
    except UnsupportedError as error:
        say(f"warning: no picture: {error}")
        return False
    return True


def run(plan: Plan, *, json: bool = False, plot: str | None = None) -> int:
    """Measure, print the table or the rows as JSON, and return the exit code."""
    drawing = can_plot(plot)
    rows = measure_all(plan)
    if json:
        print_json([row.to_json() for row in rows])
    else:
        print(f"\n{plan.title()}\n")
        print_rows(rows)
        print(f"\n{summary(rows)}")
    if drawing and plot is not None:
        draw(rows, plot, plan.title())
        say(f"wrote {plot}")
    sys.stdout.flush()
    return EXIT_ERROR if any(row.consistent is False for row in rows) else EXIT_OK

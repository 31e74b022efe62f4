"""`snapengine demo`: the main job. Both methods on the same guest at several write rates, side by side."""

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
"""Dirty logging may take so many times what one pass through the sink takes; then it gives up."""
MIN_SECONDS = 4.0


def parse_rates(text: str) -> tuple[int | None, ...]:
    """``0,2000,max`` as pages a second; None is as fast as the guest can. Raises ValueError."""
    rates: list[int | None] = []
    for word in (part.strip() for part in text.split(",")):
        if word != "max" and not (word.isascii() and word.isdigit()):
            raise ValueError(f"rates: {word!r} is neither a whole number of pages a second nor max")
        rates.append(None if word == "max" else int(word))
    return tuple(rates)


@dataclass(frozen=True, slots=True)
class Plan:
    """What the demo does. Sizes in bytes, `sink_rate` in bytes a second (0: no limit)."""

    size: int
    rates: tuple[int | None, ...]
    sink_rate: int
    keep: str | None = None
    """Directory for the images; None: they are removed after the check."""

    def params(self) -> GuestParams:
        """The guest: shared memory as of a VMM, a tenth of it zeros, a tenth not touched at the start.

        One writer on two processors, or the writers and the engine would compete for them; two writers,
        whose order the check also proves, where there are more. Raises ValueError.
        """
        writers = 1 if len(os.sched_getaffinity(0)) < 4 else 2
        return GuestParams(size=self.size, backing="memfd", threads=writers, zero_percent=10, hole_percent=10)

    def options(self, method: str) -> Options:
        """The same for both methods; what bounds dirty logging follows from size and sink rate."""
        one_pass = self.size / self.sink_rate if self.sink_rate else 0.0
        return Options(
            method=method,
            rate_limit=self.sink_rate,
            max_seconds=max(GIVE_UP_FACTOR * one_pass, MIN_SECONDS),
        )

    def title(self) -> str:
        """One line above table and picture."""
        sink = f"{format_size(self.sink_rate)}/s" if self.sink_rate else "not limited"
        return f"Guest of {format_size(self.size)}, sink {sink}"


@contextmanager
def rooms(keep: str | None) -> Iterator[tuple[Path, Path]]:
    """A directory for the socket and one for the images; what is temporary is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="snapengine-demo-") as name:
        images = Path(keep or name)
        images.mkdir(parents=True, exist_ok=True)
        yield Path(name), images


def measure_all(plan: Plan) -> list[Row]:
    """Every method at every rate."""
    rows = []
    params = plan.params()
    with rooms(plan.keep) as (room, images):
        for rate in plan.rates:
            for method in METHODS:
                speed = "full speed" if rate is None else f"{format_count(rate)} writes/s"
                say(f"{method}, guest at {speed}")
                image = images / f"{method}-{'max' if rate is None else rate}.img"
                rows.append(measure(params, rate, plan.options(method), room / "guest.sock", image))
                if plan.keep is None:
                    image.unlink(missing_ok=True)
    return rows


def can_plot(path: str | None) -> bool:
    """Whether to draw. Without matplotlib the demo still runs, and says why there is no picture."""
    if path is None:
        return False
    try:
        check_plot(path)
    except UnsupportedError as error:
        say(f"warning: no picture: {error}")
        return False
    return True


def run(plan: Plan, *, json: bool = False, plot: str | None = None) -> int:
    """Measure, and print the table, or the rows as JSON; returns the exit code."""
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
        say(f"the picture is in {plot}")
    sys.stdout.flush()
    return EXIT_ERROR if any(row.consistent is False for row in rows) else EXIT_OK

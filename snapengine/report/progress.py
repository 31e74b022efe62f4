"""The progress bar of a capture: on stderr, and only when that is a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from snapengine.base.units import format_count, format_size

if TYPE_CHECKING:
    from rich.progress import Progress

    from snapengine.capture.capture import Capture
    from snapengine.capture.progress import Progress as CaptureProgress

DRAW_SECONDS = 0.08  # the least between two drawings
WORDS = {"arming": "protecting", "saving": "saving", "writing": "writing out", "done": "done"}


def details(now: CaptureProgress) -> str:
    """What stands behind the bar: bytes written, their rate, faults, and rounds where there are any."""
    parts = [format_size(now.image_bytes)]
    if now.seconds > 0:
        parts.append(f"{format_size(now.image_bytes / now.seconds)}/s")
    if now.faults:
        parts.append(f"{format_count(now.faults)} faults")
    if now.rounds > 1:
        parts.append(f"round {now.rounds}")
    return "  ".join(parts)


class Bar:
    """Shows the progress of one capture; `update` it about ten times a second.

    Where there is no terminal to draw on, nothing is drawn, nor is what draws imported. A terminal that goes
    away meanwhile ends the drawing, not the capture.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._bar = None if quiet or not sys.stderr.isatty() else _make_bar()
        self._drawn = 0.0

    def update(self, now: CaptureProgress) -> None:
        """Draw `now`. Dirty logging may save more pages than there are: the bar then stays full."""
        self._draw(
            description=WORDS.get(now.phase, now.phase),
            total=now.pages_total or None,
            completed=min(now.pages_done, now.pages_total),
            details=details(now),
        )

    def of_bytes(self, word: str, total: int | None = None) -> Callable[[int], None]:
        """A function that draws so many bytes, of `total` if that is known, of something without pages."""
        began = time.monotonic()

        def draw(done: int) -> None:
            seconds = time.monotonic() - began
            rate = f"  {format_size(round(done / seconds))}/s" if seconds > 0 else ""
            known = min(done, total) if total else done
            self._draw(description=word, total=total, completed=known, details=format_size(done) + rate)

        return draw

    def _draw(self, **what: Any) -> None:
        now = time.monotonic()
        if self._bar is not None and now - self._drawn >= DRAW_SECONDS:
            self._drawn = now
            self._or_end(lambda bar: bar.update(bar.task_ids[0], refresh=True, **what))

    def _or_end(self, act: Callable[[Progress], None]) -> None:
        assert self._bar is not None
        try:
            act(self._bar)
        except OSError:
            self._bar = None

    def __enter__(self) -> Bar:
        if self._bar is not None:
            self._or_end(lambda bar: bar.start())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._or_end(lambda bar: bar.stop())


def _make_bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[details]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        auto_refresh=False,  # by a thread, which an interrupt as it starts would leave behind
    )
    bar.add_task("waiting", total=None, details="")
    return bar


def follow(capture: Capture, quiet: bool = False) -> None:
    """Show the progress until the capture is over."""
    with Bar(quiet) as bar:
        while not capture.wait(0.1):
            bar.update(capture.progress())

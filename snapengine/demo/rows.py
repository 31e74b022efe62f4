"""The rows of the demo, as JSON and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from snapengine.base.units import format_count, format_ns, format_size
from snapengine.report.tables import print_table
from snapengine.result import COMPLETED, Result

COLUMNS = (
    "method", "writes/s", "status", "image", "÷ non-zero", "time", "rounds", "faults",
    "stall p50", "p99", "max", "writes kept", "consistent",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One capture of the guest at one write rate."""

    result: Result
    write_rate: float
    """Pages that the guest writes per second without a capture; 0: none."""
    at_most: bool
    """The guest writes at full speed; `write_rate` was measured."""
    consistent: bool | None
    """The restored memory is the guest's state at one instant; None: there is no image."""
    stall_ns: dict[str, int]
    """``p50``, ``p99`` and ``max`` of the writes that took more than 3 microseconds during the capture.
    ``max`` includes a pause of the guest."""
    writes_kept: float | None
    """Write rate during the capture / without it; None at rate 0."""

    @property
    def completed(self) -> bool:
        """There is an image."""
        return self.result.status == COMPLETED

    @property
    def ratio(self) -> float:
        """Image size / bytes that are not zero."""
        return self.result.image_bytes / max(self.result.nonzero_bytes, 1)

    @property
    def rate_text(self) -> str:
        """The write rate as the table shows it."""
        return ("max " if self.at_most else "") + format_count(self.write_rate)

    def to_json(self) -> dict[str, Any]:
        """The figures of the capture and of the guest."""
        return self.result.to_json() | {
            "write_rate": round(self.write_rate),
            "consistent": self.consistent,
            "stall_ns": self.stall_ns,
            "writes_kept": self.writes_kept,
        }


def cells(row: Row) -> list[str]:
    """One line of the table."""
    result = row.result
    return [
        result.method,
        row.rate_text,
        result.status,
        format_size(result.image_bytes),
        f"{row.ratio:.3f}",
        format_ns(result.duration_ns),
        str(result.rounds),
        format_count(result.faults),
        *(format_ns(row.stall_ns[name]) if row.stall_ns[name] else "-" for name in ("p50", "p99", "max")),
        "-" if row.writes_kept is None else f"{row.writes_kept:.0%}",
        {True: "yes", False: "NO", None: "-"}[row.consistent],
    ]


def print_rows(rows: Sequence[Row], out: TextIO | None = None) -> None:
    """Print all rows, with an empty line between two write rates."""
    lines: list[list[str]] = []
    for before, row in zip([None, *rows[:-1]], rows, strict=True):
        if before is not None and before.rate_text != row.rate_text:
            lines.append([])
        lines.append(cells(row))
    numbers = [i for i, title in enumerate(COLUMNS) if title not in ("method", "status")]
    print_table(lines, titles=COLUMNS, right=numbers, out=out)


def summary(rows: Sequence[Row]) -> str:
    """One line per method that sums up the table."""
    lines = []
    for method in dict.fromkeys(row.result.method for row in rows):
        own = [row for row in rows if row.result.method == method]
        done = [row for row in own if row.completed]
        parts = []
        if done:
            low, high = min(row.ratio for row in done), max(row.ratio for row in done)
            parts.append(f"images of {low:.3f} to {high:.3f} x the memory that is not zero")
            wrong = [row.rate_text for row in done if not row.consistent]
            parts.append(f"NOT CONSISTENT at {', '.join(wrong)}" if wrong else "all of them consistent")
        if len(done) < len(own):
            rates = ", ".join(row.rate_text for row in own if not row.completed)
            parts.append(f"did not converge at {rates} writes/s")
        lines.append(f"{method}: {'; '.join(parts)}.")
    return "\n".join(lines)

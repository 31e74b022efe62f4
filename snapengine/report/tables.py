"""Tables that fit the terminal: a cell that is too wide continues on the next line, nothing is truncated."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from snapengine.base.names import without_controls

GAP = "  "
LEAST_COLUMNS = 6  # a column is not made narrower than that while another is wider
OURS = "\u202f"  # not printable to Python, but format_count() puts it between thousands


def width_of(out: TextIO) -> int | None:
    """$COLUMNS, or columns of the terminal that `out` is; None: a file or pipe, where lines may be long."""
    given = os.environ.get("COLUMNS", "")
    if given.isascii() and given.isdigit() and int(given) > 0:
        return int(given)
    try:
        return os.get_terminal_size(out.fileno()).columns or None
    except (OSError, ValueError, AttributeError):
        return None


def print_text(text: str, out: TextIO | None = None) -> None:
    """A sentence, in as many lines as it needs."""
    print_table([(text,)], out=out)


def print_table(
    rows: Iterable[Sequence[str]],
    *,
    titles: Sequence[str] = (),
    right: Iterable[int] = (),
    out: TextIO | None = None,
    width: int | None = None,
) -> None:
    """Print rows of equally many cells; the columns of the numbers `right` are aligned to the right.

    An empty row becomes an empty line. ``width``: in columns; default: that of the terminal.
    """
    out = out or sys.stdout
    for line in table_lines(rows, titles, right, width or width_of(out)):
        print(line, file=out)


def table_lines(
    rows: Iterable[Sequence[str]], titles: Sequence[str], right: Iterable[int], width: int | None
) -> list[str]:
    """The lines of the table."""
    cells = [[clean(cell) for cell in row] for row in ([titles] if titles else []) + list(rows)]
    count = max(map(len, cells), default=0)
    natural = [max(columns(row[i]) for row in cells if row) for i in range(count)]
    widths = fitted(natural, width)
    aligned = frozenset(right)
    return [line for row in cells for line in _row_lines(row, widths, aligned)]


def fitted(natural: list[int], width: int | None) -> list[int]:
    """Widths of columns: the widest are made narrower until all fit."""
    widths = list(natural)
    if width is None:
        return widths
    excess = sum(widths) + len(GAP) * (len(widths) - 1) - width
    while excess > 0 and widths and max(widths) > 1:
        widest = max(widths)
        narrow = [w for w in widths if w < widest]
        floor = max([LEAST_COLUMNS, *narrow]) if widest > LEAST_COLUMNS else 1
        columns = [i for i, w in enumerate(widths) if w == widest]
        step = max(min(widest - floor, excess // len(columns)), 1)
        for i in columns:
            if excess > 0:
                widths[i] -= min(step, excess)
                excess -= min(step, excess)
    return widths


def _row_lines(row: Sequence[str], widths: list[int], right: frozenset[int]) -> list[str]:
    parts = [wrapped(cell, widths[i]) for i, cell in enumerate(row)]
    lines = []
    for number in range(max(map(len, parts), default=1)):
        texts = [part[number] if number < len(part) else "" for part in parts]
        lines.append(GAP.join(map(_padded, texts, widths, (i in right for i in range(len(texts))))).rstrip())
    return lines


def _padded(text: str, width: int, to_the_right: bool) -> str:
    blank = " " * (width - columns(text))
    return blank + text if to_the_right else text + blank


def columns(text: str) -> int:
    """How many columns of a terminal the text takes: two for each wide (East Asian) character."""
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(_columns_of(unicodedata, c) for c in text)


def _columns_of(unicodedata: Any, character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _fitting(text: str, width: int) -> int:
    """How many characters from the start fit; at least one."""
    end = min(len(text), width)
    while end > 1 and columns(text[:end]) > width:
        end -= 1
    return max(end, 1)


def wrapped(text: str, width: int) -> list[str]:
    """`text` in lines of at most `width` columns, broken at spaces where there are any."""
    lines = []
    while columns(text) > width and len(text) > 1:
        fitting = _fitting(text, width)
        at = text.rfind(" ", 1, fitting + 1)
        end = at if at > 0 else fitting
        lines.append(text[:end].rstrip())
        text = text[end:].lstrip()
    return [*lines, text]


def clean(text: str) -> str:
    """`text` without characters that control the terminal."""
    return OURS.join(without_controls(part) for part in text.split(OURS))

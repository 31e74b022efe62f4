"""One row of the table of figures: what must be reached, what was, and the floor of the same run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from rich.table import Table

from snapengine.base.units import format_count, format_ns, format_size

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure that must be reached; `values` has one entry per round or capture."""

    name: str
    must: str
    values: list[float]
    unit: str
    limit: float
    at_least: bool = False
    full_size: bool = True
    every: bool = False
    """Each value must reach the limit, not only the median."""
    aim: str = ""
    aim_limit: float | None = None
    floor: str = ""
    """The sample that the figure stands on, of the same rounds as `of`."""
    floor_values: list[float] = field(default_factory=list)
    of: list[float] = field(default_factory=list)
    """What is divided by the floor, round by round: `values` if they are of the floor's unit."""

    def _reaches(self, value: float, limit: float) -> bool:
        return value >= limit if self.at_least else value <= limit

    @property
    def met(self) -> str:
        """``"yes"``, ``"no"``, ``"median only"``, or ``"-"`` where the run was too small to tell; with
        ``", aim"`` if the median reaches what is aimed at (``"aim"`` alone where nothing must be reached)."""
        if not self.full_size or not self.values:
            return "-"
        middle = median(self.values)
        aim = ", aim" if self.aim_limit is not None and self._reaches(middle, self.aim_limit) else ""
        if not self.must:
            return aim.removeprefix(", ") or "-"
        if all(self._reaches(value, self.limit) for value in self.values):
            return "yes" + aim
        return "median only" + aim if self._reaches(middle, self.limit) and not self.every else "no"

    @property
    def ratios(self) -> list[float]:
        """To the floor, round by round."""
        return [value / floor for value, floor in zip(self.of, self.floor_values, strict=True) if floor]


_FORMATS: dict[str, Callable[[float], str]] = {
    "ns": lambda value: format_ns(round(value)),
    "bytes": lambda value: format_size(round(value)),
    "rate": lambda value: f"{value / 1e9:.2f} GB/s",
    "ratio": lambda value: f"{value:.4f}" if 0.99 < value < 1.01 else f"{value:.3g}",
    "count": lambda value: format_count(round(value)),
}


def unit_of(sample: str) -> str:
    """The unit that the name of a sample ends with."""
    unit = sample.rsplit("_", 1)[-1]
    return unit if unit in _FORMATS else "count"


def show(value: float, unit: str) -> str:
    """A value with its unit."""
    return _FORMATS[unit](value)


def spread(values: Sequence[float], unit: str) -> tuple[str, str]:
    """Median, and [min .. max]."""
    return show(median(values), unit), f"[{show(min(values), unit)} .. {show(max(values), unit)}]"


def make_table(title: str, *columns: str) -> Table:
    """A table without lines; all columns but the first to the right."""
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def figure_table(found: Sequence[Figure], title: str = "\nWhat it must reach") -> Table:
    """What must be reached, and what was. The columns of aims and floors only where any row has them."""
    aims, floors = any(figure.aim for figure in found), any(figure.floor_values for figure in found)
    columns = ["figure", "must", *(["aim"] if aims else []), "median", "min .. max", "n", "met"]
    table = make_table(title, *columns, *(["floor", "ratio to it"] if floors else []))
    for figure in found:
        table.add_row(
            figure.name, figure.must, *([figure.aim] if aims else []), *spread(figure.values, figure.unit),
            str(len(figure.values)), figure.met, *(floor_cells(figure) if floors else []),
        )  # fmt: skip
    return table


def floor_cells(figure: Figure) -> tuple[str, str]:
    """The floor with its median, and the median of the ratios."""
    if not figure.floor_values:
        return "", ""
    label = figure.floor.removesuffix("_" + unit_of(figure.floor)).replace("_", " ")
    value = show(median(figure.floor_values), unit_of(figure.floor))
    return f"{label} {value}", f"{median(figure.ratios):.3g}" if figure.ratios else ""

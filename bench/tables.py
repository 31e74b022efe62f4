"""The tables of the bench's figures; all have one style."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from figures import Bench, Figure, Run, label_of, unit_of
from goals import Verdict
from qemu_names import OURS
from rich.table import Table

from snapengine.base.units import format_count, format_ns, format_size
from snapengine.options import DIRTY_LOGGING, MIB, WRITE_TRACKING

_FORMATS: dict[str, Callable[[float], str]] = {
    "ns": format_ns,
    "bytes": format_size,
    "rate": lambda value: f"{value / 1e9:.2f} GB/s",
    "ratio": lambda value: f"{value:.4f}" if 0.99 < value < 1.01 else f"{value:.3g}",
    "count": format_count,
}


def show(value: float, unit: str) -> str:
    """A value with its unit."""
    return _FORMATS[unit](value)


def show_range(figure: Figure) -> str:
    """Least and largest value."""
    return f"{show(figure.min, figure.unit)} .. {show(figure.max, figure.unit)}"


def make_table(title: str, *columns: str) -> Table:
    """A table without lines; all columns but the first to the right."""
    table = Table(box=None, pad_edge=False, title=f"\n{title}", title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def floor_cells(figure: Figure) -> tuple[str, str]:
    """The floor with its median, and the ratio to it."""
    if figure.floor_median is None:
        return "", ""
    floor = f"{label_of(figure.floor)} {show(figure.floor_median, unit_of(figure.floor))}"
    return floor, "" if figure.floor_ratio is None else f"{figure.floor_ratio:.3g}"


def goal_table(verdicts: Sequence[Verdict]) -> Table:
    """Each goal and its figure."""
    columns = ("figure", "must", "aim", "median", "min .. max", "n", "met", "floor", "ratio to it")
    table = make_table("Goals", *columns)
    for verdict in verdicts:
        goal, figure = verdict.goal, verdict.figure
        table.add_row(
            verdict.name, goal.must, goal.aim, show(figure.median, figure.unit), show_range(figure),
            str(figure.n), verdict.met, *floor_cells(verdict.floored),
        )  # fmt: skip
    return table


def figure_table(run: Run) -> Table:
    """Every figure of every bench."""
    table = make_table("All figures", "bench", "figure", "median", "min .. max", "n", "floor", "ratio to it")
    for bench in run.benches:
        name = bench.name.removeprefix("bench_")
        for sample, figure in bench.figures.items():
            middle = show(figure.median, figure.unit)
            count, floor = str(figure.n), floor_cells(figure)
            table.add_row(name, label_of(sample), middle, show_range(figure), count, *floor)
            name = ""
    return table


def image_table(run: Run) -> Table:
    """Image sizes over write rate and sink rate, the two methods beside each other."""
    columns = ("writes/s", "sink MiB/s", "tracking", "logging", "twice", "rounds", "stop", "logging's end")
    table = make_table("Image / non-zero bytes, by write tracking and by dirty logging", *columns)
    by_place: dict[Any, dict[str, Bench]] = {}
    for bench in run.find("bench_image"):
        place = bench.facts["write_rate"], bench.facts["sink_rate"]
        by_place.setdefault(place, {})[bench.facts["method"]] = bench
    for (write_rate, sink_rate), methods in by_place.items():
        if WRITE_TRACKING in methods and DIRTY_LOGGING in methods:
            tracking = methods[WRITE_TRACKING].figures
            logging = methods[DIRTY_LOGGING].figures
            samples = ("ratio", "duplicate_pages", "rounds", "stop_ns")
            cells = (text_of(logging.get(f"dirty_logging_{sample}")) for sample in samples)
            table.add_row(
                "max" if write_rate is None else format_count(write_rate), sink_text(sink_rate),
                text_of(tracking.get("write_tracking_ratio")), *cells, methods[DIRTY_LOGGING].facts["status"],
            )  # fmt: skip
    return table


def sink_text(rate: int) -> str:
    """MiB a second."""
    return str(rate // MIB or "no limit")


def text_of(figure: Figure | None) -> str:
    """The median, or a dash."""
    return "-" if figure is None else show(figure.median, figure.unit)


Way = Mapping[str, Figure]
Column = str | Callable[[Way], str]


def ways_of(bench: Bench) -> dict[str, dict[str, Figure]]:
    """The figures of each way that a bench compares."""
    found: dict[str, dict[str, Figure]] = {}
    for name, figure in bench.figures.items():
        way, dot, sample = name.partition(".")
        if dot:
            found.setdefault(way, {})[sample] = figure
    return found


def way_table(
    title: str, benches: Sequence[Bench], label: Callable[[Bench], str], columns: Mapping[str, Column]
) -> Table:
    """A row for each way, below a row for each bench. A column is a sample, or a text of a way's figures."""
    table = make_table(title, "", "n", *columns)
    for bench in benches:
        table.add_row(label(bench))
        for way, figures in ways_of(bench).items():
            cells = (
                text_of(figures.get(column)) if isinstance(column, str) else column(figures)
                for column in columns.values()
            )
            table.add_row(f"  {way}", str(max(figure.n for figure in figures.values())), *cells)
    return table


def _range_of(sample: str) -> Column:
    return lambda way: show_range(way[sample])


PEER_COLUMNS: dict[str, Column] = {
    "time": "total_ns", "min .. max": _range_of("total_ns"), "stalls": "stalls", "p50": "stall_p50_ns",
    "p99": "stall_p99_ns", "longest": "stall_longest_ns", "after T": "stall_longest_after_t_ns",
    "(before)": "stall_longest_before_ns", "lost work": "lost_ns", "image": "image_bytes",
}  # fmt: skip


def peer_table(run: Run) -> Table:
    """Our engine, loops of other shapes, and fork; the stalls are the writer's."""
    title = "Peers: medians; stalls are the writer's"
    benches = list(run.find("bench_peers"))
    return way_table(title, benches, lambda bench: f"into {bench.facts['sink']}", PEER_COLUMNS)


def _gave_up(way: Way) -> bool:
    return way["completed"].min < 1


def _if_completed(sample: str) -> Column:
    return lambda way: "-" if _gave_up(way) else text_of(way.get(sample))


def _gap(sample: str) -> Column:
    """The guest's counter is read once a millisecond."""
    return lambda way: "< 1 ms" if sample in way and way[sample].median < 1e6 else text_of(way.get(sample))


QEMU_COLUMNS: dict[str, Column] = {
    "image": "image_bytes",
    "time": lambda way: "gave up" if _gave_up(way) else text_of(way["total_ns"]),
    "guest stopped": _if_completed("stop_ns"),
    "pages/s before": "rate_before",
    "during": lambda way: f"{way['rate_during'].median / way['rate_before'].median:.0%}",
    "lost work": "lost_ns",
    "longest gap": _gap("gap_ns"),
    "(before)": _gap("gap_before_ns"),
}
STOP_PARTS = ("stop", "device_state", "arm", "cont", "guest")


def _machine_text(bench: Bench) -> str:
    facts = bench.facts
    pages = "" if facts["huge"] else ", 4 KiB pages"
    return f"hot set {facts['hot'] // MIB} MiB, sink {sink_text(facts['sink_rate'])}{pages}"


def qemu_table(run: Run) -> Table:
    """QEMU machines, saved by QEMU itself and by us."""
    benches = [*run.find("bench_qemu"), *run.find("bench_qemu_small_pages")]
    return way_table("QEMU machines: medians", benches, _machine_text, QEMU_COLUMNS)


def stop_table(run: Run) -> Table:
    """What our stops of a QEMU machine consist of."""
    title = "Parts of our stop: medians by our clock (guest: by QEMU's)"
    table = make_table(title, "", "in huge pages", *STOP_PARTS)
    for bench in (*run.find("bench_qemu"), *run.find("bench_qemu_small_pages")):
        way = ways_of(bench).get(OURS, {})
        parts = (text_of(way.get(f"stop_parts.{part}_ns")) for part in STOP_PARTS)
        table.add_row(_machine_text(bench), text_of(way.get("huge_ratio")), *parts)
    return table

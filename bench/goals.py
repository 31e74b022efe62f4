"""The project's goals: which figure of which bench must reach what, and what is aimed at beyond that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from figures import Bench, Figure, Run, unit_of

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Goal:
    """A limit for a sample of a bench. It is judged only if the bench ran at `full_size` or more."""

    bench: str
    """The name without variant: every variant of the bench that has the sample gets a row."""
    sample: str
    name: str
    must: str
    limit: float
    full_size: int
    at_least: bool = False
    """The figure must not be below the limit, instead of not above."""
    aim: str = ""
    aim_limit: float | None = None
    aim_by_floor: float | None = None
    """The limit of the aim as a multiple of the floor's median."""
    floor_of: str = ""
    """Show the floor of this sample instead, if the figure is itself a ratio."""
    every_round: bool = False
    """Each round must reach the limit, not only the median."""
    joined: bool = False
    """One row over all variants."""


def _copy(variant: str, name: str, floor: str = "memcpy", aim: float = 1.0) -> Goal:
    return Goal(
        f"bench_copy_{variant}", f"{floor}_ratio", name, "≥ 0.65", 0.65, GIB, True,
        f"≥ {aim:g}", aim, floor_of="capture_ns",
    )  # fmt: skip


def _writer(bench: str, name: str, sample: str, must: str) -> Goal:
    limit = float(must.split()[1]) * 1e9
    return Goal(bench, sample, name, must, limit, GIB, aim="≤ 0.35 s", aim_limit=0.35e9)


def _stalls(size: str, text: str) -> tuple[Goal, ...]:
    bench, full = f"bench_writer_stalls[{size}]", {"small": 256 * MIB, "large": GIB}[size]
    return (
        Goal(bench, "stall_p50_ns", f"writer's stall p50, {text}, null sink", "≤ 40 µs", 40e3, full,
             aim="floor x 1.2", aim_by_floor=1.2),
        Goal(bench, "stall_p99_ns", "  p99", "≤ 150 µs", 150e3, full, aim="floor x 1.2", aim_by_floor=1.2),
        Goal(bench, "stall_longest_ns", "  longest after arming", "≤ 5 ms", 5e6, full, aim="≤ 1 ms",
             aim_limit=1e6),
        Goal(bench, "walk_rate", "  rate of the walk meanwhile", "≥ 1 GiB/s", GIB, full, True),
        Goal(bench, "counts_agree_ratio", "  writer's stalls / engine's faults", "≥ 0.9", 0.9, full, True),
        Goal(bench, "writer_by_engine_p50_ratio", "  writer's p50 / engine's", "≥ 0.88", 0.88, full, True),
        Goal(bench, "writer_by_engine_p99_ratio", "  writer's p99 / engine's", "≥ 0.88", 0.88, full, True),
    )  # fmt: skip


_FULL, _LOST, _PAUSE = "bench_full_speed_writer", "bench_lost_work", "bench_hot_set_pause"
GOALS = (
    Goal("bench_image", "write_tracking_ratio", "image / non-zero bytes, all rates", "≤ 1.005", 1.005,
         64 * MIB, every_round=True, joined=True),
    Goal("bench_image", "write_tracking_duplicate_pages", "pages saved twice, all rates", "0", 0, 0,
         every_round=True, joined=True),
    _copy("own_buffer", "memcpy / idle capture, null sink: own buffer"),
    _copy("guest[memfd]", "  other process, memfd"),
    _copy("guest[anon]", "  other process, private, / process_vm_readv", "process_vm_readv", 0.95),
    Goal("bench_sizes", "capture_per_gib_ratio", "time per GiB at 8 GiB / at 1 GiB", "≤ 1.1", 1.1, 8 * GIB,
         floor_of="capture_largest_ns"),
    _writer(f"{_FULL}[anon]", "1 GiB, writer at full speed, tmpfs", "capture_ns", "≤ 0.6 s"),
    _writer(f"{_FULL}[memfd]", "  the same, memfd", "capture_ns", "≤ 0.6 s"),
    Goal(f"{_FULL}[anon]", "grown_over_limit_bytes", "  engine's memory - its limit", "≤ 32 MiB", 32 * MIB,
         GIB),
    _writer(_LOST, "  the same, attached", "attach_ns", "≤ 1.2 s"),
    *_stalls("small", "256 MiB"),
    *_stalls("large", "1 GiB"),
    Goal("bench_stalls", "throttled_p99_ratio", "stall p99, sink 50 MiB/s / no limit", "≤ 2", 2, 128 * MIB),
    Goal(_LOST, "lost_ratio", "lost work / of fork and copy-on-write", "≤ 1", 1, GIB, aim="≤ 0.3",
         aim_limit=0.3, floor_of="attach_lost_ns"),
    Goal(_PAUSE, "pause_ratio", "pause at T, 32 MiB hot of 4 GiB / of plain arming", "≤ 0.2", 0.2, 4 * GIB,
         floor_of="two_step_pause_ns"),
    Goal(_PAUSE, "two_step_pause_ns", "  in time", "", 0, 4 * GIB, aim="≤ 1 ms", aim_limit=1e6),
    Goal("bench_attach_arm", "arm_ratio", "attached: arming / the bare ioctls", "≤ 1.1", 1.1, GIB,
         floor_of="arm_ns"),
    Goal("bench_injection[1]", "injection_stop_ns", "  one thread stopped", "≤ 0.5 ms", 5e5, GIB),
    Goal("bench_injection[3]", "injection_stop_ns", "  the same, 3 busy threads", "≤ 0.5 ms", 5e5, GIB),
    Goal("bench_thp_own_buffer", "huge_kept_ratio", "huge pages after / before: own buffer", "≥ 0.95", 0.95,
         256 * MIB, True),
    Goal("bench_thp_guest[peer]", "huge_kept_ratio", "  other process", "≥ 0.95", 0.95, 256 * MIB, True),
    Goal("bench_thp_guest[attached]", "huge_kept_ratio", "  attached", "≥ 0.95", 0.95, 256 * MIB, True),
    Goal("bench_zstd_command", "zstd_ratio", "zstd:1: rate / of zstd -1 -T2", "≥ 0.85", 0.85, GIB, True,
         "≥ 1", 1.0, floor_of="zstd_ns"),
    Goal("bench_zstd_command", "zstd_size_ratio", "  size / of zstd -1 -T2", "≤ 1.03", 1.03, GIB),
    Goal("bench_restore", "restore_memcpy_ratio", "memcpy / restore into a buffer", "≥ 0.6", 0.6, GIB, True,
         "≥ 0.9", 0.9, floor_of="restore_ns"),
    Goal("bench_sparse", "arm_ns", "64 GiB sparse, 256 MiB written: arming", "< 50 ms", 50e6, 64 * GIB),
    Goal("bench_sparse", "tables_added_bytes", "  page tables added", "< 16 MiB", 16 * MIB, 64 * GIB),
    Goal("bench_reservation[soft]", "start_ratio", "200 MiB of 20 TiB / 200 MiB: CPU until T", "≤ 2", 2,
         200 * MIB),
    Goal("bench_reservation[stop]", "stop_ratio", "  stop / stop", "≤ 2", 2, 200 * MIB),
    Goal("bench_mappings[soft]", "start_ratio", "30 000 mappings / one of that size: CPU until T", "≤ 2", 2,
         400 * MIB),
    Goal("bench_mappings[stop]", "stop_ratio", "  stop / stop", "≤ 2", 2, 400 * MIB),
    Goal("bench_qemu", "total_ratio", "time / background-snapshot's", "≤ 0.2", 0.2, GIB, aim="≤ 0.1",
         aim_limit=0.1),
    Goal("bench_qemu", "lost_ratio", "  guest's lost work / its", "≤ 0.2", 0.2, GIB),
    Goal("bench_qemu", "gap_ratio", "  guest's longest gap / its", "≤ 1", 1, GIB),
    Goal("bench_qemu", "image_ratio", "  image / its", "≤ 1", 1, GIB),
    Goal("bench_qemu", "stop_ns", "guest stopped, huge pages", "≤ 5 ms", 5e6, GIB),
    Goal("bench_qemu_small_pages", "stop_ns", "guest stopped, 4 KiB pages", "≤ 30 ms", 30e6, GIB),
    Goal("bench_peers", "qemu_shape_rate_ratio", "rate / of qemu-shape", "≥ 6", 6, GIB, True),
    Goal("bench_peers", "qemu_shape_p99_ratio", "  stall p99 / of qemu-shape", "≤ 1", 1, GIB),
    Goal("bench_peers", "forkd_shape_longest_ratio", "  longest stall / of forkd-shape", "≤ 0.02", 0.02, GIB),
    Goal("bench_peers", "forkd_shape_longest_after_t_ratio", "  the same, ours after T", "≤ 0.02", 0.02, GIB),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verdict:
    """A goal and the figure that was measured for it."""

    goal: Goal
    variant: str
    figure: Figure
    floored: Figure
    """The figure whose floor is shown."""
    full_size: bool

    @property
    def name(self) -> str:
        """With the variant, if the goal is for several."""
        return f"{self.goal.name} {self.variant}".rstrip()

    @property
    def met(self) -> str:
        """``"yes"`` (every round), ``"median only"``, ``"no"``, or ``"-"`` if the run was too small to judge.

        ``", aim"`` follows if the median reaches the aim (``"aim"`` alone for a goal without `must`).
        """
        goal, figure = self.goal, self.figure
        if not self.full_size:
            return "-"
        aim = ", aim" if self._reaches(figure.median, self._aim_limit()) else ""
        if not goal.must:
            return aim.removeprefix(", ") or "-"
        if self._reaches(figure.min if goal.at_least else figure.max, goal.limit):
            return "yes" + aim
        by_median = self._reaches(figure.median, goal.limit) and not goal.every_round
        return "median only" + aim if by_median else "no"

    def _aim_limit(self) -> float | None:
        floor = self.floored.floor_median
        if self.goal.aim_by_floor is not None and floor is not None:
            return self.goal.aim_by_floor * floor
        return self.goal.aim_limit

    def _reaches(self, value: float, limit: float | None) -> bool:
        if limit is None:
            return False
        return value >= limit if self.goal.at_least else value <= limit


def judge(run: Run) -> list[Verdict]:
    """Every goal that the run has a figure for."""
    return [verdict for goal in GOALS for verdict in _verdicts(goal, run)]


def _verdicts(goal: Goal, run: Run) -> Iterator[Verdict]:
    benches = [bench for bench in run.find(goal.bench) if goal.sample in bench.figures]
    if goal.joined and benches:
        benches = [_join(goal, benches)]
    for bench in benches:
        figure = bench.figures[goal.sample]
        floored = bench.figures.get(goal.floor_of, figure)
        full = (bench.facts.get("size") or 0) >= goal.full_size
        yield Verdict(goal, bench.name.removeprefix(goal.bench), figure, floored, full)


def _join(goal: Goal, benches: list[Bench]) -> Bench:
    """The variants' figures as one, whose median is that of their medians."""
    figures = [bench.figures[goal.sample] for bench in benches]
    figure = Figure(
        unit_of(goal.sample), median(one.median for one in figures), min(one.min for one in figures),
        max(one.max for one in figures), sum(one.n for one in figures),
    )  # fmt: skip
    return replace(benches[0], name=goal.bench, figures={goal.sample: figure})


def to_json(verdict: Verdict) -> dict[str, Any]:
    """A verdict for programs."""
    figure, floored = verdict.figure, verdict.floored
    return {
        "name": verdict.name.strip(), "must": verdict.goal.must, "aim": verdict.goal.aim, "met": verdict.met,
        "unit": figure.unit, "median": figure.median, "min": figure.min, "max": figure.max, "n": figure.n,
        "floor": floored.floor, "floor_median": floored.floor_median, "floor_ratio": floored.floor_ratio,
    }  # fmt: skip

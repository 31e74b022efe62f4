"""Figures of a bench run: median, range and count of each sample, and its floor.

`read_run` reads both kinds of file into a `Run`: what `make bench`, `make bench-qemu` and `make bench-peers`
write (pytest-benchmark's JSON, with the value of every round), and an entry of bench/history/.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

DEFAULTS = tuple(Path("build") / name for name in ("bench.json", "bench-qemu.json", "bench-peers.json"))
UNITS = ("ns", "bytes", "rate", "ratio")
KERNEL = re.compile(r"\d+(\.\d+)*")
"""What of the kernel's release names no builder or host."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One sample of a bench."""

    unit: str
    """``"ns"``, ``"bytes"``, ``"rate"`` (bytes per second), ``"ratio"`` or ``"count"``."""
    median: float
    min: float
    max: float
    n: int
    floor: str = ""
    """The sample of the same bench that bounds this one: the bare work, without an engine."""
    floor_median: float | None = None
    floor_ratio: float | None = None
    """Median of figure / floor, round by round."""


@dataclass(frozen=True, slots=True)
class Bench:
    """One bench of a run; `facts` are its parameters, such as ``size``."""

    name: str
    facts: dict[str, Any]
    figures: dict[str, Figure]


@dataclass(frozen=True, slots=True)
class Run:
    """All benches that were measured together. `commit` ends with ``+`` if the tree had changes."""

    name: str
    date: str
    commit: str
    machine: dict[str, Any]
    benches: tuple[Bench, ...]

    def find(self, name: str) -> Iterator[Bench]:
        """The bench of that name and its parametrized variants ``name[...]``."""
        return (bench for bench in self.benches if bench.name == name or bench.name.startswith(f"{name}["))


def unit_of(sample: str) -> str:
    """The unit is the last word of a sample's name."""
    unit = sample.rsplit("_", 1)[-1]
    return unit if unit in UNITS else "count"


def label_of(sample: str) -> str:
    """A sample's name for people: words without a unit that the value shows."""
    unit = unit_of(sample)
    return sample.removesuffix("" if unit == "ratio" else f"_{unit}").replace("_", " ")


def summarize(sample: str, values: Sequence[float], floor: str = "", floors: Sequence[float] = ()) -> Figure:
    """The figure of a sample; `floors` are the floor's values of the same rounds."""
    found = unit_of(sample), median(values), min(values), max(values), len(values)
    if not floors:
        return Figure(*found)
    # The floor may be measured once more or less than the sample: then there are no rounds to pair.
    pairs = zip(values, floors, strict=True) if len(values) == len(floors) else ()
    ratios = [value / least for value, least in pairs if least]
    return Figure(*found, floor, median(floors), median(ratios) if ratios else None)


def samples_of(info: dict[str, Any]) -> dict[str, list[float]]:
    """The samples of a bench. A bench that compares ways has ``way.sample``, or ``way.sample.part``."""
    found = {sample: list(values) for sample, values in info.get("samples", {}).items()}
    for way, runs in info.get("runs", {}).items():
        for run in runs:
            for sample, value in _numbers(run):
                found.setdefault(f"{way}.{sample}", []).append(value)
    return {sample: values for sample, values in found.items() if values}


def _numbers(run: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in run.items():
        if isinstance(value, dict):
            word, unit = name.removesuffix("_" + unit_of(name)), unit_of(name)
            for part, spent in value.items():
                yield f"{word}.{part}_{unit}", spent
        elif isinstance(value, int | float):
            yield name, value


def to_bench(name: str, info: dict[str, Any]) -> Bench:
    """A bench from its `extra_info`: samples, which sample is the floor of which (``floors``), and facts."""
    samples, floors = samples_of(info), info.get("floors", {})
    figures = {}
    for sample, values in samples.items():
        floor = floors.get(sample, "")
        figures[sample] = summarize(sample, values, floor, samples.get(floor, []))
    facts = {key: value for key, value in info.items() if isinstance(value, str | int | float | None)}
    return Bench(name, facts, figures)


def _measured(path: Path, data: dict[str, Any]) -> Run:
    machine, commit = data["machine_info"], data.get("commit_info", {})
    cpu = machine.get("cpu", {})
    kernel = KERNEL.match(machine.get("release", ""))
    facts = {"cpu": cpu.get("brand_raw"), "cpus": cpu.get("count"), "kernel": kernel and kernel[0]}
    commit_id = commit.get("id", "unknown")[:12] + ("+" if commit.get("dirty") else "")
    benches = (to_bench(bench["name"], bench["extra_info"]) for bench in data["benchmarks"])
    return Run(path.stem, data["datetime"][:10], commit_id, facts, tuple(benches))


def _kept(data: dict[str, Any]) -> Run:
    benches = (
        Bench(name, kept["facts"], {sample: Figure(**figure) for sample, figure in kept["figures"].items()})
        for name, kept in data["benches"].items()
    )
    return Run(data["name"], data["date"], data["commit"], data["machine"], tuple(benches))


def read_run(path: Path) -> Run:
    """A run from either kind of file; raises ValueError for any other."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if "benchmarks" in data:
        return _measured(path, data)
    if "benches" in data:
        return _kept(data)
    raise ValueError(f"{path} is neither a result of `make bench` nor an entry of bench/history/")


def join_runs(runs: Sequence[Run]) -> Run:
    """One run with the benches of all. Raises ValueError if two of them have the same bench."""
    benches = [bench for run in runs for bench in run.benches]
    twice = [name for name, count in Counter(bench.name for bench in benches).items() if count > 1]
    if twice:
        raise ValueError(f"{', '.join(twice)}: in two of the files; give files of one run")
    return replace(runs[0], benches=tuple(benches))

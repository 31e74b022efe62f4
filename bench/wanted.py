"""The figures that the project must reach, and from which sample of which bench each comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rows import GIB, Figure, unit_of

from snapengine.options import MIB, WRITE_TRACKING

Infos = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A figure that is a sample of a bench; judged only if the bench ran at `full_size` or more."""

    bench: str
    sample: str
    name: str
    must: str
    limit: float
    full_size: int
    at_least: bool = False
    aim: str = ""
    aim_limit: float | None = None
    aim_by_floor: float | None = None
    """The limit of the aim as a multiple of the floor's median."""
    floor: str = ""
    """A sample of the same bench."""
    of: str = ""
    """The sample that is divided by the floor, if it is not `sample`."""


def _copy(bench: str, name: str, floor: str = "memcpy", aim: float = 1.0) -> Wanted:
    return Wanted(
        f"bench_copy_{bench}", f"{floor}_ratio", name, "≥ 0.65", 0.65, GIB, True,
        f"≥ {aim:g}", aim, floor=f"{floor}_ns", of="capture_ns",
    )  # fmt: skip


def _writer(bench: str, name: str, sample: str, must: str) -> Wanted:
    limit = float(must.split()[1]) * 1e9
    return Wanted(bench, sample, name, must, limit, GIB, aim="≤ 0.35 s", aim_limit=0.35e9, floor="pwrite_ns")


def _stalls(size: str, sample: str, name: str, must: str, limit: float, **more: Any) -> Wanted:
    full = {"small": 256 * MIB, "large": GIB}[size]
    return Wanted(f"bench_writer_stalls[{size}]", sample, name, must, limit, full, **more)


_PER_CORE = {"aim": "floor x 1.2", "aim_by_floor": 1.2}
_STALLS = tuple(
    row
    for size, text in (("small", "256 MiB"), ("large", "1 GiB"))
    for row in (
        _stalls(size, "stall_p50_ns", f"writer's stall p50, {text}, null sink", "≤ 40 µs", 40e3,
                floor="floor_p50_ns", **_PER_CORE),
        _stalls(size, "stall_p99_ns", "  p99", "≤ 150 µs", 150e3, floor="floor_p99_ns", **_PER_CORE),
        _stalls(size, "stall_longest_ns", "  longest after arming", "≤ 5 ms", 5e6, aim="≤ 1 ms",
                aim_limit=1e6, floor="floor_longest_ns"),
        _stalls(size, "walk_rate", "  rate of the walk meanwhile", "≥ 1 GiB/s", GIB, at_least=True),
        _stalls(size, "counts_agree_ratio", "  writer's stalls against engine's faults", "≥ 0.9", 0.9,
                at_least=True),
        _stalls(size, "writer_by_engine_p50_ratio", "  their p50 / engine's (not below)", "≥ 0.88", 0.88,
                at_least=True),
        _stalls(size, "writer_by_engine_p99_ratio", "  their p99 / engine's (not below)", "≥ 0.88", 0.88,
                at_least=True),
    )
)  # fmt: skip
_FULL, _LOST = "bench_full_speed_writer", "bench_lost_work"
WANTED = (
    _copy("own_buffer", "memcpy / idle capture, null sink: own buffer"),
    _copy("guest[memfd]", "  other process, memfd"),
    _copy("guest[anon]", "  other process, private, / process_vm_readv", "process_vm_readv", 0.95),
    Wanted("bench_sizes", "capture_per_gib_ratio", "time per GiB at 8 GiB / at 1 GiB", "≤ 1.1", 1.1, 8 * GIB,
           floor="memcpy_largest_ns", of="capture_largest_ns"),
    _writer(f"{_FULL}[anon]", "1 GiB, writer at full speed, tmpfs", "capture_ns", "≤ 0.6 s"),
    _writer(f"{_FULL}[memfd]", "  the same, memfd", "capture_ns", "≤ 0.6 s"),
    Wanted(f"{_FULL}[anon]", "grown_over_limit_bytes", "  engine's memory - its limit", "≤ 32 MiB", 32 * MIB,
           GIB),
    _writer(_LOST, "  the same, attached", "attach_ns", "≤ 1.2 s"),
    *_STALLS,
    Wanted("bench_stalls", "throttled_p99_ratio", "stall p99, sink 50 MiB/s / no limit", "≤ 2", 2, 128 * MIB),
    Wanted(_LOST, "lost_ratio", "work lost / by fork and copy-on-write", "≤ 1", 1, GIB, aim="≤ 0.3",
           aim_limit=0.3, floor="fork_lost_ns", of="attach_lost_ns"),
    Wanted("bench_hot_set_pause", "pause_ratio", "pause at T, 32 MiB hot of 4 GiB / plain arming's", "≤ 0.2",
           0.2, 4 * GIB, floor="plain_pause_ns", of="two_step_pause_ns"),
    Wanted("bench_hot_set_pause", "two_step_pause_ns", "  in time", "", 0, 4 * GIB, aim="≤ 1 ms",
           aim_limit=1e6),
    Wanted("bench_attach_arm", "arm_ratio", "attached: arming / the bare ioctls", "≤ 1.1", 1.1, GIB,
           floor="bare_ns", of="arm_ns"),
    Wanted("bench_injection[1]", "injection_stop_ns", "  one thread stands", "≤ 0.5 ms", 5e5, GIB),
    Wanted("bench_injection[3]", "injection_stop_ns", "  the same, 3 busy threads", "≤ 0.5 ms", 5e5, GIB),
    Wanted("bench_thp_own_buffer", "huge_kept_ratio", "huge pages after / before: own buffer", "≥ 0.95", 0.95,
           256 * MIB, True),
    Wanted("bench_thp_guest[peer]", "huge_kept_ratio", "  other process", "≥ 0.95", 0.95, 256 * MIB, True),
    Wanted("bench_thp_guest[attached]", "huge_kept_ratio", "  attached", "≥ 0.95", 0.95, 256 * MIB, True),
    Wanted("bench_zstd_command", "zstd_ratio", "zstd:1: rate / zstd -1 -T2's", "≥ 0.85", 0.85, GIB, True,
           "≥ 1", 1.0, floor="command_ns", of="zstd_ns"),
    Wanted("bench_zstd_command", "zstd_size_ratio", "  size / its", "≤ 1.03", 1.03, GIB),
    Wanted("bench_restore", "restore_memcpy_ratio", "memcpy / restore into a buffer", "≥ 0.6", 0.6, GIB, True,
           "≥ 0.9", 0.9, floor="memcpy_ns", of="restore_ns"),
    Wanted("bench_sparse", "arm_ns", "64 GiB sparse, 256 MiB written: arming", "< 50 ms", 50e6, 64 * GIB),
    Wanted("bench_sparse", "tables_added_bytes", "  page tables added", "< 16 MiB", 16 * MIB, 64 * GIB),
    Wanted("bench_reservation[soft]", "start_ratio", "200 MiB of 20 TiB / 200 MiB: CPU until T", "≤ 2",
           2, 200 * MIB),
    Wanted("bench_reservation[stop]", "stop_ratio", "  stop / its", "≤ 2", 2, 200 * MIB),
    Wanted("bench_mappings[soft]", "start_ratio", "30 000 mappings / one of that size: CPU until T", "≤ 2", 2,
           400 * MIB),
    Wanted("bench_mappings[stop]", "stop_ratio", "  stop / its", "≤ 2", 2, 400 * MIB),
)  # fmt: skip


def image_figures(benches: Sequence[dict[str, Any]]) -> list[Figure]:
    """The image against the memory that is not zero."""
    infos = [bench["extra_info"] for bench in benches if bench["group"] == "images"]
    tracking = [info for info in infos if info["method"] == WRITE_TRACKING]
    if not tracking:
        return []
    full = tracking[0]["size"] >= 64 * MIB
    pages = [info["duplicate_pages"] for info in tracking]
    ratios = [info["ratio"] for info in tracking]
    return [
        Figure(
            "image / non-zero bytes, all rates", "≤ 1.005", ratios, "ratio", 1.005, full_size=full, every=True
        ),
        Figure("pages saved twice, all rates", "0", pages, "count", 0, every=True),
    ]


def sample_figures(infos: Infos) -> list[Figure]:
    """The figures that are samples of a bench, as far as the run has it."""
    found = []
    for wanted in WANTED:
        names = [wanted.bench, *(name for name in infos if name.startswith(wanted.bench + "["))]
        for name in (name for name in names if wanted.sample in infos.get(name, {}).get("samples", {})):
            found.append(_figure(wanted, infos[name], name.removeprefix(wanted.bench)))
    return found


def _figure(wanted: Wanted, info: dict[str, Any], variant: str) -> Figure:
    samples = info["samples"]
    floor = samples.get(wanted.floor, [])
    aim_limit = wanted.aim_limit
    if wanted.aim_by_floor is not None and floor:
        aim_limit = wanted.aim_by_floor * median(floor)
    return Figure(
        f"{wanted.name} {variant}".rstrip(), wanted.must, samples[wanted.sample], unit_of(wanted.sample),
        wanted.limit, wanted.at_least, full_size=info["size"] >= wanted.full_size, aim=wanted.aim,
        aim_limit=aim_limit, floor=wanted.floor, floor_values=floor,
        of=samples.get(wanted.of or wanted.sample, []) if floor else [],
    )  # fmt: skip

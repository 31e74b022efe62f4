"""The ways to save a running QEMU machine: QEMU's own and ours, measured in the same manner."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Any

from peers import qemu_native
from progresskit import ProgressSampler
from qemu_names import BACKGROUND, OUR_ROUNDS, OURS, QEMU_ROUNDS, STREAM, WAYS, ZSTD
from qemukit import Machine

import snapengine
from snapengine.options import DIRTY_LOGGING, Options
from snapengine.qemu.monitor import Monitor
from snapengine.qemu.target import QemuTarget
from snapengine.qemu.via_migration import save_by_migration
from snapengine.result import COMPLETED

NATIVE = {
    **dict(zip(QEMU_ROUNDS, ("dirty-logging", "mapped-ram"), strict=True)),
    BACKGROUND: "background-snapshot",
}
ATTACHED: dict[str, dict[str, str]] = {
    OURS: {},
    ZSTD: {"compress": "zstd:1"},
    OUR_ROUNDS: {"method": DIRTY_LOGGING},
}
LIMIT_S = 8.0  # a way that has not converged by then is given up
# background-snapshot always ends. After cancelling it, a guest of QEMU 7.2 may never run again.
BACKGROUND_LIMIT_S = 60.0


def ways(qemu: str) -> list[str]:
    """The ways that this QEMU supports."""
    here = qemu_native.methods(qemu)
    return [way for way in WAYS if NATIVE.get(way) in (None, *here)]


def measure(machine: Machine, way: str, path: Path, sink_rate: int = 0) -> dict[str, Any]:
    """Save the running machine into `path`, leave it running, and return the figures.

    `sink_rate`: bytes per second of the sink, 0 for no limit. Without limit QEMU's stream goes through
    ``cat`` and ours directly into the file, as users would do it; with a limit both go through one program.
    """
    seen = len(machine.qmp.events)
    if way in NATIVE:
        limit = BACKGROUND_LIMIT_S if way == BACKGROUND else LIMIT_S
        run = qemu_native.save(machine, NATIVE[way], path, sink_rate=sink_rate, limit_s=limit)
        figures = {"completed": run.completed, "why": run.why, "total_ns": run.total_s * 1e9,
                   "image_bytes": run.image_bytes, "stop_ns": _ns(run.downtime_s)}  # fmt: skip
        work = run.guest
    else:
        figures, work = _ours(machine, way, path, sink_rate)
    machine.qmp("query-status")  # events until now precede the answer
    stopped = _stopped_ns(machine.qmp.events[seen:])
    if stopped is not None and way not in QEMU_ROUNDS:
        figures["stop_ns"] = stopped  # QEMU's iterative ways leave the machine stopped
    return figures | {
        "rate_before": work.rate_before,
        "rate_during": work.rate_during,
        "lost_ns": work.lost_pages / work.rate_before * 1e9,
        "gap_before_ns": work.longest_gap_before_ns,
        "gap_ns": work.longest_gap_ns,
        "wait_ns": work.longest_wait_ns,
        "bins_before": work.bins_before.tolist(),
        "bins": work.bins.tolist(),
    }


def _ours(machine: Machine, way: str, path: Path, sink_rate: int) -> tuple[dict[str, Any], Any]:
    sink = path
    if sink_rate:
        command = [sys.executable, str(qemu_native.THROTTLE), str(sink_rate)]
        sink = f"exec:{shlex.join(command)} > {shlex.quote(str(path))}"
    options = Options(max_seconds=LIMIT_S, spill_dir=str(path.parent), **ATTACHED.get(way, {}))
    with ProgressSampler(machine) as sampler:
        time.sleep(1.0)
        begin = time.monotonic_ns()
        result, why = _save(machine, way, sink, options)
        end = time.monotonic_ns()
        machine.wait_progress()
        resumed = time.monotonic_ns()
    figures = {"completed": result.status == COMPLETED, "why": why, "total_ns": end - begin,
               "image_bytes": result.image_bytes, "stop_ns": result.stop_ns, "faults": result.faults,
               "injection_ns": result.injection_ns, "spilled_bytes": result.spilled_bytes,
               "stop_parts_ns": result.stop_parts_ns}  # fmt: skip
    return figures, qemu_native.guest_work(sampler.progress, begin, end, resumed)


def _save(machine: Machine, way: str, sink: Any, options: Options) -> tuple[Any, str]:
    with Monitor(str(machine.socket)) as monitor:
        if way == STREAM:
            return save_by_migration(monitor, sink, options), ""
        with snapengine.snapshot(QemuTarget(monitor), sink, options) as capture:
            pass
        result = capture.result
    return result, "" if result.status == COMPLETED else f"{result.status} ({result.rounds} rounds)"


def _ns(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e9


def _stopped_ns(events: list[dict[str, Any]]) -> int | None:
    """Time from the first STOP to the next RESUME, by QEMU's clock."""
    at: dict[str, int] = {}
    for event in events:
        stamp = event["timestamp"]
        at.setdefault(event["event"], stamp["seconds"] * 10**9 + stamp["microseconds"] * 1000)
    return at["RESUME"] - at["STOP"] if {"STOP", "RESUME"} <= at.keys() else None

"""QEMU's own live snapshots of a running machine, measured: what they take, and what the guest loses."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from progresskit import Progress, ProgressSampler
from qemukit import Machine, qemu_version
from qmpkit import QmpError

THROTTLE = Path(__file__).resolve().parent.parent / "throttle.py"
UNLIMITED = 1 << 40  # bytes per second; 0 means "off" in some versions only
POLL_S = 0.002
GIVE_UP_S = 10
ENDED = ("completed", "failed", "cancelled")
CAPABILITIES = {
    "dirty-logging": [],
    "mapped-ram": ["mapped-ram"],
    "background-snapshot": ["background-snapshot"],
}
SINCE = {"dirty-logging": (7, 2, 0), "mapped-ram": (9, 0, 0), "background-snapshot": (7, 2, 0)}


@dataclass(frozen=True)
class GuestWork:
    """The guest around a snapshot: rates in pages per second, `bins` (before and during) of 10 ms each."""

    rate_before: float
    rate_during: float
    lost_pages: float
    """What it would have written at `rate_before` during the snapshot, less what it has written."""
    longest_gap_before_ns: int
    longest_gap_ns: int
    longest_wait_ns: int
    """The longest time without a sample: the figures above know no better than that."""
    bins_before: np.ndarray[Any, np.dtype[np.float64]]
    bins: np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class NativeRun:
    """One snapshot by QEMU itself. Times in seconds; `reported` is the last query-migrate."""

    method: str
    version: tuple[int, int, int]
    completed: bool
    why: str
    total_s: float
    downtime_s: float | None
    image_bytes: int
    """Of the file, as it is when QEMU has ended; of mapped-ram what it takes on disk, as it has holes."""
    guest: GuestWork
    reported: dict[str, Any]


def methods(qemu: str) -> list[str]:
    """Those that this QEMU has, of the newest last."""
    return [method for method, since in SINCE.items() if qemu_version(qemu) >= since]


def guest_work(progress: Progress, begin_ns: int, end_ns: int, resumed_ns: int) -> GuestWork:
    """The figures of a guest whose samples begin before a snapshot, which took from `begin_ns` to `end_ns`.

    `resumed_ns`: when the guest certainly ran again, if it stood at the end.
    """
    before = progress.between(0, begin_ns)
    during = progress.between(begin_ns, end_ns)
    rate = before.rate()
    written = float(during.pages[-1] - during.pages[0])
    seconds = float(during.times_ns[-1] - during.times_ns[0]) / 1e9
    return GuestWork(
        rate_before=rate,
        rate_during=during.rate(),
        lost_pages=rate * seconds - written,
        longest_gap_before_ns=before.longest_gap_ns(),
        longest_gap_ns=progress.between(begin_ns, resumed_ns).longest_gap_ns(),
        longest_wait_ns=during.longest_wait_ns(),
        bins_before=before.bins(),
        bins=during.bins(),
    )


def save(
    machine: Machine,
    method: str,
    path: Path,
    *,
    limit_s: float = 40,
    sink_rate: int = 0,
    before_s: float = 1.0,
) -> NativeRun:
    """Let QEMU save the running machine into `path`, and leave it running.

    After `limit_s` it is cancelled (`completed` is false then). `sink_rate`: bytes per second that the sink
    takes, 0 for no limit: for a stream a pipe through throttle.py; for mapped-ram, whose file must be
    seekable, the max-bandwidth of QEMU. `before_s`: how long the guest is watched before.
    """
    path.unlink(missing_ok=True)
    uri = f"file:{path}" if method == "mapped-ram" else f"exec:{_sink(path, sink_rate)}"
    bandwidth = sink_rate if sink_rate and method == "mapped-ram" else UNLIMITED
    _set_capabilities(machine, CAPABILITIES[method])
    machine.qmp("migrate-set-parameters", max_bandwidth=bandwidth)
    with ProgressSampler(machine) as sampler:
        time.sleep(before_s)
        begin = time.monotonic_ns()
        machine.qmp("migrate", uri=uri)
        info, why = _wait(machine, begin, limit_s)
        end = time.monotonic_ns()
        if not machine.qmp("query-status")["running"]:
            machine.qmp("cont")
        machine.wait_progress()
        resumed = time.monotonic_ns()
    _set_capabilities(machine, [])
    completed = info["status"] == "completed"
    downtime = info.get("downtime")
    return NativeRun(
        method=method,
        version=qemu_version(machine.qemu),
        completed=completed,
        why=why,
        total_s=(end - begin) / 1e9,
        downtime_s=None if downtime is None or not completed else downtime / 1e3,
        image_bytes=_size(path, method),
        guest=guest_work(sampler.progress, begin, end, resumed),
        reported=info,
    )


def _sink(path: Path, rate: int) -> str:
    target = shlex.quote(str(path))
    if not rate:
        return f"cat > {target}"
    return f"{shlex.quote(sys.executable)} {shlex.quote(str(THROTTLE))} {rate} > {target}"


def _size(path: Path, method: str) -> int:
    status = path.stat()
    return status.st_blocks * 512 if method == "mapped-ram" else status.st_size


def _wait(machine: Machine, begin_ns: int, limit_s: float) -> tuple[dict[str, Any], str]:
    """The last query-migrate, and why it did not complete; after `limit_s` it is cancelled."""
    why = ""
    end_ns = begin_ns + int(limit_s * 1e9)
    while True:
        info = machine.qmp("query-migrate")
        if info.get("status") in ENDED:
            return info, why or info.get("error-desc", "")
        if time.monotonic_ns() > end_ns:
            assert not why, f"it cannot be cancelled: {info}"
            rounds = info.get("ram", {}).get("dirty-sync-count")
            why = f"not converged in {limit_s:g} s ({rounds} rounds)"
            machine.qmp("migrate_cancel")
            end_ns = time.monotonic_ns() + int(GIVE_UP_S * 1e9)
        time.sleep(POLL_S)


def _set_capabilities(machine: Machine, wanted: list[str]) -> None:
    """Those on, all others of this module off; a version that lacks one has it off."""
    known = {entry["capability"] for entry in machine.qmp("query-migrate-capabilities")}
    missing = set(wanted) - known
    if missing:
        raise QmpError("Unsupported", f"this QEMU has no {', '.join(missing)}")
    names = sorted({name for names in CAPABILITIES.values() for name in names} & known)
    # Off before on: two of them may exclude each other.
    for state in (False, True):
        chosen = [{"capability": name, "state": state} for name in names if (name in wanted) is state]
        if chosen:
            machine.qmp("migrate-set-capabilities", capabilities=chosen)

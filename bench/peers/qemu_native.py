"""Measures QEMU's own live snapshots of a running machine, and the work that the guest loses."""

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
UNLIMITED = 1 << 40  # bytes per second; 0 means "no limit" in some versions only
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
    """The guest's work around a snapshot: rates in pages per second, bins of 10 ms."""

    rate_before: float
    rate_during: float
    lost_pages: float
    """Pages that it would have written at `rate_before` during the snapshot, minus those it wrote."""
    longest_gap_before_ns: int
    longest_gap_ns: int
    longest_wait_ns: int
    """The longest time without a sample, which limits the precision of the gaps."""
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
    """Size of the file after QEMU's migration; for mapped-ram, which has holes, its allocated blocks."""
    guest: GuestWork
    reported: dict[str, Any]


def methods(qemu: str) -> list[str]:
    """The methods that this QEMU has, the newest last."""
    return [method for method, since in SINCE.items() if qemu_version(qemu) >= since]


def guest_work(progress: Progress, begin_ns: int, end_ns: int, resumed_ns: int) -> GuestWork:
    """The guest's work around a snapshot from `begin_ns` to `end_ns`; `progress` begins before.

    `resumed_ns`: a time when the guest ran again, if it was stopped at the end.
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

    After `limit_s` it is cancelled, and `completed` is false. `sink_rate`: bytes per second of the sink, 0
    for no limit. A stream is limited by a pipe through throttle.py; mapped-ram, which needs a seekable file,
    by QEMU's max-bandwidth. `before_s`: how long the guest is observed before.
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
    """The last query-migrate, and why it did not complete. Cancels the migration after `limit_s`."""
    why = ""
    end_ns = begin_ns + int(limit_s * 1e9)
    while True:
        info = machine.qmp("query-migrate")
        if info.get("status") in ENDED:
            return info, why or info.get("error-desc", "")
        if time.monotonic_ns() > end_ns:
            assert not why, f"the migration cannot be cancelled: {info}"
            rounds = info.get("ram", {}).get("dirty-sync-count")
            why = f"not converged in {limit_s:g} s ({rounds} rounds)"
            machine.qmp("migrate_cancel")
            end_ns = time.monotonic_ns() + int(GIVE_UP_S * 1e9)
        time.sleep(POLL_S)


def _set_capabilities(machine: Machine, enabled: list[str]) -> None:
    """Enable these capabilities and disable the others that this module uses, if QEMU has them."""
    known = {entry["capability"] for entry in machine.qmp("query-migrate-capabilities")}
    missing = set(enabled) - known
    if missing:
        raise QmpError("Unsupported", f"this QEMU has no {', '.join(missing)}")
    names = sorted({name for names in CAPABILITIES.values() for name in names} & known)
    # Off before on: two of them may exclude each other.
    for state in (False, True):
        chosen = [{"capability": name, "state": state} for name in names if (name in enabled) is state]
        if chosen:
            machine.qmp("migrate-set-capabilities", capabilities=chosen)

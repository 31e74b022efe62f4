"""`snapengine doctor --pid`: which mappings a capture of a process would hold. Nothing is captured.

Reads /proc only; stops nobody. The process runs on, so all of it is a moment old.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from snapengine.base.names import escape, printable
from snapengine.base.units import format_size
from snapengine.kernel import procfs
from snapengine.kernel.pagemap import CATEGORIES, populated_runs
from snapengine.kernel.procmaps import Mapping, read_maps
from snapengine.kernel.uffd import FEATURES, MODE_WP, Uffd
from snapengine.options import COPY_LIMIT
from snapengine.process import inject_policy, permissions
from snapengine.process.decisions import Decision
from snapengine.process.mapping_facts import MapFacts, refused_by_flags
from snapengine.process.selection import Selector, select
from snapengine.process.target import SHARED_UNSEEN
from snapengine.regions import PAGE_BYTES
from snapengine.report.tables import print_table, print_text

HUGE_BYTES = 2 << 20
SHOWN_ROWS = 20
SAMPLE_BYTES = 16 << 20
INJECTION_NS = 200_000
"""Medians of one-thread injections lie at 0.1 to 0.3 ms (bench/NOTES.md)."""
MAPPING_NS = 3_000  # registered, protected, scanned; what else is done for it comes before the stop
THREAD_NS = 15_000  # stopping one more thread and letting it go
PREPARE_NS = 10_000_000  # of a stop cut: the mappings are listed, and the capture made ready, in the stop


@dataclass(frozen=True, slots=True)
class Row:
    """One mapping. ``soft`` and ``stop``: what each cut does: "tracked", "copied", or "no". In bytes."""

    start: int
    end: int
    perms: str
    path: str
    populated: int
    huge: int
    soft: str
    stop: str
    reason: str
    """Why the soft cut lacks it; ``stop_reason``: why the stop cut does."""
    stop_reason: str


@dataclass(frozen=True, slots=True)
class Preflight:
    """The answer. ``bound_bytes``: the image is no larger than that, uncompressed, whatever is written
    meanwhile (write tracking). Times are estimates, in nanoseconds."""

    pid: int
    name: str
    threads: int
    rows: list[Row]
    bound_bytes: int
    injection_ns: int
    arm_ns: int
    stop_ns: int
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types; names are escaped (`snapengine.base.names`)."""
        found = asdict(self) | {"name": escape(self.name)}
        for row in found["rows"]:
            row["path"] = escape(row["path"])
        return found


def examine_process(
    pid: int, selector: Selector | None = None, copy_limit: int = COPY_LIMIT
) -> Preflight:
    """Look at a process. Raises `AttachError` where it cannot be attached to, `TargetGoneError`, OSError."""
    info = permissions.check_to_save(pid)
    refusal = inject_policy.foresee(info)
    if refusal is not None:
        raise refusal
    selector = selector or Selector()
    mappings = read_maps(pid)
    facts = MapFacts(pid, refused_by_flags(pid))
    soft = select(pid, mappings, selector, stop=False, limit=copy_limit, facts=facts)
    stop = select(pid, mappings, selector, stop=True, limit=copy_limit, facts=facts)
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        both = zip(soft.decisions, stop.decisions, strict=True)
        rows = [_row(pid, *decisions, pagemap.fileno()) for decisions in both]
    tracked = [row for row in rows if row.soft == "tracked" or row.stop == "tracked"]
    small = sum(row.populated - row.huge for row in tracked)
    arm = round(small / PAGE_BYTES * protect_ns())
    copied = sum(copy.region.length if copy.whole else 0 for copy in stop.copies) + stop.copied_bytes
    data = sum(row.populated for row in tracked) + copied
    return Preflight(
        pid=pid,
        name=info.name,
        threads=info.threads,
        rows=rows,
        bound_bytes=data + data // 200 + 65536,
        injection_ns=INJECTION_NS,
        arm_ns=arm,
        stop_ns=PREPARE_NS + THREAD_NS * info.threads + MAPPING_NS * len(tracked) + arm,
        warnings=_warnings(pid, info, tracked) + [stop.warning] * bool(stop.warning),
    )


ACTIONS = {"track": "tracked", "copy": "copied", "leave": "no"}


def _row(pid: int, soft: Decision, stop: Decision, pagemap: int) -> Row:
    mapping = soft.mapping
    populated, huge = _populated(pid, mapping, pagemap)
    return Row(
        start=mapping.start,
        end=mapping.end,
        perms=mapping.perms,
        path=mapping.path,
        populated=populated,
        huge=huge,
        soft=ACTIONS[soft.action],
        stop=ACTIONS[stop.action],
        reason=soft.reason if soft.action == "leave" else "",
        stop_reason=stop.reason if stop.action == "leave" else "",
    )


def _populated(pid: int, mapping: Mapping, pagemap: int) -> tuple[int, int]:
    """Bytes that hold something, and how many of them are in huge pages of private memory."""
    if mapping.shared and mapping.inode:
        try:
            held = os.stat(f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}").st_blocks * 512
            return min(held, mapping.end - mapping.start), 0
        except OSError:
            return mapping.end - mapping.start, 0
    if mapping.path.startswith("[v"):
        return mapping.end - mapping.start, 0
    runs = populated_runs(pagemap, mapping.start, mapping.end)
    huge = CATEGORIES["HUGE"]
    return (
        sum(end - start for start, end, _ in runs),
        sum(end - start for start, end, categories in runs if categories & huge),
    )


def protect_ns() -> float:
    """Nanoseconds to protect one page of 4 KiB on this host, measured on 16 MiB of our own."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, SAMPLE_BYTES + HUGE_BYTES, flags=flags) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        memory.write(b"\1" * (SAMPLE_BYTES + HUGE_BYTES))
        uffd = Uffd(FEATURES["PAGEFAULT_FLAG_WP"])
        try:
            addr = _address(memory)
            uffd.register(addr, SAMPLE_BYTES, MODE_WP)
            began = time.monotonic_ns()
            uffd.protect(addr, SAMPLE_BYTES)
            spent = time.monotonic_ns() - began
            uffd.unregister(addr, SAMPLE_BYTES)
        finally:
            uffd.close()
    return spent / (SAMPLE_BYTES / PAGE_BYTES)


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _warnings(pid: int, info: permissions.ProcessInfo, tracked: list[Row]) -> list[str]:
    found = []
    mergeable = permissions.mergeable_mappings(pid)
    if mergeable:
        found.append(
            f"KSM may merge pages of {mergeable} mappings, which drops their protection: such pages are lost "
            "to the image; write 0 to /sys/kernel/mm/ksm/run meanwhile"
        )
    if any(row.perms[3] == "s" for row in tracked):
        found.append(SHARED_UNSEEN)
    pinned = procfs.status(f"/proc/{pid}/status").get("VmPin", "0 kB").split()[0]
    if pinned != "0":
        found.append(f"{pinned} KiB are pinned (io_uring, RDMA): device writes to them are not seen")
    if info.seccomp:
        found.append("the process has a seccomp filter, which is suspended for the injection")
    return found


def print_preflight(found: Preflight, *, everything: bool = False, out: TextIO | None = None) -> None:
    """What it comes to; below it the mappings: those that hold most, or all."""
    print_text(f"process {found.pid} ({printable(found.name)}), {found.threads} threads", out)
    print_text(f"image: at most {format_size(found.bound_bytes)} uncompressed (write tracking)", out)
    print_text(
        f"soft cut: one thread is stopped for about {found.injection_ns / 1e6:.1f} ms; "
        f"protecting takes about {found.arm_ns / 1e6:.1f} ms, in which writers may wait",
        out,
    )
    print_text(f"stop cut: all threads are stopped for about {found.stop_ns / 1e6:.0f} ms", out)
    for warning in found.warnings:
        print_text(f"warning: {warning}", out)
    print(file=out)
    largest = sorted(found.rows, key=lambda row: -row.populated)[: None if everything else SHOWN_ROWS]
    shown = {row.start for row in largest}
    rows = [_cells(row) for row in found.rows if row.start in shown]
    titles = ("mapping", "perms", "name", "holds", "soft cut", "stop cut")
    print_table(rows, titles=titles, right=[3], out=out)
    hidden = [row for row in found.rows if row.start not in shown]
    if hidden:
        size = format_size(sum(row.populated for row in hidden))
        print_text(f"and {len(hidden)} mappings more, which hold {size}: --all lists them", out)


def _cells(row: Row) -> tuple[str, ...]:
    name = os.path.basename(row.path) if row.path.startswith("/") else row.path
    soft = row.soft if row.soft != "no" else f"no: {row.reason}"
    where = f"{row.start:x}-{row.end:x}"
    stop = row.stop
    if stop == "no" and row.stop_reason != row.reason:
        stop = f"no: {row.stop_reason}"
    return where, row.perms, printable(name) or "anonymous", format_size(row.populated), soft, stop

"""Before a capture is armed: open the target, negotiate, plan, make the engine's parts.

Runs on the caller's thread. What it makes is in `Parts` at once, so that a failure at any line frees it.
"""

from __future__ import annotations

import errno
import os
from typing import Any

from snapengine.capture.region_plan import Plan
from snapengine.capture.resources import Parts
from snapengine.engine.session import Session
from snapengine.errors import HandoverError, UnsupportedError
from snapengine.image.writer import Writer
from snapengine.kernel import procfs
from snapengine.kernel.features import PAGEMAP_WP_BIT, UNCHECKED
from snapengine.kernel.uffd import FEATURES, Uffd, supported_features
from snapengine.options import AUTO, DIRTY_LOGGING, TWO_STEP, WRITE_TRACKING, Options
from snapengine.pipeline.encoder import Encoder
from snapengine.process.target import ProcessTarget
from snapengine.region import any_shared, total_bytes
from snapengine.storage.sinks import open_sink
from snapengine.targets.targets import AttachedTarget, Region

TWO_STEP_BYTES = 64 << 20  # below, all is protected within a millisecond
SMALL_TARGET_BYTES = 16 << 20  # below, one thread is done before a second one has started


def open_target(parts: Parts, sink: Any, options: Options) -> tuple[int, list[Region]]:
    """The sink, and the target with a negotiated userfaultfd: its pid (0: this process) and regions."""
    tracking = options.method == WRITE_TRACKING
    parts.sink = open_sink(sink)
    if isinstance(parts.target, AttachedTarget):
        if parts.target.copy_limit is None:
            parts.target.copy_limit = options.copy_limit
        parts.target.check()  # says more than that this user may have no userfaultfd
    wanted = _wanted_features(options.method)
    if isinstance(parts.target, ProcessTarget) and tracking and parts.target.cut == "stop":
        # Its threads stand from when it is opened: what can be done before that is.
        ahead = parts.target.look_ahead()
        parts.plan = Plan(ahead, parts.target.pid, wanted, attached=True, mappings=parts.target.mappings)
    pid, parts.fd, regions = parts.target.open(wanted)
    parts.opened = True
    handed_over = parts.fd >= 0 and not isinstance(parts.target, AttachedTarget)
    if isinstance(parts.target, AttachedTarget):
        parts.attached = parts.target
        parts.warnings += parts.attached.warnings
        if tracking:  # dirty logging has nobody who reads events
            wanted |= sum(FEATURES[name] for name in parts.attached.events) & int(supported_features())
    if not tracking and not parts.target.can_pause:
        if handed_over:
            raise HandoverError("dirty logging needs a peer that can pause: it announced no pause and resume")
        raise ValueError("dirty logging needs a target that can pause: give pause and resume")
    if not (tracking and any_shared(regions)):
        wanted &= ~FEATURES["EVENT_FORK"]
    if handed_over:  # its owner has negotiated
        wanted = FEATURES["PAGEFAULT_FLAG_WP"] | (0 if tracking else FEATURES["WP_ASYNC"])
    if parts.fd >= 0:
        parts.pidfd = os.pidfd_open(pid)
    fd, parts.fd = parts.fd, -1  # it is the Uffd's from the call on
    parts.uffd = Uffd(wanted, fd)
    if parts.attached is not None:
        regions = parts.attached.registered(parts.uffd)
    return pid, regions


def make_engine(
    parts: Parts, pid: int, regions: list[Region], options: Options, extra: dict[str, Any]
) -> None:
    """What saves and writes: plan, session, writer, encoder. ``extra``: arguments of the session."""
    uffd = parts.uffd
    assert uffd is not None
    assert parts.sink is not None
    parts.warnings += _pins(pid)
    plan = parts.plan = _plan(parts, pid, regions, uffd.features)
    tracking = options.method == WRITE_TRACKING
    lanes = options.fault_threads or min(4, len(os.sched_getaffinity(0)))
    parts.session = Session(
        plan.regions, uffd.fd, uffd.features, pid, parts.pidfd,
        memory_limit=options.memory_limit, fault_threads=lanes if tracking else 1,
        encoders=options.encoders, walkers=_walkers(options, regions) if tracking else 1,
        spill_dir=options.spill_dir, rounds=not tracking, attached=plan.attached,
        stands=tracking and isinstance(parts.target, ProcessTarget) and parts.target.stands,
        sums=options.zstd_level is None, two_step=tracking and _two_step(parts, options, regions), **extra,
    )  # fmt: skip
    uffd.detach()  # the session closes it
    if not tracking and not parts.session.has_scan:
        raise UnsupportedError(errno.EOPNOTSUPP, "dirty logging needs PAGEMAP_SCAN (Linux 6.7)")
    if tracking and not parts.session.checks_protection:
        text = f"this kernel lacks {PAGEMAP_WP_BIT.name} (Linux {PAGEMAP_WP_BIT.since})"
        if options.strict:
            raise UnsupportedError(
                errno.EOPNOTSUPP, f"{text}: whether pages were lost cannot be told, so strict is refused"
            )
        parts.warnings.append(f"{text}: {UNCHECKED}")
    parts.writer = Writer(parts.sink, rate_limit=options.rate_limit)
    if parts.attached is not None:
        parts.frozen = plan.place(parts.attached.frozen_regions)
    hurry = "writers" if tracking else "room"
    parts.encoder = Encoder(
        parts.session.pool, parts.writer, options.zstd_level, options.encoders,
        store_raw="never" if options.compress_always else hurry, follow_sink=options.level_follows_sink,
    )  # fmt: skip


def _plan(parts: Parts, pid: int, regions: list[Region], features: int) -> Plan:
    """As planned ahead, if nothing has changed since."""
    if parts.plan is not None:
        if parts.plan.fits(regions, features):
            return parts.plan
        parts.plan.close()
    mappings = parts.target.mappings if isinstance(parts.target, ProcessTarget) else None
    return Plan(regions, pid, features, attached=parts.attached is not None, mappings=mappings)


def _stopped(parts: Parts, options: Options) -> bool:
    """Whether its threads are stopped before the memory is listed, until T: a stop cut of a process."""
    tracking = options.method == WRITE_TRACKING
    return tracking and isinstance(parts.target, ProcessTarget) and parts.target.cut == "stop"


def _two_step(parts: Parts, options: Options, regions: list[Region]) -> bool:
    if options.arming != AUTO:
        return options.arming == TWO_STEP
    return not _stopped(parts, options) and total_bytes(regions) >= TWO_STEP_BYTES


def _walkers(options: Options, regions: list[Region]) -> int:
    if options.walk_threads:
        return options.walk_threads
    small = total_bytes(regions) < SMALL_TARGET_BYTES
    return 1 if small else min(2, len(os.sched_getaffinity(0)))


def _pins(pid: int) -> list[str]:
    """Pages that a device or io_uring has pinned can change without a fault: a warning, if there are any."""
    pinned = procfs.status(f"/proc/{pid or 'self'}/status").get("VmPin", "0 kB").split()[0]
    if pinned == "0":
        return []
    what = "are pinned (io_uring buffers, RDMA): device writes to them after T are not seen"
    return [f"{pinned} KiB of the target {what}"]


def _wanted_features(method: str) -> int:
    """The feature bits to ask for, of those this kernel has."""
    base = FEATURES["PAGEFAULT_FLAG_WP"] | FEATURES["WP_HUGETLBFS_SHMEM"]
    if method == DIRTY_LOGGING:
        wanted = base | FEATURES["WP_ASYNC"] | FEATURES["MISSING_SHMEM"]
    else:
        wanted = base | FEATURES["MISSING_SHMEM"] | FEATURES["EVENT_FORK"]
    return wanted & int(supported_features()) | FEATURES["PAGEFAULT_FLAG_WP"]

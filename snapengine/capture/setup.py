"""Set-up of a capture: open the target, negotiate the userfaultfd, plan, allocate the resources.

Runs on the caller's thread. Each resource is stored in `Resources` at once, so that a failure frees it.
"""

from __future__ import annotations

import os
from typing import Any

from snapengine.capture.arguments import NO_PAUSE, fault_threads, lacks, walkers
from snapengine.capture.region_plan import Plan
from snapengine.capture.resources import Resources
from snapengine.engine.session import Session
from snapengine.errors import HandoverError
from snapengine.kernel import procfs
from snapengine.kernel.features import PAGEMAP_WP_BIT, UNCHECKED
from snapengine.kernel.uffd import FEATURES, Uffd, supported_features
from snapengine.options import AUTO, DIRTY_LOGGING, TWO_STEP, WRITE_TRACKING, Options
from snapengine.pipeline.pipeline import writer_and_encoder
from snapengine.regions import Region, any_shared, total_bytes
from snapengine.storage.sinks import open_sink

TWO_STEP_BYTES = 64 << 20  # below, all is protected within a millisecond


def open_target(resources: Resources, sink: Any, options: Options) -> tuple[int, list[Region]]:
    """The sink, and the target with a negotiated userfaultfd: its pid (0: this process) and regions."""
    tracking = options.method == WRITE_TRACKING
    resources.sink = open_sink(sink)
    attached = resources.attached
    if attached is not None:
        if attached.copy_limit is None:
            attached.copy_limit = options.copy_limit
        attached.check()  # its error says more than that userfaultfd is not allowed
    wanted = _wanted_features(options.method)
    if attached is not None and (ahead := attached.look_ahead()) is not None:
        resources.plan = Plan(ahead, attached.pid, wanted, attached=True, mappings=attached.mappings)
    pid, resources.fd, regions = resources.target.open(wanted)
    resources.opened = True
    handed_over = resources.fd >= 0 and attached is None
    if attached is not None:
        resources.warnings += attached.warnings
        if tracking:  # with dirty logging no thread reads events
            wanted |= sum(FEATURES[name] for name in attached.events) & int(supported_features())
    if not tracking and not resources.target.can_pause:  # some targets learn it from their peer
        if handed_over:
            raise HandoverError("dirty logging needs a peer that can pause: it announced no pause and resume")
        raise ValueError(NO_PAUSE)
    if not (tracking and any_shared(regions)):
        wanted &= ~FEATURES["EVENT_FORK"]
    if handed_over:  # its owner has negotiated
        wanted = FEATURES["PAGEFAULT_FLAG_WP"] | (0 if tracking else FEATURES["WP_ASYNC"])
    if resources.fd >= 0:
        resources.pidfd = os.pidfd_open(pid)
    fd, resources.fd = resources.fd, -1  # it is the Uffd's from the call on
    resources.uffd = Uffd(wanted, fd)
    if attached is not None:
        regions = attached.registered(resources.uffd)
    return pid, regions


def make_engine(
    resources: Resources, pid: int, regions: list[Region], options: Options, extra: dict[str, Any]
) -> None:
    """Make plan, session, writer and encoder. ``extra``: arguments of the session."""
    uffd = resources.uffd
    assert uffd is not None
    assert resources.sink is not None
    resources.warnings += _pins(pid)
    plan = resources.plan = _plan(resources, pid, regions, uffd.features)
    tracking = options.method == WRITE_TRACKING
    resources.session = Session(
        plan.regions, uffd.fd, uffd.features, pid, resources.pidfd,
        memory_limit=options.memory_limit, fault_threads=fault_threads(options),
        encoders=options.encoders, walkers=walkers(options, total_bytes(regions)),
        spill_dir=options.spill_dir, rounds=not tracking, attached=plan.attached,
        target_stopped=tracking and resources.attached is not None and resources.attached.is_stopped,
        sums=options.zstd_level is None, two_step=tracking and _two_step(resources, options, regions),
        **extra,
    )  # fmt: skip
    uffd.detach()  # the session closes it
    if tracking and not resources.session.checks_protection:
        resources.warnings.append(f"{lacks(PAGEMAP_WP_BIT)}: {UNCHECKED}")
    if resources.attached is not None:
        resources.copied = plan.place(resources.attached.copied_regions)
    resources.writer, resources.encoder = writer_and_encoder(
        resources.session.pool, resources.sink, options, store_raw="writers" if tracking else "room"
    )


def _plan(resources: Resources, pid: int, regions: list[Region], features: int) -> Plan:
    """The plan that was made ahead, if nothing has changed since, or a new one."""
    if resources.plan is not None:
        if resources.plan.fits(regions, features):
            return resources.plan
        resources.plan.close()
    mappings = resources.attached.mappings if resources.attached is not None else None
    return Plan(regions, pid, features, attached=resources.attached is not None, mappings=mappings)


def _two_step(resources: Resources, options: Options, regions: list[Region]) -> bool:
    if options.arming != AUTO:
        return options.arming == TWO_STEP
    stopped = resources.attached is not None and resources.attached.stops_first
    return not stopped and total_bytes(regions) >= TWO_STEP_BYTES


def _pins(pid: int) -> list[str]:
    """A warning if devices or io_uring have pinned pages: they can write to them without a fault."""
    pinned = procfs.status(f"/proc/{pid or 'self'}/status").get("VmPin", "0 kB").split()[0]
    if pinned == "0":
        return []
    what = "are pinned (io_uring buffers, RDMA): device writes to them after T are not seen"
    return [f"{pinned} KiB of the target {what}"]


def _wanted_features(method: str) -> int:
    """The feature bits to request, of those that this kernel has."""
    base = FEATURES["PAGEFAULT_FLAG_WP"] | FEATURES["WP_HUGETLBFS_SHMEM"]
    if method == DIRTY_LOGGING:
        wanted = base | FEATURES["WP_ASYNC"] | FEATURES["MISSING_SHMEM"]
    else:
        wanted = base | FEATURES["MISSING_SHMEM"] | FEATURES["EVENT_FORK"]
    return wanted & int(supported_features()) | FEATURES["PAGEFAULT_FLAG_WP"]

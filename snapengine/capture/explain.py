"""From an errno of the engine to an exception that names the call, the mapping and the reason."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator

from snapengine.capture.region_plan import Plan
from snapengine.capture.resources import Resources
from snapengine.errors import (
    AlreadyTrackedError,
    AttachError,
    HandoverError,
    MachineError,
    RegisterError,
    SinkError,
    SnapengineError,
    TargetGoneError,
    UffdError,
    UnsupportedError,
)
from snapengine.kernel import procfs
from snapengine.kernel.procmaps import covering, has_ended, read_maps
from snapengine.kernel.threads import ends
from snapengine.regions import Region

_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")
_UFFD_FLAGS = frozenset({"um", "uw", "ui"})  # missing, write-protect, minor


def explain(err: int, call: str, addr: int, plan: Plan) -> SnapengineError:
    """The exception for a failure of `call` at `addr` during a capture of `plan`."""
    # A target that dies gives ESRCH to most calls, but ENOMEM to UFFDIO_REGISTER.
    pid = plan.pid
    if pid and has_ended(pid):
        return TargetGoneError(errno.ESRCH, f"the target process {pid} ended during the capture")
    if err == errno.ESRCH:
        text = f"the target process {pid} ended, or executed another program, during the capture"
        return TargetGoneError(errno.ESRCH, text)
    if call == "UFFDIO_REGISTER":
        return _explain_register(err, addr, plan)
    return UffdError(err, f"{call}: {os.strerror(err)}" + (f" at {addr:#x}" if addr else ""))


def explain_end(error: BaseException, resources: Resources) -> BaseException:
    """`error`, or `TargetGoneError` if the target process has ended: its end can appear as any error."""
    pid = int(getattr(resources.target, "pid", 0))
    ours = isinstance(error, TargetGoneError | SinkError | UnsupportedError)
    if not pid or ours or not isinstance(error, OSError | HandoverError | MachineError):
        return error
    attached = resources.attached
    never_there = isinstance(error, AttachError) and error.errno == errno.ESRCH
    if resources.sink is None or (never_there and (attached is None or not attached.found)):
        return error
    if not ends(pid):
        return error
    return TargetGoneError(errno.ESRCH, f"the target process {pid} ended during the capture")


def _explain_register(err: int, addr: int, plan: Plan) -> RegisterError:
    region: Region = next(p.region for p in plan.regions if p.track_start == addr)
    found = covering(read_maps(plan.pid or "self"), region.addr, region.addr + region.length)
    where = f"{found[0] if found else hex(region.addr)}"
    if err == errno.EBUSY:
        pid = plan.pid or "self"
        taken = ", ".join(_tracked_by_others(pid, region.addr, region.addr + region.length))
        text = f"region {region.name!r}: {taken or where} is already being tracked by another userfaultfd"
        way = "; to save the rest, name it (regions, --regions)" if plan.attached else ""
        return AlreadyTrackedError(err, text + way)
    if err == errno.EINVAL:
        why = "the kernel write-protects only anonymous memory and memory files (memfd, /dev/shm, hugetlb)"
    elif err == errno.EPERM:
        why = "the mapping is sealed or may not be written"
    else:
        why = os.strerror(err)
    return RegisterError(err, f"region {region.name!r} in {where} cannot be tracked: {why}")


def _tracked_by_others(pid: int | str, start: int, end: int) -> Iterator[str]:
    """The mappings in the range that are registered with a userfaultfd, by the flags in smaps (proc(5))."""
    span = ""
    with contextlib.suppress(OSError):  # it has ended, or may not be read
        for line in procfs.lines(f"/proc/{pid}/smaps"):
            if match := _HEAD.match(line):
                inside = int(match[1], 16) < end and int(match[2], 16) > start
                span = f"{match[1]}-{match[2]}" if inside else ""
            elif span and line.startswith("VmFlags:") and not _UFFD_FLAGS.isdisjoint(line.split()):
                yield span

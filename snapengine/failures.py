"""What an errno of the engine means, in words: which call, which mapping, why."""

from __future__ import annotations

import errno
import os

from snapengine.errors import (
    AlreadyTrackedError,
    RegisterError,
    SnapengineError,
    TargetGoneError,
    UffdError,
)
from snapengine.maps import covering, has_ended, read_maps
from snapengine.plan import Plan
from snapengine.targets import Region


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


def _explain_register(err: int, addr: int, plan: Plan) -> RegisterError:
    region: Region = next(p.region for p in plan.regions if p.track_start == addr)
    found = covering(read_maps(plan.pid or "self"), region.addr, region.addr + region.length)
    where = f"region {region.name!r} in {found[0] if found else hex(region.addr)} cannot be tracked: "
    if err == errno.EBUSY:
        way = ": name the rest to save it without that (regions, --regions)" if plan.attached else ""
        return AlreadyTrackedError(err, where + f"it is already being tracked by another userfaultfd{way}")
    if err == errno.EINVAL:
        why = "the kernel write-protects only anonymous memory and memory files (memfd, /dev/shm, hugetlb)"
    elif err == errno.EPERM:
        why = "the mapping is sealed or may not be written"
    else:
        why = os.strerror(err)
    return RegisterError(err, where + why)

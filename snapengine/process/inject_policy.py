"""What an injection tries, in which order, and what its failures mean. Decides only; stops nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from snapengine.base.descriptor import Descriptor
from snapengine.errors import AttachError, TargetGoneError, UffdPermissionError, UnsupportedError
from snapengine.kernel import procfs
from snapengine.kernel.procmaps import Mapping, maps_text, parse_maps
from snapengine.kernel.threads import thread_stat
from snapengine.kernel.uffd import PERMISSION_HELP
from snapengine.process.permissions import (
    CAP_SYS_PTRACE,
    ProcessInfo,
    denied_because,
    has_capability,
    live_threads,
    name_of,
)

HELP = (
    "one of these allows it: give this user read and write access to /dev/userfaultfd; "
    "run the engine as root; set the sysctl vm.unprivileged_userfaultfd to 1; give the target CAP_SYS_PTRACE"
)
SYSCALL = b"\x0f\x05"  # the two bytes of the instruction, at any place
PIDFD_THREAD = os.O_EXCL  # Linux 6.9
MISC_MAJOR = 10
SEARCH_BYTES = 4 << 20
DEVICE = "/dev/userfaultfd"
FOLDERS = ("/dev/shm", "/run", "/tmp", "/var/tmp")


@dataclass(frozen=True, slots=True)
class Way:
    """How the target gets a userfaultfd: by a device that we hand over, or by userfaultfd(2)."""

    name: str
    device: int = -1
    """A descriptor of ours; -1: the system call."""


def open_pidfd(pid: int, tid: int) -> int:
    """A pidfd whose descriptor table is the thread's. Raises OSError.

    A leader that has ended has no table any more: then only a pidfd of the thread (Linux 6.9) works.
    """
    try:
        return os.pidfd_open(tid, PIDFD_THREAD)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.pidfd_open(pid)


def _search(memory: int, mapping: Mapping) -> int | None:
    try:
        code = os.pread(memory, min(mapping.end - mapping.start, SEARCH_BYTES), mapping.start)
    except OSError:
        return None
    found = code.find(SYSCALL)
    return None if found < 0 else mapping.start + found


def syscall_instruction(tid: int) -> int:
    """Address of a syscall instruction in a thread's memory: the vdso's, or any in mapped code.

    Raises AttachError if there is none, OSError if the thread has ended.
    """
    code = [mapping for mapping in parse_maps(maps_text(tid)) if mapping.perms.startswith("r-x")]
    code.sort(key=lambda mapping: mapping.path != "[vdso]")
    with Descriptor(f"/proc/{tid}/mem", os.O_RDONLY) as memory:
        for mapping in code:
            found = _search(memory, mapping)
            if found is not None:
                return found
    if not code:
        raise ProcessLookupError(errno.ESRCH, f"thread {tid} has no memory any more")
    text = f"thread {tid} maps no syscall instruction, so it cannot make a system call for us"
    raise AttachError(errno.EOPNOTSUPP, text)


def _device_number() -> int | None:
    """The number of the userfaultfd device; None before Linux 6.1, or if it is not built in."""
    with contextlib.suppress(OSError), open("/proc/misc", encoding="ascii") as lines:
        for line in lines:
            minor, _, name = line.strip().partition(" ")
            if name == "userfaultfd":
                return os.makedev(MISC_MAJOR, int(minor))
    return None


def _open_own_node() -> int:
    """Open the device where /dev has no node of it (containers): by a temporary node. Raises OSError."""
    number = _device_number()
    if number is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), DEVICE)
    refusal: OSError | None = None
    for folder in FOLDERS:
        node = f"{folder}/.snapengine-{secrets.token_hex(12)}"
        try:
            os.mknod(node, stat.S_IFCHR | 0o600, number)
            try:
                return os.open(node, os.O_RDWR | os.O_CLOEXEC)
            finally:
                os.unlink(node)
        except OSError as error:
            refusal = error
    assert refusal is not None
    raise refusal


def open_device(path: str | os.PathLike[str] | None = None) -> int:
    """A descriptor of the userfaultfd device, which the caller closes. Raises OSError."""
    try:
        return os.open(path or DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        if path is not None:
            raise
    return _open_own_node()


def _may_call(info: ProcessInfo) -> bool:
    """Whether the target may probably call userfaultfd(2). The guess saves a stop that would fail."""
    with contextlib.suppress(OSError), open("/proc/sys/vm/unprivileged_userfaultfd", "rb") as knob:
        if knob.read().strip() == b"1":
            return True
    return bool(info.capabilities >> CAP_SYS_PTRACE & 1) and info.same_user_namespace is not False


@contextlib.contextmanager
def ways(info: ProcessInfo, path: str | os.PathLike[str] | None = None) -> Iterator[list[Way]]:
    """The ways to try, in order, at least one. The device is closed at the end.

    UffdPermissionError: the device `path` cannot be opened."""
    device, name = -1, os.fspath(path or DEVICE)
    try:
        device = open_device(path)
    except OSError as error:
        if path is not None:
            raise UffdPermissionError(error.errno, f"{name}: {error.strerror}; {PERMISSION_HELP}") from None
    found = [Way(name, device)] if device >= 0 else []
    if path is None and (_may_call(info) or not found):
        found.insert(0, Way("userfaultfd(2)"))
    try:
        yield found
    finally:
        if device >= 0:
            os.close(device)


def foresee(info: ProcessInfo) -> OSError | None:
    """The error that an injection would certainly end with; None: it may succeed. Stops nothing."""
    if _may_call(info):
        return None
    try:
        os.close(open_device())
    except OSError:
        return explain(info, info.pid, "call", errno.EPERM, Way("userfaultfd(2)"))
    return None


def is_for_another_thread(pid: int, tid: int, step: str, err: int) -> bool:
    """Whether another thread may succeed: this one is about to end, or did not stop."""
    if step == "stop":
        return True
    if step != "seize":
        return False
    if err == errno.EPERM:
        # EPERM for a thread that may be traced means that it is exiting.
        try:
            return not thread_stat(pid, tid).alive
        except (FileNotFoundError, ProcessLookupError):
            return True
    return err == errno.ESRCH


def is_for_another_way(step: str, err: int) -> bool:
    """Whether another way to open a userfaultfd may succeed."""
    # A thread that is stopped and does not run (ETIMEDOUT) does not run in another way either.
    ours = step in ("call", "page", "pass", "ioctl")
    return ours and err not in (errno.ESRCH, errno.EMFILE, errno.ETIMEDOUT)


def nobody_stopped(info: ProcessInfo, tried: set[int], deadline: float) -> OSError:
    """The error for a process of which no thread stopped in time."""
    who = f"process {info.pid} ({info.name})"
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        threads = live_threads(info.pid)
        states = [thread for thread in threads if thread.tid in tried]
        if threads and not states:
            return AttachError(errno.EAGAIN, f"{who} cannot be stopped: each thread ends before it stops")
        if states:
            each = ", ".join(f"{thread.tid} ({_state(thread.tid, thread.state)})" for thread in states[:4])
            text = f"{who} did not stop within {deadline:g} s: thread {each}"
            return AttachError(errno.ETIMEDOUT, text)
    return TargetGoneError(errno.ESRCH, f"{who} ended while it was being attached to")


def sharer_not_stopped(info: ProcessInfo, process: int, tid: int, err: int) -> OSError:
    """The error for a process that shares the target's memory and cannot be stopped."""
    who = f"process {info.pid} ({info.name}) shares its memory with process {process} ({name_of(process)})"
    if err == errno.ETIMEDOUT:
        why = f"did not stop in time (thread {tid})"
    elif err == errno.EBUSY:
        why = "is being traced by another program"
    else:
        why = f"may not be stopped ({os.strerror(err)})"
    text = f"{who}, which {why}: a stop cut would not be one state; take a soft cut, or end that process"
    return AttachError(err, text)


def _state(tid: int, state: str) -> str:
    if state != "D":
        return f"state {state}"
    try:
        with open(f"/proc/{tid}/wchan", encoding="ascii") as lines:
            where = lines.read().strip("\0\n0 ")
    except OSError:
        where = ""
    return "uninterruptible sleep" + (f" in {where}" if where else "")


def _seize_refused(info: ProcessInfo, tid: int, err: int) -> AttachError:
    who = f"process {info.pid} ({info.name})"
    if err != errno.EPERM:
        what = "with its seccomp filter suspended " if info.seccomp else ""
        return AttachError(err, f"{who} cannot be seized {what}(PTRACE_SEIZE: {os.strerror(err)})")
    tracer = 0
    with contextlib.suppress(OSError):
        tracer = int(procfs.status(f"/proc/{tid}/status")["TracerPid"])
    if tracer:
        return AttachError(errno.EBUSY, f"{who} is being traced by {tracer} ({name_of(tracer)})")
    if info.seccomp and has_capability(CAP_SYS_PTRACE):
        return AttachError(err, f"{who} has a seccomp filter, and this user may not suspend it")
    return AttachError(err, denied_because(info))


def explain(info: ProcessInfo, tid: int, step: str, err: int, way: Way | None) -> OSError:
    """The error to raise for a failed attempt."""
    who = f"process {info.pid} ({info.name})"
    if step == "seize":
        return _seize_refused(info, tid, err)
    if err == errno.ESRCH:
        return TargetGoneError(err, f"{who} ended while it was being attached to")
    if step == "compat":
        return AttachError(err, f"{who} runs 32-bit code: only 64-bit programs can be attached")
    if err == errno.EMFILE:
        return AttachError(err, f"{who} has no free descriptor (or this process has none)")
    if err == errno.ETIMEDOUT:
        return AttachError(err, f"{who} is stopped, but does not run a call: is its cgroup frozen?")
    if step == "call" and err == errno.ENOSYS:
        return UnsupportedError(err, "this kernel is built without userfaultfd (CONFIG_USERFAULTFD)")
    if step == "page":
        text = "no room for one page (address space limit, memory limit, vm.max_map_count)"
        return AttachError(err, f"{who}: {text}: {os.strerror(err)}")
    if step in ("call", "pass", "ioctl"):
        name = way.name if way else "userfaultfd(2)"
        text = f"{who}, uid {info.fsuid}: {name}: {os.strerror(err)}; {HELP}"
        return UffdPermissionError(err, text)
    return AttachError(err, f"{who}: {step}: {os.strerror(err)}")

"""Permission checks before attaching to a process: what it is, whether it can be attached to, which thread to
stop.

Reads /proc only; changes and stops nothing. The answers can be outdated a moment later, so the caller must
still handle every refusal of the kernel. These checks find the reasons behind the kernel's single EPERM.
Sources: proc(5), ptrace(2), and fs/proc of Linux.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from snapengine.errors import AttachError, TargetGoneError
from snapengine.kernel import procfs
from snapengine.kernel.cgroups import frozen_by
from snapengine.kernel.procmaps import maps_text
from snapengine.kernel.threads import PF_EXITING, ThreadStat, ends, thread_stat

CAP_SYS_PTRACE = 19
CAP_SYS_ADMIN = 21

# include/linux/sched.h: flags of /proc/PID/stat that no manual page lists.
PF_IO_WORKER = 0x10
PF_USER_WORKER = 0x4000
PF_KTHREAD = 0x200000
NOT_TO_BE_TRACED = PF_EXITING | PF_IO_WORKER | PF_USER_WORKER | PF_KTHREAD

# x86-64 numbers of system calls on which a stop has a side effect. PARTIAL: a transfer that has begun returns
# a short count. TIMED: EINTR, which we repair, but a relative timeout starts from the beginning.
PARTIAL_CALLS = frozenset({1, 18, 20, 40, 44, 46, 275, 276, 296, 307, 326})
TIMED_CALLS = frozenset({45, 47, 65, 128, 208, 220, 232, 281, 299, 333, 426, 441})

MAX_CANDIDATES = 8
MAX_THREADS_LOOKED_AT = 64


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """A process as /proc shows it. A field that could not be read is None."""

    pid: int
    name: str
    state: str
    """One letter, proc(5). It is the leader's state, which may have ended before the other threads."""
    uid: int
    """Real user."""
    fsuid: int
    """The user id for file access."""
    capabilities: int
    """The effective set, a bit mask (capabilities(7))."""
    threads: int
    tracer: int
    """The thread that traces it; 0: none."""
    tracer_name: str
    seccomp: int
    """Mode: 0 none, 1 strict, 2 filter."""
    bits: int | None
    """32 or 64, from the ELF header of its program."""
    kernel_thread: bool
    same_mount_namespace: bool | None
    same_user_namespace: bool | None
    ksm_pages: int | None
    """Pages that KSM has merged (Linux 5.19); merging drops a page's write protection."""
    thread_ids: tuple[int, ...]
    """Threads that are alive and can be traced, at most 64."""

    @property
    def ended(self) -> bool:
        """Whether all of its threads have ended."""
        return not self.thread_ids and not self.kernel_thread


def live_threads(pid: int) -> list[ThreadStat]:
    """The threads that can be traced. Kernel workers (io_uring), which /proc lists among them, cannot."""
    found = []
    for tid in sorted(map(int, os.listdir(f"/proc/{pid}/task")))[:MAX_THREADS_LOOKED_AT]:
        try:
            stat = thread_stat(pid, tid)
        except (FileNotFoundError, ProcessLookupError):
            continue
        if stat.alive and not stat.flags & NOT_TO_BE_TRACED:
            found.append(stat)
    return found


def _bits(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/exe", "rb") as program:
            head = program.read(5)
    except OSError:
        return None
    return {b"\x7fELF\x01": 32, b"\x7fELF\x02": 64}.get(head)


def _same_namespace(pid: int, kind: str) -> bool | None:
    try:
        return os.stat(f"/proc/{pid}/ns/{kind}").st_ino == os.stat(f"/proc/self/ns/{kind}").st_ino
    except OSError:
        return None


def _ksm_pages(pid: int) -> int | None:
    try:
        return int(procfs.read(f"/proc/{pid}/ksm_merging_pages"))
    except (OSError, ValueError):
        return None


def name_of(pid: int) -> str:
    """The name of a process or thread; "?" if it has ended."""
    try:
        return procfs.read(f"/proc/{pid}/comm").removesuffix("\n")
    except OSError:
        return "?"


def describe(pid: int) -> ProcessInfo:
    """A process as /proc shows it. Raises AttachError (ESRCH) if it does not exist."""
    if pid <= 0:
        raise AttachError(errno.ESRCH, f"{pid} is not a process id")
    try:
        status = procfs.status(f"/proc/{pid}/status")
        leader = thread_stat(pid, pid)
        threads = live_threads(pid)
    except (FileNotFoundError, ProcessLookupError):
        raise AttachError(errno.ESRCH, f"no such process: {pid}") from None
    group = int(status["Tgid"])
    if group != pid:
        text = f"{pid} is a thread of process {group} ({name_of(group)}): give that number"
        raise AttachError(errno.ESRCH, text)
    user = status["Uid"].split()
    tracer = int(status["TracerPid"])
    one = threads[0].tid if threads else pid  # an ended leader shows neither program nor namespaces
    return ProcessInfo(
        pid=pid,
        name=leader.name,
        state=leader.state,
        uid=int(user[0]),
        fsuid=int(user[3]),
        capabilities=int(status["CapEff"], 16),
        threads=int(status["Threads"]),
        tracer=tracer,
        tracer_name=name_of(tracer) if tracer else "",
        seccomp=int(status.get("Seccomp", 0)),
        bits=_bits(one),
        kernel_thread=bool(leader.flags & PF_KTHREAD),
        same_mount_namespace=_same_namespace(one, "mnt"),
        same_user_namespace=_same_namespace(one, "user"),
        ksm_pages=_ksm_pages(one),
        thread_ids=tuple(thread.tid for thread in threads),
    )


def mergeable_mappings(pid: int) -> int:
    """How many mappings KSM may merge (VmFlags "mg"). Reads smaps, which walks all page tables: 20 ms a
    GiB. Raises OSError."""
    lines = procfs.lines(f"/proc/{pid}/smaps")
    return sum(line.startswith("VmFlags:") and " mg" in line for line in lines)


def kernel_writers(pid: int, maps: bytes = b"") -> list[str]:
    """What may write to a process's memory while all of its threads are stopped, as sentences. ``maps``: its
    /proc/PID/maps, if that was read. Raises OSError."""
    workers = 0
    for tid in os.listdir(f"/proc/{pid}/task"):
        try:
            workers += bool(thread_stat(pid, int(tid)).flags & (PF_IO_WORKER | PF_USER_WORKER))
        except (FileNotFoundError, ProcessLookupError):
            continue
    found = []
    if workers:
        found.append(
            f"{workers} workers of the kernel (io_uring, vhost) cannot be stopped: memory that is copied "
            "during the stop, and that they write to, may not be of one instant"
        )
    if b"/[aio]" in (maps or maps_text(pid)):
        found.append(
            "it uses kernel AIO (io_setup): direct reads in flight at T write to its memory unseen"
        )
    return found


def has_capability(bit: int) -> bool:
    """Whether this process has the capability in its effective set."""
    return bool(int(procfs.status("/proc/self/status")["CapEff"], 16) >> bit & 1)


def _may_not_trace(info: ProcessInfo) -> str | None:
    """Why the process may not be traced. Opening its memory needs the same permission as attaching
    (PTRACE_MODE_ATTACH), Yama included."""
    try:
        os.close(os.open(f"/proc/{info.thread_ids[0]}/mem", os.O_RDONLY | os.O_CLOEXEC))
    except PermissionError:
        return denied_because(info)
    except OSError:
        return None  # it is ending, as attaching will report
    return None


def denied_because(info: ProcessInfo) -> str:
    """Why the kernel does not let this user trace the process, as far as /proc shows."""
    who = f"process {info.pid} ({info.name})"
    if info.uid != os.geteuid():
        return f"{who} belongs to uid {info.uid}: attaching needs root or CAP_SYS_PTRACE"
    if info.same_user_namespace is False:
        return f"{who} is in another user namespace: attaching needs CAP_SYS_PTRACE there"
    try:
        scope = int(procfs.read("/proc/sys/kernel/yama/ptrace_scope"))
    except (OSError, ValueError):
        scope = 0
    if scope == 3:
        return f"{who}: kernel.yama.ptrace_scope is 3, which forbids attaching until the next boot"
    if scope:
        return f"{who}: kernel.yama.ptrace_scope is {scope}: attaching needs root or CAP_SYS_PTRACE"
    return f"{who} is protected (not dumpable, or more privileged): attaching needs CAP_SYS_PTRACE"


def refuse_reason(info: ProcessInfo) -> OSError | None:
    """The error to raise for a process that cannot be attached to; None: no reason is known."""
    who = f"process {info.pid} ({info.name})"
    if info.pid == os.getpid():
        return AttachError(errno.EINVAL, f"{who} is this process: use BufferTarget for its memory")
    if info.kernel_thread:
        return AttachError(errno.EOPNOTSUPP, f"{who} is a kernel thread: it has no memory of its own")
    if info.ended:
        return TargetGoneError(errno.ESRCH, f"{who} has ended")
    if info.tracer:
        by = f"{info.tracer} ({info.tracer_name})"
        return AttachError(errno.EBUSY, f"{who} is being traced by {by}: one tracer at a time")
    if frozen := frozen_by(info.pid):
        text = f"is frozen by its cgroup {frozen[0]}: thaw it first ({frozen[1]})"
        return AttachError(errno.EAGAIN, f"{who} {text}")
    if info.bits == 32:
        return AttachError(errno.EOPNOTSUPP, f"{who} is a 32-bit program: only 64-bit ones can be attached")
    denied = _may_not_trace(info)
    if denied:
        return AttachError(errno.EPERM, denied)
    if info.seccomp and not has_capability(CAP_SYS_ADMIN):
        return AttachError(errno.EPERM, f"{who} has a seccomp filter: suspending it needs CAP_SYS_ADMIN")
    return None


def check(pid: int) -> ProcessInfo:
    """Describe the process, or raise the error that says why it cannot be attached to.

    Raises AttachError, or TargetGoneError if the process has ended.
    """
    info = describe(pid)
    reason = refuse_reason(info)
    if reason is not None:
        raise reason
    return info


def check_to_save(pid: int) -> ProcessInfo:
    """`check`, and check that its memory can be listed: /proc/PID/maps is empty once the first thread has
    ended.

    Raises AttachError, or TargetGoneError if the process has ended.
    """
    info = check(pid)
    if info.state in ("Z", "X"):
        if ends(pid):
            raise TargetGoneError(errno.ESRCH, f"process {pid} ({info.name}) has ended")
        text = "its first thread has ended, and with it the list of its memory: it cannot be saved"
        raise AttachError(errno.EOPNOTSUPP, f"process {pid} ({info.name}): {text}")
    return info


def _price_of_stopping(pid: int, thread: ThreadStat) -> int:
    """The cost of stopping a thread, lower is better: asleep in a call that the kernel restarts (0), in user
    code (1), in a call that we must repeat (2) or that may end early (3), in uninterruptible sleep (4)."""
    if thread.state == "D":
        return 4
    if thread.state != "S":
        return 1
    try:
        call = procfs.read(f"/proc/{pid}/task/{thread.tid}/syscall").split()[0]
    except (OSError, IndexError):
        return 3
    if call == "running":
        return 1
    return 3 if int(call) in PARTIAL_CALLS else 2 if int(call) in TIMED_CALLS else 0


def threads_to_stop(pid: int) -> list[int]:
    """The threads that a short stop disturbs least, best first, at most 8. Raises OSError."""
    threads = live_threads(pid)
    threads.sort(key=lambda thread: _price_of_stopping(pid, thread))
    return [thread.tid for thread in threads[:MAX_CANDIDATES]]

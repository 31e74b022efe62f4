"""Open a userfaultfd in a process that does not cooperate: stop one of its threads, and have it make the
system call.

The stop runs in a helper process that shares our memory and descriptors (`snap_run_in_helper`). It survives a
SIGKILL of this process: it still closes the descriptor in the target, restores the thread's registers and
detaches. One gap remains: a SIGKILL of the helper itself (by its own pid, of its whole cgroup, by the OOM
killer, which kills all processes that share the memory, or by the end of the pid namespace) between the first
changed register and the last restored one, 0.4 ms (median of 90). The target then continues with the
registers of the injected call, and most likely crashes.

The descriptor is opened in the target, copied here by pidfd_getfd(2) and closed there, in one stop. If it
stayed open there, it would keep the memory protected after our end, and block the target for ever.

There are two ways to open it. If the target's user may call userfaultfd(2), only registers are changed.
Otherwise this process opens /dev/userfaultfd and hands it to the target, which calls USERFAULTFD_IOC_NEW on
it. That depends on no file system, mount namespace, device cgroup or user of the target. Passing a descriptor
needs memory: a page that the stopped thread maps and unmaps for us. The memory below its stack pointer may be
in use by other threads (a coroutine's stack inside an array). No byte of the target's own memory is ever
written.

The helper allocates nothing, runs no Python and takes no lock: all of its data is in a job_t and on its
own stack.
"""

from libc.errno cimport EMFILE, ETIMEDOUT, errno
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memset
from posix.unistd cimport close

from snapengine.kernel.ptrace cimport (
    PTRACE_O_SUSPEND_SECCOMP, PTRACE_O_TRACESYSGOOD, snap_boost_self, snap_leave_session, snap_run_in_helper,
)
from snapengine.base.pthreads cimport snap_now_ns
from snapengine.process.remotecall cimport (
    STEP_CALL, STEP_CLOSE, STEP_DONE, STEP_GETFD, STEP_IOCTL, STEP_PAGE, STEP_PASS,
    remote_call, remote_get, remote_put, remote_release, remote_stop, remote_t, step_t,
)

import errno as errno_codes
import os
from collections import namedtuple

from snapengine.process import permissions
from snapengine.process import inject_policy
from snapengine.errors import TargetGoneError

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_userfaultfd, SYS_ioctl, SYS_close, SYS_pidfd_getfd
    long SYS_mmap, SYS_munmap, SYS_socketpair, SYS_recvmsg

cdef extern from "<unistd.h>" nogil:
    long c_syscall "syscall"(long number, ...)

cdef extern from "<fcntl.h>" nogil:
    int O_CLOEXEC, O_NONBLOCK

cdef extern from "<sys/socket.h>" nogil:
    int AF_UNIX, SOCK_DGRAM, SOCK_CLOEXEC, MSG_CMSG_CLOEXEC, MSG_DONTWAIT

cdef extern from "process/fd_passing.h" nogil:
    struct snap_passing:
        int pair[2]
    void snap_passing_init(snap_passing *passing, uint64_t at)
    int snap_passing_send(int socket, int fd)
    int snap_passing_received(const snap_passing *passing)

cdef extern from "<sys/mman.h>" nogil:
    int PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE

cdef extern from "snapengine/internal/linux_compat.h" nogil:
    unsigned long USERFAULTFD_IOC_NEW

cdef enum:
    PASSING_BYTES = 4096            # at least a snap_passing: a page
    PASSING_MESSAGE = 8             # where its msghdr is
    MAX_THREADS_TRIED = 8

cdef uint64_t CALL_LIMIT_NS = 2000000000   # for a call by a thread that is stopped, but does not run

Injected = namedtuple("Injected", "fd stop_ns tid")

_STEPS = ("seize", "stop", "compat", "call", "page", "pass", "ioctl", "getfd", "close", "done")
"""Names of step_t."""


cdef struct job_t:
    remote_t remote
    int pidfd
    int options
    uint64_t limit_ns
    bint repair
    int device                      # our descriptor of /dev/userfaultfd to hand over; -1: call userfaultfd(2)
    # Results.
    int fd                          # ours, or -1
    uint64_t stop_ns
    step_t step
    int err


cdef int _result(int64_t result) noexcept nogil:
    return <int>-result if -4096 < result < 0 else 0


cdef int _call(job_t *job, long call, const uint64_t *args, int64_t *result) noexcept nogil:
    cdef int err = remote_call(&job.remote, call, args, CALL_LIMIT_NS, result)
    return err or _result(result[0])


cdef int _undo(job_t *job, long call, uint64_t a, uint64_t b) noexcept nogil:
    """A call that undoes another one. It has no time limit: what stays open in the target may block it for
    ever. If its cgroup is frozen in these microseconds, this waits until the cgroup is thawed; an earlier
    return would leave our registers in the thread."""
    cdef uint64_t *args = [a, b, 0, 0, 0, 0]
    cdef int64_t result = 0
    return remote_call(&job.remote, call, args, 0, &result)


cdef int _close_in_target(job_t *job, int64_t fd) noexcept nogil:
    return _undo(job, SYS_close, <uint64_t>fd, 0)


cdef int _send_to(job_t *job, int there) noexcept nogil:
    """Send the device to the target's socket `there`, through a copy of that descriptor."""
    cdef int ours = <int>c_syscall(SYS_pidfd_getfd, job.pidfd, there, 0)
    cdef int err
    if ours < 0:
        return errno
    err = snap_passing_send(ours, job.device)
    close(ours)
    return err


cdef int _receive(job_t *job, uint64_t page, int socket, int64_t *device) noexcept nogil:
    cdef uint64_t *args = [<uint64_t>socket, page + PASSING_MESSAGE,
                           <uint64_t>(MSG_CMSG_CLOEXEC | MSG_DONTWAIT), 0, 0, 0]
    cdef snap_passing passing
    cdef int64_t result = 0
    cdef int err = _call(job, SYS_recvmsg, args, &result)
    if err == 0:
        err = remote_get(&job.remote, page, <uint64_t *>&passing, sizeof(passing) // 8)
    if err == 0:
        device[0] = snap_passing_received(&passing)
    return EMFILE if err == 0 and device[0] < 0 else err


cdef int _pass_over(job_t *job, uint64_t page, int64_t *device) noexcept nogil:
    """Pass the device through a socket pair in the target. The sending end is closed before the device is
    received, so the target needs two free descriptors at most."""
    cdef uint64_t *args = [<uint64_t>AF_UNIX, <uint64_t>(SOCK_DGRAM | SOCK_CLOEXEC), 0, page, 0, 0]
    cdef snap_passing passing
    cdef int64_t result = 0
    cdef int err, sent
    snap_passing_init(&passing, page)
    err = remote_put(&job.remote, page, <const uint64_t *>&passing, sizeof(passing) // 8)
    if err == 0:
        err = _call(job, SYS_socketpair, args, &result)
    if err == 0:
        err = remote_get(&job.remote, page, <uint64_t *>&passing, sizeof(passing) // 8)
    if err:
        return err
    sent = _send_to(job, passing.pair[1])
    err = _close_in_target(job, passing.pair[1])
    if err == 0 and sent == 0:
        err = _receive(job, page, passing.pair[0], device)
    return _close_in_target(job, passing.pair[0]) or sent or err


cdef int _pass_device(job_t *job, int64_t *device) noexcept nogil:
    """Install the device in the target's descriptor table. MAP_NORESERVE keeps the page from being merged
    with an adjacent mapping, so that unmapping it splits nothing."""
    cdef uint64_t *args = [0, PASSING_BYTES, <uint64_t>(PROT_READ | PROT_WRITE),
                           <uint64_t>(MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE), <uint64_t>-1, 0]
    cdef int64_t page = 0
    cdef int err, undone
    job.step = STEP_PAGE
    err = _call(job, SYS_mmap, args, &page)
    if err:
        return err
    job.step = STEP_PASS
    err = _pass_over(job, <uint64_t>page, device)
    undone = _undo(job, SYS_munmap, <uint64_t>page, PASSING_BYTES)
    return err or undone


cdef int _open_by_device(job_t *job, int64_t *fd) noexcept nogil:
    cdef uint64_t *args = [0, USERFAULTFD_IOC_NEW, <uint64_t>(O_CLOEXEC | O_NONBLOCK), 0, 0, 0]
    cdef int64_t device = -1
    cdef int err = _pass_device(job, &device)
    if err == 0:
        job.step = STEP_IOCTL
        args[0] = <uint64_t>device
        err = _call(job, SYS_ioctl, args, fd)
    if device >= 0:
        err = _close_in_target(job, device) or err
    return err


cdef int _open_in_target(job_t *job, int64_t *fd) noexcept nogil:
    cdef uint64_t *args = [<uint64_t>(O_CLOEXEC | O_NONBLOCK), 0, 0, 0, 0, 0]
    if job.device >= 0:
        return _open_by_device(job, fd)
    job.step = STEP_CALL
    return _call(job, SYS_userfaultfd, args, fd)


cdef int _fetch(job_t *job) noexcept nogil:
    cdef int64_t there = -1
    cdef int err = _open_in_target(job, &there)
    if err:
        if there >= 0:
            _close_in_target(job, there)
        return err
    job.step = STEP_GETFD
    job.fd = <int>c_syscall(SYS_pidfd_getfd, job.pidfd, <int>there, 0)
    if job.fd < 0:
        err = errno
    else:
        job.step = STEP_CLOSE
    return _close_in_target(job, there) or err


cdef int _inject(job_t *job) noexcept nogil:
    cdef int err = remote_stop(&job.remote, job.pidfd, job.options, job.limit_ns, job.repair, &job.step)
    if err:
        return err
    err = _fetch(job)
    cdef int released = remote_release(&job.remote)
    job.stop_ns = snap_now_ns() - job.remote.stopped_ns
    if err == 0:
        err = released
    if err == 0:
        job.step = STEP_DONE
    elif job.fd >= 0:
        close(job.fd)
        job.fd = -1
    return err


cdef int _helper(void *arg) noexcept nogil:
    cdef job_t *job = <job_t *>arg
    snap_leave_session()
    snap_boost_self()
    job.err = _inject(job)
    return 0


def _attempt(info, int tid, int pidfd, uint64_t insn, double seconds, int device, bint repair):
    """One stop of one thread: (step, errno, fd, stop_ns). `device`: the descriptor to hand over, or -1 to
    call userfaultfd(2)."""
    cdef job_t job
    cdef int err
    memset(&job, 0, sizeof(job))
    job.remote.pid = info.pid
    job.remote.tid = tid
    job.remote.insn = insn
    job.pidfd = pidfd
    job.options = PTRACE_O_TRACESYSGOOD | (PTRACE_O_SUSPEND_SECCOMP if info.seccomp else 0)
    job.limit_ns = <uint64_t>(max(seconds, 0.0) * 1e9)
    job.repair = repair
    job.fd = -1
    job.device = device
    with nogil:
        err = snap_run_in_helper(_helper, &job)
    if err:
        raise OSError(err, f"clone: {os.strerror(err)}")
    return _STEPS[job.step], job.err, job.fd, job.stop_ns


def _stop_and_open(info, ways, double deadline, bint repair):
    """Try threads until one stops, and ways until one works; (fd, total ns stopped, tid)."""
    cdef double left = deadline             # only waiting counts: on a busy machine this thread runs late
    stopped_ns = 0
    ways = list(ways)
    way = ways.pop(0)
    tried = set()
    while True:
        tids = [tid for tid in permissions.threads_to_stop(info.pid) if tid not in tried]
        if not tids or len(tried) == MAX_THREADS_TRIED:
            raise inject_policy.nobody_stopped(info, tried, deadline)
        tid = tids[0]
        try:
            insn = inject_policy.syscall_instruction(tid)
            pidfd = inject_policy.open_pidfd(info.pid, tid)
        except (FileNotFoundError, ProcessLookupError):
            tried.add(tid)                  # a thread, even the leader, may end before its process
            continue
        try:
            # A thread in uninterruptible sleep must leave time for others. One that only waits for a CPU
            # may itself need much of it.
            seconds = left if len(tids) == 1 else left / 2
            step, err, fd, stop_ns = _attempt(info, tid, pidfd, insn, seconds, way.device, repair)
        finally:
            os.close(pidfd)
        stopped_ns += stop_ns
        if step == "done":
            return fd, stopped_ns, tid
        if inject_policy.is_for_another_thread(info.pid, tid, step, err):
            tried.add(tid)
            if err == ETIMEDOUT:
                left -= seconds
        elif inject_policy.is_for_another_way(step, err) and ways:
            way = ways.pop(0)
        else:
            raise inject_policy.explain(info, tid, step, err, way)


def inject_userfaultfd(pid, *, device=None, double deadline=1.0, info=None, bint _repair=True):
    """Open a userfaultfd in process `pid` by one of its threads, and copy it to this process.

    The thread is stopped once, for 0.3 to 0.6 ms; the others run. Its registers, signal mask, pending signals
    and interrupted system call are preserved. (A write(2) that a pipe had partly accepted returns a short
    count, as after any stop.) A process that was stopped by SIGSTOP stays stopped.

    Parameters
    ----------
    pid:
        A 64-bit process whose memory this user may trace (ptrace(2)).
    device:
        Path of a userfaultfd device node that this user can open; it is handed to the target. None: call
        userfaultfd(2), or use /dev/userfaultfd where the target's user may not call that.
    deadline:
        Seconds for a thread to stop. One in uninterruptible sleep, such as the parent of a vfork, does not.
    info:
        The current result of `snapengine.process.permissions.check`; None: it is called here.

    Returns
    -------
    Injected: `fd`, owned by the caller, close-on-exec and non-blocking, before UFFDIO_API; `stop_ns`,
    nanoseconds from PTRACE_INTERRUPT to PTRACE_DETACH of all attempts, including the time in which a thread
    waited for a CPU before it stopped; `tid`, the thread that was stopped.

    Raises
    ------
    AttachError
        The process cannot be attached to; the text says why.
    UffdPermissionError
        The target may not open a userfaultfd in any way; the text says how to allow it.
    TargetGoneError
        The process ended.
    """
    info = permissions.check(pid) if info is None else info
    try:
        with inject_policy.ways(info, device) as ways:
            return Injected(*_stop_and_open(info, ways, deadline, _repair))
    except (FileNotFoundError, ProcessLookupError) as error:
        if isinstance(error, TargetGoneError):
            raise
        text = f"process {pid} ({info.name}) ended while it was being attached to"
        raise TargetGoneError(errno_codes.ESRCH, text) from error

"""A userfaultfd of a process that does not cooperate: one of its threads is stopped and made to open it.

The stop runs in a helper process that shares our memory and descriptors (`snap_run_apart`), so a SIGKILL
of this process leaves it running: it still closes the descriptor in the target, gives the thread its
registers back and lets it go. What is left open is a SIGKILL of the helper itself (by its own pid, by a
kill of the whole cgroup, by the OOM killer, which takes all who share the memory, or by the end of the pid
namespace) between the first register changed and the last one restored: 0.4 ms (median of 90). The
target then goes on with the registers of the injected call, which it hardly survives.

The descriptor is opened in the target, copied here by pidfd_getfd(2) and closed there, in one stop. One
that stayed there would keep the memory protected after our end, and block the target for ever.

The helper allocates nothing, runs no Python and takes no lock: all of its data is in a job_t and on its
own stack.
"""

from libc.errno cimport ETIMEDOUT, errno
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memset, strncpy
from posix.stat cimport mkdir, mknod
from posix.types cimport dev_t, gid_t, mode_t, uid_t
from posix.unistd cimport chown, close, rmdir, unlink

from snapengine.ptrace cimport (
    PTRACE_O_SUSPEND_SECCOMP, PTRACE_O_TRACESYSGOOD, snap_hurry, snap_run_apart, snap_stand_apart,
)
from snapengine.pthreads cimport snap_now_ns
from snapengine.remotecall cimport (
    STEP_CALL, STEP_CLOSE, STEP_DONE, STEP_GETFD, STEP_IOCTL, STEP_NODE, STEP_OPEN, STEP_STACK,
    remote_call, remote_release, remote_stop, remote_swap, remote_t, step_t,
)

import errno as errno_codes
import os
from collections import namedtuple

from snapengine import attach, injectplan
from snapengine.errors import TargetGoneError

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_userfaultfd, SYS_openat, SYS_ioctl, SYS_close, SYS_pidfd_getfd

cdef extern from "<unistd.h>" nogil:
    long c_syscall "syscall"(long number, ...)

cdef extern from "<fcntl.h>" nogil:
    int AT_FDCWD, O_CLOEXEC, O_NONBLOCK, O_RDWR

cdef extern from "<sys/stat.h>" nogil:
    int S_IFCHR
    mode_t umask(mode_t mask)

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *addr, size_t length, int prot, int flags, int fd, long offset)
    int munmap(void *addr, size_t length)
    int mprotect(void *addr, size_t length, int prot)
    int PROT_NONE, PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MAP_STACK
    void *MAP_FAILED

cdef extern from "snapengine/linux_compat.h" nogil:
    unsigned long USERFAULTFD_IOC_NEW

cdef enum:
    PATH_BYTES = 128
    RED_ZONE_BYTES = 128            # below rsp, used by leaf functions (System V ABI, AMD64)
    STACK_BYTES = 65536
    GUARD_BYTES = 4096
    MAX_THREADS_TRIED = 8

cdef uint64_t CALL_LIMIT_NS = 2000000000   # until a thread that stands, but does not run, is given up

Injected = namedtuple("Injected", "fd stop_ns tid")

STEPS = ("seize", "stop", "compat", "node", "stack", "call", "open", "ioctl", "getfd", "close", "done")
"""Names of step_t."""


cdef struct job_t:
    remote_t remote
    int pidfd
    int options
    uint64_t limit_ns
    bint repair
    char device[PATH_BYTES]         # as the target sees it; "": call userfaultfd(2)
    char node[PATH_BYTES]           # as we see it; "": the device is there already
    char folder[PATH_BYTES]         # of the node
    dev_t number
    uid_t owner
    # Results.
    int fd                          # ours, or -1
    uint64_t stop_ns
    step_t step
    int err


cdef int _make_node(job_t *job) noexcept nogil:
    """In a folder that nobody can list, for the target's user only: no other gets a userfaultfd by it."""
    umask(0)
    if mkdir(job.folder, 0o711) != 0:
        return errno
    if mknod(job.node, S_IFCHR | 0o600, job.number) != 0 or chown(job.node, job.owner, <gid_t>-1) != 0:
        return errno
    return 0


cdef void _drop_node(job_t *job) noexcept nogil:
    unlink(job.node)
    rmdir(job.folder)


cdef int _result(int64_t result) noexcept nogil:
    return <int>-result if -4096 < result < 0 else 0


cdef int _close_there(job_t *job, int64_t fd) noexcept nogil:
    """Without a limit: what stays open there may block the target for ever."""
    cdef int64_t result = 0
    return remote_call(&job.remote, SYS_close, <uint64_t>fd, 0, 0, 0, 0, &result)


cdef int _open_device(job_t *job, int64_t *device) noexcept nogil:
    """open(2) with the path below the red zone of the thread's stack, which is as it was afterwards."""
    cdef uint64_t addr = (job.remote.saved.rsp - RED_ZONE_BYTES - PATH_BYTES) & ~<uint64_t>15
    cdef char text[PATH_BYTES]
    cdef int err
    strncpy(text, job.device, sizeof(text))
    job.step = STEP_STACK
    err = remote_swap(&job.remote, addr, text, sizeof(text))
    if err:
        return err
    job.step = STEP_OPEN
    err = remote_call(&job.remote, SYS_openat, <uint64_t><int64_t>AT_FDCWD, addr,
                      <uint64_t>(O_RDWR | O_CLOEXEC), 0, CALL_LIMIT_NS, device)
    remote_swap(&job.remote, addr, text, sizeof(text))
    return err or _result(device[0])


cdef int _open_there(job_t *job, int64_t *fd) noexcept nogil:
    cdef uint64_t flags = <uint64_t>(O_CLOEXEC | O_NONBLOCK)
    cdef int64_t device = -1
    cdef int err
    if job.device[0] == 0:
        job.step = STEP_CALL
        err = remote_call(&job.remote, SYS_userfaultfd, flags, 0, 0, 0, CALL_LIMIT_NS, fd)
        return err or _result(fd[0])
    err = _open_device(job, &device)
    if err:
        return err
    job.step = STEP_IOCTL
    err = remote_call(&job.remote, SYS_ioctl, <uint64_t>device, USERFAULTFD_IOC_NEW, flags, 0,
                      CALL_LIMIT_NS, fd)
    err = err or _result(fd[0])
    return _close_there(job, device) or err


cdef int _fetch(job_t *job) noexcept nogil:
    cdef int64_t there = -1
    cdef int err = _open_there(job, &there)
    if err:
        if there >= 0:
            _close_there(job, there)
        return err
    job.step = STEP_GETFD
    job.fd = <int>c_syscall(SYS_pidfd_getfd, job.pidfd, <int>there, 0)
    if job.fd < 0:
        err = errno
    else:
        job.step = STEP_CLOSE
    return _close_there(job, there) or err


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
    snap_stand_apart()
    job.step = STEP_NODE
    job.err = _make_node(job) if job.node[0] else 0
    if job.err == 0:
        snap_hurry()
        job.err = _inject(job)
    if job.node[0]:
        _drop_node(job)
    return 0


cdef int _run_apart(job_t *job) noexcept nogil:
    cdef size_t room = GUARD_BYTES + STACK_BYTES
    cdef int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK
    cdef void *stack = mmap(NULL, room, PROT_READ | PROT_WRITE, flags, -1, 0)
    cdef int err
    if stack == MAP_FAILED:
        return errno
    mprotect(stack, GUARD_BYTES, PROT_NONE)
    err = snap_run_apart(_helper, job, stack, room)
    munmap(stack, room)
    return err


cdef int _copy_path(char *into, str path) except -1:
    encoded = os.fsencode(path)
    if len(encoded) >= PATH_BYTES:
        raise ValueError(f"a path of more than {PATH_BYTES - 1} bytes: {path}")
    strncpy(into, encoded, PATH_BYTES)
    return 0


def _attempt(info, int tid, int pidfd, uint64_t insn, double seconds, place, bint repair):
    """One stop of one thread: (step, errno, fd, stop_ns). `place`: an injectplan.Place, or None for
    userfaultfd(2)."""
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
    if place is not None:
        _copy_path(job.device, place.device)
        _copy_path(job.node, place.node)
        _copy_path(job.folder, place.folder)
        job.number = place.number
        job.owner = info.fsuid
    with nogil:
        err = _run_apart(&job)
    if err:
        raise OSError(err, f"clone: {os.strerror(err)}")
    return STEPS[job.step], job.err, job.fd, job.stop_ns


def _stop_and_open(info, places, double deadline, bint repair):
    """Try threads until one stops, and ways until one opens; (fd, ns stopped in all, tid)."""
    cdef double left = deadline             # spent by waiting only: on a busy machine we get our turns late
    stopped_ns = 0
    place = places.pop(0)
    tried = set()
    while True:
        tids = [tid for tid in attach.threads_to_stop(info.pid) if tid not in tried]
        if not tids or len(tried) == MAX_THREADS_TRIED:
            raise injectplan.nobody_stopped(info, tried, deadline)
        tid = tids[0]
        try:
            insn = injectplan.syscall_instruction(tid)
            pidfd = injectplan.open_pidfd(info.pid, tid)
        except (FileNotFoundError, ProcessLookupError):
            tried.add(tid)                  # a thread ends, the leader too, and its process lives on
            continue
        try:
            # A thread that sleeps uninterruptibly must leave time for others; one that is only waiting
            # for a CPU, among many, needs much itself.
            seconds = left if len(tids) == 1 else left / 2
            step, err, fd, stop_ns = _attempt(info, tid, pidfd, insn, seconds, place, repair)
        finally:
            os.close(pidfd)
        stopped_ns += stop_ns
        if step == "done":
            return fd, stopped_ns, tid
        if injectplan.is_for_another_thread(info.pid, tid, step, err):
            tried.add(tid)
            if err == ETIMEDOUT:
                left -= seconds
        elif injectplan.is_for_another_place(step, err) and places:
            place = places.pop(0)
        else:
            raise injectplan.explain(info, tid, step, err, place)


def inject_userfaultfd(pid, *, device=None, double deadline=1.0, info=None, bint _repair=True):
    """Open a userfaultfd in process `pid` by one of its threads, and bring it here.

    The thread stands for 0.3 to 0.6 ms, once; the others run. It notices nothing: registers, signal
    mask, signals that come meanwhile, and the call it was in are kept (a write(2) that a pipe had taken in
    part returns a short count, as after any stop). A stopped (SIGSTOP) process stays stopped.

    Parameters
    ----------
    pid:
        A 64-bit process whose memory this user may trace (ptrace(2)).
    device:
        Path of a userfaultfd device node that the target can open; None: userfaultfd(2), and where the
        target's user may not call that, a private node that is made and removed (wants root).
    deadline:
        Seconds for a thread to stop. One in uninterruptible sleep, such as the parent of a vfork, does not.
    info:
        What `snapengine.attach.check` has said of it just now; None: it is asked here.

    Returns
    -------
    Injected: `fd`, ours, close-on-exec and non-blocking, before UFFDIO_API; `stop_ns`, nanoseconds from
    PTRACE_INTERRUPT to PTRACE_DETACH, of all attempts (so it includes what a thread that shares its CPU
    waited for its turn, after which it stopped); `tid`, the thread that was stopped.

    Raises
    ------
    AttachError
        It cannot be attached to; the text says why.
    UffdPermissionError
        The target may not open a userfaultfd in any way; the text names those that would be allowed.
    TargetGoneError
        It ended.
    """
    info = attach.check(pid) if info is None else info
    try:
        return Injected(*_stop_and_open(info, injectplan.places(info, device), deadline, _repair))
    except (FileNotFoundError, ProcessLookupError) as error:
        if isinstance(error, TargetGoneError):
            raise
        text = f"process {pid} ({info.name}) ended while it was being attached to"
        raise TargetGoneError(errno_codes.ESRCH, text) from error

"""All threads of another process stopped at one moment, and their registers.

A thread of the freezer's own does all ptrace calls, because ptrace(2) binds a tracee to the OS thread that
seized it: callers may be any. It holds no lock while it works, and its end lets go of everything, which is
also the only way to let go of a thread that did not stop. If the whole process ends, by SIGKILL too, the
kernel does the same: the target runs on.

Processes that share its memory stand, too (`pyx/process/shared_mm`); their registers are not taken. Nor are
those of a thread that waits for the child of its vfork: it stands in the kernel.

What it cannot stop: a thread in another uninterruptible sleep (a fault inside a system call on memory under
somebody's userfaultfd, until that is answered): the deadline ends the attempt. Workers of io_uring are the
kernel's own and cannot be traced, nor can requests of kernel AIO be held; they may go on writing to
buffers that the target gave to the kernel: `snapengine.process.permissions.kernel_writers` names them.

While it stops threads this process gets SIGCHLD, as tracers do. A wait(-1) of another thread of this
process may take a report away; the stop is then found by asking.
"""

from libc.errno cimport ENOMEM, ESRCH, ETIMEDOUT
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free
from cpython.bytes cimport PyBytes_FromStringAndSize
from posix.unistd cimport getpid

from snapengine.base.pthreads cimport (
    pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_init, pthread_cond_wait, pthread_join,
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock, pthread_t,
    snap_thread_start,
)
from snapengine.process.stop_threads cimport (
    FPREGS_BYTES, FROZEN, REGS_BYTES, STOPPING, THAWED, freezer_t, hold_still, thread_t,
)

import os

from snapengine.process import permissions
from snapengine.process import inject_policy
from snapengine.base import names
from snapengine.errors import TargetGoneError
from snapengine.process.thread_state import ThreadState


cdef class Freezer:
    """Stops a process: ``with Freezer(pid) as freezer: ...``, or `stop` and `resume`.

    Any thread may call any method, one at a time. A process that was stopped (SIGSTOP) stays so after
    `resume`. An object that is dropped resumes.

    Parameters
    ----------
    pid:
        A 64-bit process that this user may trace (ptrace(2)).
    deadline:
        Seconds for all of its threads to stand still, after which it runs on and `stop` raises.
    """

    cdef freezer_t *state
    cdef pthread_t thread
    cdef bint running                   # `thread` is to be joined
    cdef int owner                      # the pid that made it: a fork has no such thread
    cdef readonly int pid
    cdef readonly double deadline

    def __cinit__(self, int pid, *, double deadline=1.0):
        self.state = <freezer_t *>calloc(1, sizeof(freezer_t))
        if self.state == NULL:
            raise MemoryError
        pthread_mutex_init(&self.state.lock, NULL)
        pthread_cond_init(&self.state.changed, NULL)
        self.owner = getpid()
        self.pid = pid
        self.deadline = deadline
        self.state.phase = THAWED

    @property
    def frozen(self):
        """Whether the process stands still."""
        return self.running and self.state.phase == FROZEN

    @property
    def kin_known(self):
        """Whether it could be told, of the last stop, which processes share the memory: if not, one of them
        may run on."""
        return not self.state.kin.unknown

    @property
    def stop_ns(self):
        """Nanoseconds from the first PTRACE_INTERRUPT until the last thread was let go, of the last stop.
        A thread that waited for its turn on a CPU stood later than the interrupt."""
        return 0 if self.running else self.state.frozen_ns

    def stop(self, *, bint registers=True):
        """Stop all threads. `registers`: take them, for `threads`; 10 µs a thread while it stands.

        Raises AttachError (the text says why; after that nothing is stopped any more) or TargetGoneError.
        """
        cdef int err
        if self.running:
            raise RuntimeError(f"process {self.pid} is stopped already")
        info = permissions.check(self.pid)
        self.state.pid = self.pid
        self.state.limit_ns = <uint64_t>(max(self.deadline, 0.0) * 1e9)
        self.state.registers = registers
        self.state.n = self.state.err = self.state.at_tid = self.state.at_process = 0
        self.state.thaw = False
        self.state.phase = STOPPING
        err = snap_thread_start(&self.thread, hold_still, self.state)
        if err:
            raise OSError(err, f"pthread_create: {os.strerror(err)}")
        self.running = True
        with nogil:
            pthread_mutex_lock(&self.state.lock)
            while self.state.phase == STOPPING:
                pthread_cond_wait(&self.state.changed, &self.state.lock)
            pthread_mutex_unlock(&self.state.lock)
        if self.state.phase == THAWED:
            self.resume()
            raise self._failure(info)

    def _failure(self, info):
        err, tid = self.state.err, self.state.at_tid
        if err == ENOMEM:
            return MemoryError()
        if self.state.at_process not in (0, info.pid):
            return inject_policy.kin_not_stopped(info, self.state.at_process, tid, err)
        if err == ETIMEDOUT:
            return inject_policy.nobody_stopped(info, {tid}, self.deadline)
        if err == ESRCH:
            return TargetGoneError(err, f"process {info.pid} ({info.name}) has ended")
        return inject_policy.explain(info, tid, "seize", err, None)

    def resume(self):
        """Let the process run on. Idempotent."""
        if not self.running or self.owner != getpid():
            return
        with nogil:
            pthread_mutex_lock(&self.state.lock)
            self.state.thaw = True
            pthread_cond_broadcast(&self.state.changed)
            pthread_mutex_unlock(&self.state.lock)
            pthread_join(self.thread, NULL)
        self.running = False

    def threads(self):
        """The `ThreadState` of every thread at the last stop, by tid; may be called after `resume`.

        ``regs`` shows where the thread goes on. ``orig_rax`` is -1 where it computes. Otherwise it was in
        that system call, and ``rax`` is its result, or says how the kernel is to go on with it: -512, -513
        and -514 (ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND) make the call again, -516
        (ERESTART_RESTARTBLOCK) goes on with the time left. Calls that a stop ends with EINTR are
        already set back to their syscall instruction.
        """
        cdef int i
        found = []
        for i in range(self.state.n):
            if self.state.threads[i].standing and not self.state.threads[i].blind \
                    and self.state.threads[i].process == self.pid:
                found.append(self._thread(i))
        return sorted(found, key=lambda thread: thread.tid)

    def warnings(self):
        """What of the last stop is not as it seems, in words; may be called after `resume`."""
        cdef int i
        found = []
        if self.state.kin.unknown:
            found.append(
                "whether other processes share its memory cannot be told (kcmp(2) is not allowed or not "
                "built in): one that does was not stopped"
            )
        blind = [self.state.threads[i].tid for i in range(self.state.n)
                 if self.state.threads[i].blind and self.state.threads[i].process == self.pid]
        if blind:
            tids = ", ".join(map(str, blind))
            found.append(f"thread {tids} waits for the child of its vfork: its registers are not taken")
        return found

    @property
    def kin(self):
        """The processes that share the memory, and were stopped with it, of the last stop."""
        cdef int i
        return [self.state.kin.processes[i] for i in range(self.state.kin.n)]

    cdef _thread(self, int i):
        cdef thread_t *thread = &self.state.threads[i]
        cdef char *slot = self.state.area + <size_t>i * self.state.stride
        cdef bint taken = self.state.registers
        return ThreadState(
            tid=thread.tid,
            comm=names.decode(thread.comm),
            regs=PyBytes_FromStringAndSize(slot, REGS_BYTES) if taken else b"",
            fpregs=PyBytes_FromStringAndSize(slot + REGS_BYTES, FPREGS_BYTES) if taken else b"",
            xstate=PyBytes_FromStringAndSize(slot + REGS_BYTES + FPREGS_BYTES, <ssize_t>thread.xstate_bytes)
            if taken else b"",
            sigmask=thread.sigmask,
        )

    def __enter__(self):
        self.stop()
        return self

    def __exit__(self, *exc_info):
        self.resume()

    def __dealloc__(self):
        if self.state == NULL:
            return
        if self.owner != getpid():
            return                      # a fork: the memory is shared with nobody, the thread is not here
        self.resume()
        pthread_cond_destroy(&self.state.changed)
        pthread_mutex_destroy(&self.state.lock)
        free(self.state.threads)
        free(self.state.area)
        free(self.state.kin.processes)
        free(self.state)

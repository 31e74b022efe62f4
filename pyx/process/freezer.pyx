"""All threads of another process stopped at one moment, and their registers.

ptrace(2) binds a tracee to the OS thread that seized it. The freezer therefore has a helper process for all
ptrace calls (`pyx/process/stop_threads`) and a thread that waits for it; its methods may be called from any
thread. When the helper ends, the kernel detaches all its tracees: that is the only way to detach from a
thread that did not stop. The same happens if this process ends, even by SIGKILL: the target resumes.

Processes that share the target's memory are stopped too (`pyx/process/shared_mm`); their registers are not
read. Nor are those of a thread that waits in the kernel for the child of its vfork.

What it cannot stop:
- a thread in another uninterruptible sleep, such as a fault inside a system call on memory under another
  userfaultfd, until that is resolved. The deadline ends the attempt.
- workers of io_uring, which are kernel threads and cannot be traced, and requests of kernel AIO. They may
  keep writing to buffers that the target gave to the kernel;
  `snapengine.process.permissions.kernel_writers` names them.
"""

from libc.errno cimport ENOMEM, ESRCH, ETIMEDOUT
from libc.stdint cimport uint64_t
from libc.stdlib cimport calloc, free
from cpython.bytes cimport PyBytes_FromStringAndSize
from posix.unistd cimport getpid

from snapengine.base.atomics cimport snap_store_wake, snap_futex_wait, snap_load_word
from snapengine.base.pthreads cimport pthread_join, pthread_t, snap_thread_start
from snapengine.kernel.linux cimport ECANCELED
from snapengine.process.stop_threads cimport (
    FPREGS_BYTES, STOPPED, REGS_BYTES, STOPPING, RESUMED, freezer_t, stop_and_hold, thread_t,
)

import os

from snapengine.process import permissions
from snapengine.process import inject_policy
from snapengine.base import names
from snapengine.errors import AttachError, TargetGoneError
from snapengine.process.thread_state import ThreadState


cdef class Freezer:
    """Stops a process: ``with Freezer(pid) as freezer: ...``, or `stop` and `resume`.

    Any thread may call any method, one at a time. A process that was stopped by SIGSTOP stays stopped after
    `resume`. Dropping the object resumes the process.

    Parameters
    ----------
    pid:
        A 64-bit process that this user may trace (ptrace(2)).
    deadline:
        Seconds for all of its threads to stop. After that the process is resumed, and `stop` raises.
    """

    cdef freezer_t *state
    cdef pthread_t thread
    cdef bint running                   # `thread` is to be joined
    cdef int owner                      # the pid that made it: a forked child has no such thread
    cdef readonly int pid
    cdef readonly double deadline

    def __cinit__(self, int pid, *, double deadline=1.0):
        self.state = <freezer_t *>calloc(1, sizeof(freezer_t))
        if self.state == NULL:
            raise MemoryError
        self.owner = self.state.owner = getpid()
        self.pid = pid
        self.deadline = deadline
        self.state.phase = RESUMED

    @property
    def stopped(self):
        """Whether the process is stopped by this object."""
        return self.running and snap_load_word(&self.state.phase) == STOPPED

    @property
    def sharers_known(self):
        """Whether it was known, at the last stop, which processes share the memory. If not, one of them may
        have kept running."""
        return not self.state.sharers.unknown

    @property
    def stop_ns(self):
        """Nanoseconds from the first PTRACE_INTERRUPT until the last thread was resumed, of the last stop.
        A thread that waited for a CPU stopped later than the interrupt."""
        return 0 if self.running else self.state.stopped_ns

    def stop(self, *, bint registers=True):
        """Stop all threads. `registers`: read them for `threads`, which adds 10 µs a thread to the stop.

        Raises TargetGoneError or AttachError, whose text says why. After an error nothing is stopped.
        """
        cdef int err
        if self.running:
            raise RuntimeError(f"process {self.pid} is stopped already")
        info = permissions.check(self.pid)
        self.state.pid = self.pid
        self.state.limit_ns = <uint64_t>(max(self.deadline, 0.0) * 1e9)
        self.state.registers = registers
        self.state.n = self.state.err = self.state.at_tid = self.state.at_process = 0
        self.state.resume = False
        self.state.phase = STOPPING
        err = snap_thread_start(&self.thread, stop_and_hold, self.state)
        if err:
            raise OSError(err, f"pthread_create: {os.strerror(err)}")
        self.running = True
        with nogil:
            snap_futex_wait(&self.state.phase, STOPPING)
        if snap_load_word(&self.state.phase) == RESUMED:
            self._join()
            raise self._failure(info)

    def _failure(self, info):
        err, tid = self.state.err, self.state.at_tid
        if err == ENOMEM:
            return MemoryError()
        if tid == 0 and err not in (ECANCELED, ESRCH, ETIMEDOUT):
            return OSError(err, f"no helper process or no list of processes: {os.strerror(err)}")
        if self.state.at_process not in (0, info.pid):
            return inject_policy.sharer_not_stopped(info, self.state.at_process, tid, err)
        if err == ETIMEDOUT:
            return inject_policy.nobody_stopped(info, {tid}, self.deadline)
        if err == ECANCELED:
            return self._killed()
        if err == ESRCH:
            return TargetGoneError(err, f"process {info.pid} ({info.name}) has ended")
        return inject_policy.explain(info, tid, "seize", err, None)

    def _killed(self):
        text = f"the helper process that stopped process {self.pid} was killed, so the process ran on"
        return AttachError(ECANCELED, text)

    def resume(self):
        """Resume the process. Idempotent.

        Raises AttachError if it ran before this call, because somebody killed the helper process: what was
        read of it meanwhile is not of one instant.
        """
        if self._join() and self.state.err == ECANCELED:
            raise self._killed()

    cdef bint _join(self) noexcept:
        """Resume the process, and wait for the thread's end. False: there was none."""
        if not self.running or self.owner != getpid():
            return False
        with nogil:
            snap_store_wake(&self.state.resume, True)
            pthread_join(self.thread, NULL)
        self.running = False
        return True

    def threads(self):
        """The `ThreadState` of every thread at the last stop, by tid; may be called after `resume`.

        ``regs`` shows where the thread continues. ``orig_rax`` is -1 for a thread in user code. Otherwise it
        is the number of the system call that the thread was in, and ``rax`` is the result, or tells the
        kernel how to restart the call: -512, -513 and -514 (ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND)
        repeat it, -516 (ERESTART_RESTARTBLOCK) continues with the time left. Calls that a stop ends with
        EINTR are already set back to their syscall instruction.
        """
        cdef int i
        found = []
        for i in range(self.state.n):
            if self.state.threads[i].stopped and not self.state.threads[i].in_vfork \
                    and self.state.threads[i].process == self.pid:
                found.append(self._thread(i))
        return sorted(found, key=lambda thread: thread.tid)

    def warnings(self):
        """Limits of the last stop, as sentences for a user; may be called after `resume`."""
        cdef int i
        found = []
        if self.state.sharers.unknown:
            found.append(
                "it is unknown whether other processes share its memory (kcmp(2) is not allowed or not "
                "built in): such a process was not stopped"
            )
        waiting = [self.state.threads[i].tid for i in range(self.state.n)
                   if self.state.threads[i].in_vfork and self.state.threads[i].process == self.pid]
        if waiting:
            tids = ", ".join(map(str, waiting))
            found.append(
                f"thread {tids} waits for the child of its vfork: its registers are not in the image"
            )
        return found

    @property
    def sharers(self):
        """The processes that share the memory and were stopped too, at the last stop."""
        cdef int i
        return [self.state.sharers.processes[i] for i in range(self.state.sharers.n)]

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
            return                      # a forked child: the thread does not exist here
        self._join()
        free(self.state.threads)
        free(self.state.area)
        free(self.state.sharers.processes)
        free(self.state)

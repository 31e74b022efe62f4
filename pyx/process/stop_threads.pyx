"""The helper process that stops all threads of a process: seize, interrupt, wait, read registers, detach.

ptrace(2) binds a tracee to the OS thread that seized it, so the helper makes all ptrace calls. If a thread of
this process made them, a wait for a child anywhere in this process would return the stops of that child
(`snap_run_in_helper`). When the helper ends, the kernel detaches all tracees. `pyx/process/freezer` starts it
and waits for it.

The helper is killed when this process ends, so the target resumes. If somebody kills the helper alone, the
stop ends early, and `freezer_t.err` says so. One gap remains: if it is killed within malloc, before the first
stop, the lock of an arena stays held.

Other processes may share the memory and write to it: `pyx/process/shared_mm` finds them, and they are stopped
too. The parent of a vfork sleeps in the kernel, where it cannot stop, until its child calls execve() or ends.
It gets PTRACE_INTERRUPT all the same, so it cannot return to its own code, and counts as stopped.
"""

from libc.errno cimport EAGAIN, EBUSY, ENOMEM, EPERM, ESRCH, ETIMEDOUT
from libc.stdint cimport uint64_t, uintptr_t
from libc.stdio cimport snprintf
from libc.stdlib cimport atoi, realloc
from libc.string cimport memset

from snapengine.base.atomics cimport snap_futex_timed_wait, snap_load_word, snap_store_wake
from snapengine.base.dirent cimport DIR, closedir, dirent, opendir, readdir
from snapengine.process.shared_mm cimport list_sharers, list_new_sharers
from snapengine.kernel.linux cimport ECANCELED
from snapengine.kernel.processvm cimport iovec
from snapengine.kernel.ptrace cimport (
    NT_PRFPREG, NT_PRSTATUS, NT_X86_XSTATE, PTRACE_CONT, PTRACE_GETREGS, PTRACE_GETREGSET,
    PTRACE_GETSIGMASK, PTRACE_O_TRACECLONE, PTRACE_SETREGS, snap_boost_self, snap_end_with_parent,
    snap_leave_session, snap_ptrace, snap_run_in_helper, snap_xstate_bytes, user_regs_struct,
)
from snapengine.base.pthreads cimport snap_name_thread, snap_now_ns, snap_sleep_ns
from snapengine.process.tracee cimport (
    TRACEE_CLONED, TRACEE_ENDED, TRACEE_RUNNING, TRACEE_STOPPED, tracee_comm, tracee_detach,
    tracee_in_vfork, tracee_interrupt, tracee_poll, tracee_reap_ended, tracee_refusal, tracee_seize,
    tracee_settle, tracee_state_t,
)

cdef extern from "<unistd.h>" nogil:
    long c_syscall "syscall"(long number, ...)

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_tgkill, SYS_gettid

cdef enum:
    SPARE_THREADS = 64              # born while the others are being stopped
    REFUSALS = 20                   # a thread that exits refuses with EPERM for some microseconds

cdef uint64_t POLL_NS = 20000       # between polls of threads that have not stopped yet
cdef uint64_t LOOK_NS = 2000000     # then /proc tells why a thread does not stop
cdef uint64_t REAP_NS = 5000000     # between looks for threads that were killed while they were stopped


cdef int _find(freezer_t *freezer, int tid) noexcept nogil:
    cdef int i
    for i in range(freezer.n):
        if freezer.threads[i].tid == tid and not freezer.threads[i].gone:
            return i
    return -1


cdef int _add(freezer_t *freezer, int process, int tid) noexcept nogil:
    cdef void *more
    cdef thread_t *thread
    if _find(freezer, tid) >= 0:
        return 0
    if freezer.n == freezer.room:
        more = realloc(freezer.threads, (freezer.room * 2 + SPARE_THREADS) * sizeof(thread_t))
        if more == NULL:
            return ENOMEM
        freezer.threads = <thread_t *>more
        freezer.room = freezer.room * 2 + SPARE_THREADS
    thread = &freezer.threads[freezer.n]
    memset(thread, 0, sizeof(thread_t))
    thread.tid = tid
    thread.process = process
    tracee_comm(process, tid, thread.comm)
    freezer.n += 1
    return 0


cdef void _set_error_thread(freezer_t *freezer, int process, int tid) noexcept nogil:
    freezer.at_tid = tid
    freezer.at_process = process


cdef int _seize_one(freezer_t *freezer, int process, int tid) noexcept nogil:
    """0 or errno. EPERM and EAGAIN may be temporary: the thread is ending."""
    cdef int tracer = 0
    cdef int err = tracee_seize(tid, PTRACE_O_TRACECLONE)
    if err == 0:
        return _add(freezer, process, tid)
    if err == ESRCH:
        return 0
    _set_error_thread(freezer, process, tid)
    if err != EPERM:
        return err
    err = tracee_refusal(process, tid, &tracer)
    if err == EBUSY and tracer == c_syscall(SYS_gettid):
        return _add(freezer, process, tid)      # created by a thread that we trace
    return err


cdef int _seize_threads(freezer_t *freezer, int process) noexcept nogil:
    cdef char path[32]
    cdef dirent *entry
    cdef DIR *folder
    cdef int tid
    cdef int err = 0, worst = 0
    snprintf(path, sizeof(path), b"/proc/%d/task", process)
    folder = opendir(path)
    if folder == NULL:
        return ESRCH if process == freezer.pid else 0
    while worst in (0, EPERM, EAGAIN):
        entry = readdir(folder)
        if entry == NULL:
            break
        tid = atoi(entry.d_name)
        if tid > 0 and _find(freezer, tid) < 0:
            err = _seize_one(freezer, process, tid)
            if err:
                worst = err
    closedir(folder)
    return worst


cdef int _seize_new(freezer_t *freezer, bint *found) noexcept nogil:
    """Seize the threads that are not seized yet, also of the processes that share the memory. `found`:
    whether there were any."""
    cdef int before = freezer.n
    cdef int err = _seize_threads(freezer, freezer.pid)
    cdef int i
    for i in range(freezer.sharers.n):
        if err in (0, EPERM, EAGAIN):
            err = _seize_threads(freezer, freezer.sharers.processes[i]) or err
    found[0] = freezer.n > before
    return err


cdef int _seize_all(freezer_t *freezer) noexcept nogil:
    """Until a complete listing contains nothing new. Seized threads report the threads that they create."""
    cdef uint64_t until = snap_now_ns() + freezer.limit_ns
    cdef bint found = True
    cdef int refused = 0
    cdef int err
    while True:
        err = _seize_new(freezer, &found)
        if err == 0 and not found:
            return 0 if freezer.n else ESRCH
        refused += err == EPERM
        if err not in (0, EAGAIN, EPERM) or refused > REFUSALS:
            return err
        if snap_now_ns() >= until:
            return ETIMEDOUT
        if err:
            snap_sleep_ns(POLL_NS)


cdef int _make_room(freezer_t *freezer) noexcept nogil:
    """Before anything is stopped, since first touches of memory are slow."""
    cdef void *area
    if not freezer.registers or freezer.n <= freezer.area_room:
        return 0
    freezer.stride = (REGS_BYTES + FPREGS_BYTES + snap_xstate_bytes() + 63) & ~<size_t>63
    area = realloc(freezer.area, (freezer.n + SPARE_THREADS) * freezer.stride)
    if area == NULL:
        return ENOMEM
    memset(area, 0, (freezer.n + SPARE_THREADS) * freezer.stride)
    freezer.area = <char *>area
    freezer.area_room = freezer.n + SPARE_THREADS
    return 0


cdef int _note_state(freezer_t *freezer, int i, tracee_state_t state, int born) noexcept nogil:
    cdef int tid = freezer.threads[i].tid
    if state == TRACEE_ENDED:
        freezer.threads[i].gone = True
    elif state == TRACEE_CLONED:
        return _add(freezer, freezer.threads[i].process, born)
    elif state == TRACEE_STOPPED:
        # A new process is reported like a new thread. If it shares the memory, list_new_sharers finds it.
        if c_syscall(SYS_tgkill, freezer.threads[i].process, tid, 0) != 0:
            tracee_detach(tid)
            freezer.threads[i].gone = True
        else:
            freezer.threads[i].stopped = True
    return 0


cdef int _wait_stopped(freezer_t *freezer) noexcept nogil:
    cdef uint64_t began = snap_now_ns()
    cdef uint64_t until = freezer.from_ns + freezer.limit_ns
    cdef uint64_t look_at = began + LOOK_NS
    cdef uint64_t now
    cdef bint late
    cdef int i, waiting, err
    cdef int born = 0, tracer = 0
    cdef tracee_state_t state
    while True:
        now = snap_now_ns()
        late = now >= look_at
        if late:
            look_at = now + LOOK_NS
        waiting = 0
        i = 0
        while i < freezer.n:
            if not freezer.threads[i].stopped and not freezer.threads[i].gone:
                waiting += 1
                _set_error_thread(freezer, freezer.threads[i].process, freezer.threads[i].tid)
                state = tracee_poll(freezer.at_tid, PTRACE_CONT, &born)
                if state == TRACEE_RUNNING and late:
                    # The end of the leader is reported only after that of the last thread.
                    if tracee_refusal(freezer.at_process, freezer.at_tid, &tracer) == 0:
                        state = TRACEE_ENDED
                    elif tracee_in_vfork(freezer.at_process, freezer.at_tid):
                        freezer.threads[i].stopped = freezer.threads[i].in_vfork = True
                err = _note_state(freezer, i, state, born)
                if err:
                    return err
            i += 1
        if waiting == 0:
            return 0
        if now >= until:
            return ETIMEDOUT
        snap_sleep_ns(POLL_NS)


cdef int _stop_all(freezer_t *freezer) noexcept nogil:
    cdef int asked = 0, i
    cdef bint found = True
    cdef int err
    freezer.sharers.pid = freezer.pid
    err = list_sharers(&freezer.sharers)                        # while all run: it takes the longest
    if err == 0:
        err = _seize_all(freezer)
    if err == 0:
        err = _make_room(freezer)
    freezer.from_ns = snap_now_ns()
    while err == 0 and found:
        for i in range(asked, freezer.n):
            tracee_interrupt(freezer.threads[i].tid)    # ESRCH: it has ended; the wait reports that
        asked = freezer.n
        err = _wait_stopped(freezer)
        if err == 0:
            err = list_new_sharers(&freezer.sharers)
        if err == 0:
            err = _seize_new(freezer, &found)
        if err in (EAGAIN, EPERM):
            snap_sleep_ns(POLL_NS)
            err = ETIMEDOUT if snap_now_ns() > freezer.from_ns + freezer.limit_ns else 0
            found = True
    return err


cdef uint64_t _regset(int tid, int kind, char *into, size_t room) noexcept nogil:
    """The bytes that the kernel returned; 0 if it has no such register set."""
    cdef iovec part
    part.iov_base = into
    part.iov_len = room
    if snap_ptrace(PTRACE_GETREGSET, tid, <uintptr_t>kind, &part):
        return 0
    return part.iov_len


cdef void _capture(freezer_t *freezer, int i) noexcept nogil:
    cdef thread_t *thread = &freezer.threads[i]
    cdef char *slot = freezer.area + <size_t>i * freezer.stride
    cdef size_t fixed = REGS_BYTES + FPREGS_BYTES
    _regset(thread.tid, NT_PRSTATUS, slot, REGS_BYTES)
    _regset(thread.tid, NT_PRFPREG, slot + REGS_BYTES, FPREGS_BYTES)
    thread.xstate_bytes = _regset(thread.tid, NT_X86_XSTATE, slot + fixed, freezer.stride - fixed)
    snap_ptrace(PTRACE_GETSIGMASK, thread.tid, sizeof(thread.sigmask), &thread.sigmask)


cdef int _settle_all(freezer_t *freezer) noexcept nogil:
    """Repair the side effects of the stop in every thread, then read its registers for the image."""
    cdef user_regs_struct regs
    cdef int i
    cdef int err = _make_room(freezer)
    for i in range(freezer.n):
        if err or not freezer.threads[i].stopped or freezer.threads[i].in_vfork:
            continue
        if snap_ptrace(PTRACE_GETREGS, freezer.threads[i].tid, 0, &regs):
            freezer.threads[i].stopped = False         # SIGKILL ends a ptrace stop
            freezer.threads[i].gone = True
            continue
        if tracee_settle(freezer.threads[i].process, freezer.threads[i].tid, &regs, False):
            snap_ptrace(PTRACE_SETREGS, freezer.threads[i].tid, 0, &regs)
        if freezer.registers and freezer.threads[i].process == freezer.pid:
            _capture(freezer, i)
    return err


cdef int _stop_and_hold(void *arg) noexcept nogil:
    cdef freezer_t *freezer = <freezer_t *>arg
    cdef int i
    snap_leave_session()
    if snap_end_with_parent(freezer.owner):
        return 0
    snap_boost_self()
    freezer.err = _stop_all(freezer)
    if freezer.err == 0:
        freezer.err = _settle_all(freezer)
    if freezer.err == 0:
        snap_store_wake(&freezer.phase, STOPPED)
        while not snap_load_word(&freezer.resume):
            snap_futex_timed_wait(&freezer.resume, False, REAP_NS)
            tracee_reap_ended()
    for i in range(freezer.n):
        if not freezer.threads[i].gone:
            tracee_detach(freezer.threads[i].tid)       # else the end of this process detaches it
    freezer.stopped_ns = snap_now_ns() - freezer.from_ns
    snap_store_wake(&freezer.phase, RESUMED)
    return 0


cdef void *stop_and_hold(void *arg) noexcept nogil:
    cdef freezer_t *freezer = <freezer_t *>arg
    cdef int err
    snap_name_thread(b"snap-freezer")
    err = snap_run_in_helper(_stop_and_hold, freezer)
    if snap_load_word(&freezer.phase) != RESUMED:
        freezer.err = err or ECANCELED
        snap_store_wake(&freezer.phase, RESUMED)
    return NULL

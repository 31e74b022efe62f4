"""Processes that share the memory of another process: they can write to it, but are not its threads.

Examples: a child of vfork(2) until it calls execve(2), and processes that runtimes and sandboxes make by
clone(2) with CLONE_VM alone. No file in /proc/PID lists them. kcmp(2) tells whether two processes have the
same memory, so every process of the machine is compared once (0.7 µs each with the listing), before anything
is stopped. During the stop only processes newer than that list are compared.

kcmp() fails with EPERM for a process that this user may not trace. That depends on the memory
(PR_GET_DUMPABLE) and on the user. Memory shared by processes of two users is traceable for neither of them,
since changing the user clears the dumpable attribute (credentials(7)), unless they set it by PR_SET_DUMPABLE.
So a process for which kcmp() is refused counts as one that does not share.

Runs in the freezer's helper process; allocates with realloc, takes no lock.
"""

from libc.errno cimport ENOMEM, ENOSYS, EPERM, errno
from libc.stdlib cimport atoi, realloc

from snapengine.base.dirent cimport DIR, closedir, dirent, opendir, readdir
from snapengine.kernel.ptrace cimport snap_newest_id

cdef extern from "<unistd.h>" nogil:
    long c_syscall "syscall"(long number, ...)

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_kcmp, SYS_tgkill, SYS_gettid

cdef extern from "<linux/kcmp.h>" nogil:
    int KCMP_VM

cdef enum:
    MORE_PROCESSES = 16
    ASKED_ONE_BY_ONE = 20000        # 0.2 µs for an unused id; beyond that a new list is cheaper


cdef bint _shares(sharers_t *sharers, int process) noexcept nogil:
    return process != sharers.pid and c_syscall(SYS_kcmp, sharers.pid, process, KCMP_VM, 0, 0) == 0


cdef bint _known(sharers_t *sharers, int task) noexcept nogil:
    """Whether `task` is a thread of the process, or of a sharer that is listed already."""
    cdef int i
    if c_syscall(SYS_tgkill, sharers.pid, task, 0) == 0:
        return True
    for i in range(sharers.n):
        if sharers.processes[i] == task or c_syscall(SYS_tgkill, sharers.processes[i], task, 0) == 0:
            return True
    return False


cdef int _note(sharers_t *sharers, int process) noexcept nogil:
    cdef void *more
    if not _shares(sharers, process) or _known(sharers, process):
        return 0
    if sharers.n == sharers.room:
        more = realloc(sharers.processes, (sharers.room + MORE_PROCESSES) * sizeof(int))
        if more == NULL:
            return ENOMEM
        sharers.processes = <int *>more
        sharers.room += MORE_PROCESSES
    sharers.processes[sharers.n] = process
    sharers.n += 1
    return 0


cdef int _ask_all(sharers_t *sharers) noexcept nogil:
    cdef DIR *folder = opendir(b"/proc")
    cdef dirent *entry
    cdef int process
    cdef int err = 0
    if folder == NULL:
        return errno
    while err == 0:
        entry = readdir(folder)
        if entry == NULL:
            break
        process = atoi(entry.d_name)
        if process > 0:
            err = _note(sharers, process)
    closedir(folder)
    return err


cdef int list_sharers(sharers_t *sharers) noexcept nogil:
    sharers.n = 0
    cdef long same = c_syscall(SYS_kcmp, sharers.pid, sharers.pid, KCMP_VM, 0, 0)
    sharers.unknown = same < 0 and errno in (ENOSYS, EPERM)
    if sharers.unknown:
        return 0
    sharers.newest = <int>c_syscall(SYS_gettid)
    return _ask_all(sharers)


cdef int list_new_sharers(sharers_t *sharers) noexcept nogil:
    cdef int newest = 0, process
    cdef int err = 0 if sharers.unknown else snap_newest_id(&newest)
    if sharers.unknown or err:
        return err
    if not sharers.newest < newest <= sharers.newest + ASKED_ONE_BY_ONE:
        err = _ask_all(sharers)
    else:
        for process in range(sharers.newest + 1, newest):
            err = err or _note(sharers, process)
    sharers.newest = newest
    return err

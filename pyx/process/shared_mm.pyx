"""Who else writes to a process's memory: processes that share it and are none of its threads.

A child of vfork(2) until it executes, and what runtimes and sandboxes make by clone(2) with CLONE_VM alone.
They are in no list of the process. kcmp(2) compares the memory of two processes, so all processes of the
machine are asked once (0.7 µs each with the listing), before anything is stopped. In the stop only those are
asked that are younger than that list.

kcmp() is refused (EPERM) for a process that this user may not trace. Whether it may is a matter of the memory
(PR_GET_DUMPABLE) and of the user: memory that processes of two users share is traceable for neither (to
change the user makes it so, credentials(7)), unless they ask for it by PR_SET_DUMPABLE. So who is refused
counts as one who does not share.

Runs on the freezer's thread; allocates with realloc, takes no lock.
"""

from libc.errno cimport ENOMEM, ENOSYS, EPERM, errno
from libc.stdlib cimport atoi, realloc
from libc.stdint cimport uintptr_t

from snapengine.base.dirent cimport DIR, closedir, dirent, opendir, readdir
from snapengine.base.pthreads cimport pthread_join, pthread_t, snap_thread_start

cdef extern from "<unistd.h>" nogil:
    long c_syscall "syscall"(long number, ...)

cdef extern from "<sys/syscall.h>" nogil:
    long SYS_kcmp, SYS_tgkill, SYS_gettid

cdef extern from "<linux/kcmp.h>" nogil:
    int KCMP_VM

cdef enum:
    MORE_PROCESSES = 16
    ASKED_ONE_BY_ONE = 20000        # 0.2 µs for an id that nobody has; beyond that a new list is cheaper


cdef bint _shares(kin_t *kin, int process) noexcept nogil:
    return process != kin.pid and c_syscall(SYS_kcmp, kin.pid, process, KCMP_VM, 0, 0) == 0


cdef bint _known(kin_t *kin, int task) noexcept nogil:
    """A thread of the process, or of one that is listed."""
    cdef int i
    if c_syscall(SYS_tgkill, kin.pid, task, 0) == 0:
        return True
    for i in range(kin.n):
        if kin.processes[i] == task or c_syscall(SYS_tgkill, kin.processes[i], task, 0) == 0:
            return True
    return False


cdef int _note(kin_t *kin, int process) noexcept nogil:
    cdef void *more
    if not _shares(kin, process) or _known(kin, process):
        return 0
    if kin.n == kin.room:
        more = realloc(kin.processes, (kin.room + MORE_PROCESSES) * sizeof(int))
        if more == NULL:
            return ENOMEM
        kin.processes = <int *>more
        kin.room += MORE_PROCESSES
    kin.processes[kin.n] = process
    kin.n += 1
    return 0


cdef void *_say_id(void *arg) noexcept nogil:
    return <void *><uintptr_t>c_syscall(SYS_gettid)


cdef int _newest_id(int *newest) noexcept nogil:
    """The id of a thread made now: who came before has a lower one, until they begin anew at pid_max."""
    cdef pthread_t thread
    cdef void *answer
    cdef int err = snap_thread_start(&thread, _say_id, NULL)
    if err == 0:
        pthread_join(thread, &answer)
        newest[0] = <int><uintptr_t>answer
    return err


cdef int _ask_all(kin_t *kin) noexcept nogil:
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
            err = _note(kin, process)
    closedir(folder)
    return err


cdef int kin_list(kin_t *kin) noexcept nogil:
    kin.n = 0
    kin.unknown = c_syscall(SYS_kcmp, kin.pid, kin.pid, KCMP_VM, 0, 0) < 0 and errno in (ENOSYS, EPERM)
    if kin.unknown:
        return 0
    kin.newest = <int>c_syscall(SYS_gettid)
    return _ask_all(kin)


cdef int kin_list_new(kin_t *kin) noexcept nogil:
    cdef int newest = 0, process
    cdef int err = 0 if kin.unknown else _newest_id(&newest)
    if kin.unknown or err:
        return err
    if not kin.newest < newest <= kin.newest + ASKED_ONE_BY_ONE:
        err = _ask_all(kin)
    else:
        for process in range(kin.newest + 1, newest):
            err = err or _note(kin, process)
    kin.newest = newest
    return err

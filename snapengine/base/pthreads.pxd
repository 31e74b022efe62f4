# extern-only: no matching .pyx. POSIX threads for capture threads, which have no Python thread state.

cdef enum:
    LONG_SLICE_NS = 4000000         # time slice of threads beside writers: above the default (at most 3 ms)


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_t:
        pass
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_mutexattr_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    ctypedef struct pthread_condattr_t:
        pass
    ctypedef struct timespec:
        long tv_sec
        long tv_nsec
    int pthread_create(pthread_t *thread, void *attr, void *(*start)(void *) noexcept nogil, void *arg)
    int pthread_join(pthread_t thread, void **result)
    int pthread_mutex_init(pthread_mutex_t *mutex, pthread_mutexattr_t *attr)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)
    int pthread_cond_init(pthread_cond_t *cond, pthread_condattr_t *attr)
    int pthread_cond_destroy(pthread_cond_t *cond)
    int pthread_cond_wait(pthread_cond_t *cond, pthread_mutex_t *mutex)
    int pthread_cond_timedwait(pthread_cond_t *cond, pthread_mutex_t *mutex, const timespec *until)
    int pthread_cond_signal(pthread_cond_t *cond)
    int pthread_cond_broadcast(pthread_cond_t *cond)

cdef extern from "snapengine/internal/threads.h" nogil:
    # pthread_create with all signals blocked in the new thread, except SIGSEGV and SIGBUS.
    int snap_thread_start(pthread_t *thread, void *(*start)(void *) noexcept nogil, void *arg)
    # Bind the calling thread to the n-th CPU that the process may use.
    int snap_pin_to(int n)
    ctypedef struct cpu_set_t:
        pass
    # Move the calling thread to another CPU if it runs on `cpu`. Returns whether it moved;
    # snap_restore_affinity() then undoes it.
    bint snap_leave_cpu(int cpu, cpu_set_t *before)
    void snap_restore_affinity(const cpu_set_t *before)
    unsigned long long snap_now_ns()        # CLOCK_MONOTONIC
    void snap_sleep_ns(unsigned long long ns)
    void snap_name_thread(const char *name)
    void snap_nice_slice(int value, unsigned long long slice_ns)    # of the calling thread

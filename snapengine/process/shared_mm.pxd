# Processes that share the memory of another one: clone(2) with CLONE_VM and without CLONE_THREAD.

cdef struct sharers_t:
    int pid                         # whose memory
    int *processes                  # the ids of the processes that share it
    int n
    int room
    int newest                      # the newest id when the processes were listed last
    bint unknown                    # kcmp(2) is not available, so nothing is known


# Functions return 0 or an errno value. Call them in a task that is newer than the last moment at which `pid`
# was known to share its memory with no other process.
cdef int list_sharers(sharers_t *sharers) noexcept nogil
# Adds the processes made since the last call. Ids ascend, so only newer ones are compared.
cdef int list_new_sharers(sharers_t *sharers) noexcept nogil

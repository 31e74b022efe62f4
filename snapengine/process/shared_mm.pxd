# Processes that share the memory of another one: clone(2) with CLONE_VM and without CLONE_THREAD.

cdef struct kin_t:
    int pid                         # whose memory
    int *processes                  # who shares it, by their process ids
    int n
    int room
    int newest                      # an id that was the newest one when the processes were listed last
    bint unknown                    # kcmp(2) is not to be had: nobody can tell


# Functions return 0 or an errno value. To be called on a thread made after `pid` was last known to be alone.
cdef int kin_list(kin_t *kin) noexcept nogil
# Who has come since the last call: ids are given out in ascending order, so only the newer ones are asked.
cdef int kin_list_new(kin_t *kin) noexcept nogil

# extern-only: no matching .pyx. Kernel interfaces under their kernel names.
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef extern from "<errno.h>" nogil:
    const int ECANCELED             # not in libc.errno

cdef extern from "snapengine/internal/linux_compat.h" nogil:
    int snap_uffd_open(int flags)

    const uint64_t UFFD_API
    const uint64_t UFFD_FEATURE_PAGEFAULT_FLAG_WP
    const uint64_t UFFD_FEATURE_EVENT_FORK
    const uint64_t UFFD_FEATURE_EVENT_REMAP
    const uint64_t UFFD_FEATURE_EVENT_REMOVE
    const uint64_t UFFD_FEATURE_EVENT_UNMAP
    const uint64_t UFFD_FEATURE_MISSING_HUGETLBFS
    const uint64_t UFFD_FEATURE_MISSING_SHMEM
    const uint64_t UFFD_FEATURE_MINOR_HUGETLBFS
    const uint64_t UFFD_FEATURE_MINOR_SHMEM
    const uint64_t UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    const uint64_t UFFD_FEATURE_WP_UNPOPULATED
    const uint64_t UFFD_FEATURE_POISON
    const uint64_t UFFD_FEATURE_WP_ASYNC
    const uint64_t UFFDIO_REGISTER_MODE_MISSING
    const uint64_t UFFDIO_REGISTER_MODE_WP
    const uint64_t UFFDIO_REGISTER_MODE_MINOR
    const uint64_t UFFDIO_COPY_MODE_DONTWAKE
    const uint64_t UFFDIO_COPY_MODE_WP
    const uint64_t UFFDIO_ZEROPAGE_MODE_DONTWAKE
    const uint64_t UFFDIO_CONTINUE_MODE_DONTWAKE
    const uint64_t UFFDIO_CONTINUE_MODE_WP
    const uint64_t UFFDIO_POISON_MODE_DONTWAKE
    const uint64_t UFFDIO_WRITEPROTECT_MODE_WP
    const uint8_t UFFD_EVENT_PAGEFAULT
    const uint8_t UFFD_EVENT_FORK
    const uint8_t UFFD_EVENT_REMAP
    const uint8_t UFFD_EVENT_REMOVE
    const uint8_t UFFD_EVENT_UNMAP
    const uint64_t UFFD_PAGEFAULT_FLAG_WP
    const uint64_t UFFD_PAGEFAULT_FLAG_MINOR
    const unsigned long IOCTL_UFFDIO_API "UFFDIO_API"
    const unsigned long IOCTL_UFFDIO_REGISTER "UFFDIO_REGISTER"
    const unsigned long IOCTL_UFFDIO_UNREGISTER "UFFDIO_UNREGISTER"
    const unsigned long IOCTL_UFFDIO_WRITEPROTECT "UFFDIO_WRITEPROTECT"
    const unsigned long IOCTL_UFFDIO_COPY "UFFDIO_COPY"
    const unsigned long IOCTL_UFFDIO_ZEROPAGE "UFFDIO_ZEROPAGE"
    const unsigned long IOCTL_UFFDIO_CONTINUE "UFFDIO_CONTINUE"
    const unsigned long IOCTL_UFFDIO_POISON "UFFDIO_POISON"
    const unsigned long IOCTL_UFFDIO_WAKE "UFFDIO_WAKE"

    struct uffdio_api:
        uint64_t api
        uint64_t features
        uint64_t ioctls
    struct uffdio_range:
        uint64_t start
        uint64_t len
    struct uffdio_register:
        uffdio_range range
        uint64_t mode
        uint64_t ioctls
    struct uffdio_writeprotect:
        uffdio_range range
        uint64_t mode
    struct uffdio_copy:
        uint64_t dst
        uint64_t src
        uint64_t len
        uint64_t mode
        int64_t copy
    struct uffdio_zeropage:
        uffdio_range range
        uint64_t mode
        int64_t zeropage
    struct uffdio_continue:
        uffdio_range range
        uint64_t mode
        int64_t mapped
    struct uffdio_poison:
        uffdio_range range
        uint64_t mode
        int64_t updated
    struct _uffd_pf:
        uint64_t flags
        uint64_t address
    struct _uffd_fork:
        uint32_t ufd
    union _uffd_arg:
        _uffd_pf pagefault
        _uffd_fork fork
    struct uffd_msg:
        uint8_t event
        _uffd_arg arg

    struct page_region:
        uint64_t start
        uint64_t end
        uint64_t categories
    struct pm_scan_arg:
        uint64_t size
        uint64_t flags
        uint64_t start
        uint64_t end
        uint64_t walk_end
        uint64_t vec
        uint64_t vec_len
        uint64_t max_pages
        uint64_t category_inverted
        uint64_t category_mask
        uint64_t category_anyof_mask
        uint64_t return_mask
    const unsigned long IOCTL_PAGEMAP_SCAN "PAGEMAP_SCAN"
    struct procmap_query:
        uint64_t size
        uint64_t query_flags
        uint64_t query_addr
        uint64_t vma_start
        uint64_t vma_end
        uint64_t vma_flags
        uint64_t vma_offset
        uint64_t inode
        uint32_t dev_major
        uint32_t dev_minor
        uint32_t vma_name_size
        uint32_t build_id_size
    const unsigned long IOCTL_PROCMAP_QUERY "PROCMAP_QUERY"
    const uint64_t PROCMAP_QUERY_COVERING_OR_NEXT_VMA
    const int MADV_POPULATE_READ
    const uint64_t PAGE_IS_WRITTEN
    const uint64_t PAGE_IS_FILE
    const uint64_t PAGE_IS_PRESENT
    const uint64_t PAGE_IS_SWAPPED
    const uint64_t PAGE_IS_PFNZERO
    const uint64_t PAGE_IS_HUGE
    const uint64_t PAGE_IS_GUARD
    const uint64_t PM_SCAN_WP_MATCHING
    const uint64_t PM_SCAN_CHECK_WPASYNC

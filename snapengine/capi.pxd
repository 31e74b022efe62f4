# The C API (snapengine/snapengine.h) for Cython embedders; call snapengine_import() once.
from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

cdef extern from "snapengine/snapengine.h" nogil:
    const uint32_t SNAPENGINE_ABI_VERSION
    const char *SNAPENGINE_CAPSULE
    enum:
        SNAPENGINE_WRITE_TRACKING
        SNAPENGINE_DIRTY_LOGGING
    struct snapengine_capture:
        pass
    struct snapengine_options:
        size_t struct_size
        int method
        int zstd_level
        uint64_t memory_limit
        uint64_t rate_limit
        int fault_threads
        int encoder_threads
        int (*pause)(void *context) noexcept nogil
        int (*resume)(void *context) noexcept nogil
        void *context
    struct snapengine_result:
        size_t struct_size
        uint64_t image_bytes
        uint64_t region_bytes
        uint64_t nonzero_bytes
        uint64_t pages_total
        uint64_t pages_saved
        uint64_t zero_pages
        uint64_t hole_pages
        uint64_t duplicate_pages
        uint64_t lost_pages
        uint64_t faults
        uint64_t rounds
        uint64_t arm_ns
        uint64_t stop_ns
        uint64_t duration_ns
        uint64_t fault_p50_ns
        uint64_t fault_p99_ns
        uint64_t fault_max_ns
        uint64_t peak_buffer_bytes
        uint64_t spilled_bytes
    struct snapengine_api:
        uint32_t abi_version
        uint32_t struct_size
        snapengine_capture *(*snapshot_start)(void *addr, size_t length, int fd,
                                              const snapengine_options *options) noexcept nogil
        int (*snapshot_wait)(snapengine_capture *capture, snapengine_result *out) noexcept nogil
        void (*snapshot_cancel)(snapengine_capture *capture) noexcept nogil
        void (*snapshot_free)(snapengine_capture *capture) noexcept nogil
        size_t (*last_error)(char *text, size_t size) noexcept nogil
        int (*copy_page)(char *dst, const char *src) noexcept nogil
        int (*page_nonzero)(const char *src) noexcept nogil
        uint32_t (*crc32c)(uint32_t crc, const void *data, size_t length) noexcept nogil
    const snapengine_api *snapengine_import() except NULL with gil

/* The C API: live snapshots of memory of the calling process.
 *
 *     #include <Python.h>
 *     #include <snapengine/snapengine.h>
 *
 *     const snapengine_api *api = snapengine_import();       // with the GIL, once; NULL: exception set
 *     snapengine_options options = SNAPENGINE_OPTIONS_INIT;
 *     snapengine_capture *capture = api->snapshot_start(ram, length, fd, &options);
 *     ...                                                    // T is fixed: the program may write to ram
 *     snapengine_result result = SNAPENGINE_RESULT_INIT;
 *     int err = api->snapshot_wait(capture, &result);
 *     api->snapshot_free(capture);
 *
 * Threads: every function may be called from any thread, with or without the GIL, including threads that were
 * not created by Python. start, wait, cancel and free acquire the GIL and release it while they wait: do not
 * call them with a lock held that a GIL holder may wait for. A thread that writes to memory being saved waits
 * some microseconds, whether it holds the GIL or not: its release does not need the GIL. Several threads may
 * use a handle at once, but not after snapshot_free. Do not call any function before Py_Initialize, after
 * Py_Finalize, in a forked child with a handle of its parent, in a signal handler, or with a Python exception
 * set.
 *
 * Compatibility: functions and fields are only added, at the end. struct_size tells which exist.
 * abi_version changes only when programs built for the previous version would no longer work. */
#ifndef SNAPENGINE_SNAPENGINE_H
#define SNAPENGINE_SNAPENGINE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SNAPENGINE_ABI_VERSION 1u
#define SNAPENGINE_CAPSULE "snapengine._C_API"

enum {
    SNAPENGINE_WRITE_TRACKING = 0, /* the image is the state at the start */
    SNAPENGINE_DIRTY_LOGGING = 1   /* the image is the state at the end; requires pause and resume */
};

typedef struct snapengine_capture snapengine_capture;

/* Zero in a field means the default. A struct_size larger than the package's own is accepted if all fields
 * that the package does not know are zero. */
typedef struct snapengine_options {
    size_t struct_size;
    int method;
    int zstd_level;        /* -7 ... 22; 0: no compression (zstd's own default level is 3) */
    uint64_t memory_limit; /* bytes of buffers; 0: 64 MiB; at least 16 MiB */
    uint64_t rate_limit;   /* bytes per second to the descriptor; 0: no limit */
    int fault_threads;     /* 0: one per usable CPU, at most 4 */
    int encoder_threads;   /* 0: one; two with compression */
    /* Stop and restart all writers of the memory. NULL: they are never stopped. Each returns 0, or an
     * errno that fails the capture. They are called without the GIL: with write tracking around T, by the
     * thread that calls snapshot_start; with dirty logging around the last round, by a thread of the
     * capture. */
    int (*pause)(void *context);
    int (*resume)(void *context);
    void *context;
} snapengine_options;

#define SNAPENGINE_OPTIONS_INIT {sizeof(snapengine_options), 0, 0, 0, 0, 0, 0, NULL, NULL, NULL}

/* Statistics of one capture. Page counts are of 4096 bytes:
 * pages_total == pages_saved - duplicate_pages + zero_pages + hole_pages + lost_pages. */
typedef struct snapengine_result {
    size_t struct_size; /* set by the caller; no field beyond it is written */
    uint64_t image_bytes;
    uint64_t region_bytes;  /* bytes of memory that the image describes */
    uint64_t nonzero_bytes; /* bytes of the pages that are not all zero, each counted once */
    uint64_t pages_total;
    uint64_t pages_saved;     /* data pages in the image, including superseded ones */
    uint64_t zero_pages;      /* populated, all zero */
    uint64_t hole_pages;      /* not populated */
    uint64_t duplicate_pages; /* data pages that a later one supersedes */
    uint64_t lost_pages;      /* discarded or unmapped by the program before they were saved */
    uint64_t faults;
    uint64_t rounds;
    uint64_t arm_ns;  /* from the first registration to T */
    uint64_t stop_ns; /* from pause to resume */
    uint64_t duration_ns;
    uint64_t fault_p50_ns; /* from reading the fault event to waking the writer */
    uint64_t fault_p99_ns;
    uint64_t fault_max_ns;
    uint64_t peak_buffer_bytes;
    uint64_t spilled_bytes;
} snapengine_result;

#define SNAPENGINE_RESULT_INIT \
    {sizeof(snapengine_result), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}

typedef struct snapengine_api {
    uint32_t abi_version;
    uint32_t struct_size;

    /* Begin to save `length` writable bytes at `addr` to the descriptor `fd`. The descriptor is duplicated
     * and remains the caller's. Returns when T is fixed (dirty logging: when the first round runs), or
     * NULL on an error: see last_error. `options` may be NULL. The memory must stay mapped until
     * snapshot_wait or snapshot_free has returned. */
    snapengine_capture *(*snapshot_start)(void *addr, size_t length, int fd,
                                          const snapengine_options *options);
    /* Wait for the complete image. Returns 0, or an errno (last_error has the text) and there is no image.
     * ECANCELED: cancelled. EAGAIN: dirty logging did not converge; `out` is still filled in. EINTR: a Python
     * signal handler raised; the capture continues, call again. `out` may be NULL. */
    int (*snapshot_wait)(snapengine_capture *capture, snapengine_result *out);
    /* Cancel the capture: the memory is released, and the descriptor gets no complete image. Returns at
     * once. */
    void (*snapshot_cancel)(snapengine_capture *capture);
    /* Free the handle. A running capture is cancelled and waited for. NULL is allowed. */
    void (*snapshot_free)(snapengine_capture *capture);
    /* Store the message of the calling thread's last failure, truncated to `size` bytes including the NUL.
     * Returns the length of the whole message without the NUL. Does not need the GIL. */
    size_t (*last_error)(char *text, size_t size);

    /* Primitives; they do not need the GIL. */
    /* Copy 4096 bytes. Returns non-zero unless all are zero. */
    int (*copy_page)(char *dst, const char *src);
    int (*page_nonzero)(const char *src);
    /* CRC-32C, continued from `crc` (initially 0). */
    uint32_t (*crc32c)(uint32_t crc, const void *data, size_t length);
} snapengine_api;

#ifdef Py_PYTHON_H
/* The API of the installed package, or NULL with ImportError set. Requires the GIL. */
static inline const snapengine_api *snapengine_import(void) {
    const snapengine_api *api = (const snapengine_api *)PyCapsule_Import(SNAPENGINE_CAPSULE, 0);
    if (api == NULL)
        return NULL;
    if (api->abi_version != SNAPENGINE_ABI_VERSION || api->struct_size < sizeof(snapengine_api)) {
        PyErr_SetString(PyExc_ImportError,
                        "snapengine: the C API of the installed package is older or of another version; upgrade "
                        "the package, or rebuild this extension");
        return NULL;
    }
    return api;
}
#endif

#ifdef __cplusplus
}
#endif

#endif

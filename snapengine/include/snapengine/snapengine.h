/* The C API: a live snapshot of memory of this process, from C, from any thread.
 *
 *     #include <Python.h>
 *     #include <snapengine/snapengine.h>
 *
 *     const snapengine_api *api = snapengine_import();       // with the GIL, once; NULL: exception set
 *     snapengine_options options = SNAPENGINE_OPTIONS_INIT;
 *     snapengine_capture *capture = api->snapshot_start(ram, length, fd, &options);
 *     ...                                                    // T is fixed: write to ram as you like
 *     snapengine_result result = SNAPENGINE_RESULT_INIT;
 *     int err = api->snapshot_wait(capture, &result);
 *     api->snapshot_free(capture);
 *
 * Threads: every function may be called from any thread, also from one that Python has never seen, with
 * or without the GIL. start, wait, cancel and free take the GIL themselves and give it up while they
 * wait; whoever holds a lock that a GIL holder may want must not call them. A thread that writes to memory
 * being saved waits some microseconds, whether it holds the GIL or not: nothing that lets it go on needs
 * the GIL. A handle may be used by several threads at once, but not after snapshot_free.
 * No function may be called before Py_Initialize, after Py_Finalize, in a forked child (for a handle of
 * its parent), from a signal handler, or with a Python exception pending.
 *
 * The interface only grows: functions and fields are added at the end. abi_version changes only if a
 * program built for the old one could not go on; struct_size tells what is there.
 */
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
    SNAPENGINE_WRITE_TRACKING = 0, /* the state at the start */
    SNAPENGINE_DIRTY_LOGGING = 1   /* the state at the end; needs pause and resume */
};

typedef struct snapengine_capture snapengine_capture;

/* Zero in a field means the default. A struct_size beyond what the package knows is accepted as long as
 * all that it does not know is zero. */
typedef struct snapengine_options {
    size_t struct_size;
    int method;
    int zstd_level;        /* -7 ... 22; 0: no compression (zstd's own default level is 3) */
    uint64_t memory_limit; /* bytes of buffer; 0: 64 MiB; at least 16 MiB */
    uint64_t rate_limit;   /* bytes a second into the descriptor; 0: no limit */
    int fault_threads;     /* 0: one per usable CPU, at most 4 */
    int encoder_threads;   /* 0: one, with compression two */
    /* Stop and restart every writer of the memory; NULL: it is never stopped. Return 0 or an errno, which
     * fails the capture. Called without the GIL: by the thread that calls snapshot_start around T,
     * with dirty logging by a thread of the capture around its last round. */
    int (*pause)(void *context);
    int (*resume)(void *context);
    void *context;
} snapengine_options;

#define SNAPENGINE_OPTIONS_INIT {sizeof(snapengine_options), 0, 0, 0, 0, 0, 0, NULL, NULL, NULL}

/* Figures of one capture. Counts are pages of 4096 bytes:
 * pages_total == pages_saved - duplicate_pages + zero_pages + hole_pages + lost_pages. */
typedef struct snapengine_result {
    size_t struct_size; /* set by the caller; fields beyond it are not written */
    uint64_t image_bytes;
    uint64_t region_bytes;  /* bytes of memory that the image describes */
    uint64_t nonzero_bytes; /* bytes of the pages that hold anything but zeros, once each */
    uint64_t pages_total;
    uint64_t pages_saved;     /* data pages in the image, superseded ones included */
    uint64_t zero_pages;      /* populated, all zero */
    uint64_t hole_pages;      /* not populated */
    uint64_t duplicate_pages; /* data pages that a later one supersedes */
    uint64_t lost_pages;      /* discarded or unmapped by the program before they were saved */
    uint64_t faults;
    uint64_t rounds;
    uint64_t arm_ns;  /* from the first registration to T */
    uint64_t stop_ns; /* from pause to resume */
    uint64_t duration_ns;
    uint64_t fault_p50_ns; /* from seeing a fault to its release */
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

    /* Begin to save `length` writable bytes at `addr` into the descriptor `fd`, which stays the caller's
     * (it is duplicated, never closed). Returns once T is fixed (dirty logging: once the first round
     * runs), or NULL: see last_error. `options` may be NULL. The memory must stay mapped until
     * snapshot_wait has returned, or snapshot_free. */
    snapengine_capture *(*snapshot_start)(void *addr, size_t length, int fd,
                                          const snapengine_options *options);
    /* Wait for the complete image. 0, or an errno value (last_error has the text) and no image:
     * ECANCELED cancelled, EAGAIN dirty logging did not converge (`out` is filled in nevertheless),
     * EINTR a Python signal handler raised: the capture goes on, wait again. `out` may be NULL. */
    int (*snapshot_wait)(snapengine_capture *capture, snapengine_result *out);
    /* Give up: the memory is released, the descriptor holds no complete image. Returns at once. */
    void (*snapshot_cancel)(snapengine_capture *capture);
    /* Free the handle; a capture that still runs is cancelled and waited for. NULL is allowed. */
    void (*snapshot_free)(snapengine_capture *capture);
    /* The text of the calling thread's last failure, cut to `size` bytes with its NUL; returns its whole
     * length without the NUL. Needs no GIL. */
    size_t (*last_error)(char *text, size_t size);

    /* Primitives; they need no GIL. */
    /* Copy 4096 bytes; non-zero if any of them is. */
    int (*copy_page)(char *dst, const char *src);
    int (*page_nonzero)(const char *src);
    /* CRC-32C, continuing from `crc` (0 to begin). */
    uint32_t (*crc32c)(uint32_t crc, const void *data, size_t length);
} snapengine_api;

#ifdef Py_PYTHON_H
/* The API of the installed package, or NULL with ImportError set. Call it with the GIL. */
static inline const snapengine_api *snapengine_import(void) {
    const snapengine_api *api = (const snapengine_api *)PyCapsule_Import(SNAPENGINE_CAPSULE, 0);
    if (api == NULL)
        return NULL;
    if (api->abi_version != SNAPENGINE_ABI_VERSION || api->struct_size < sizeof(snapengine_api)) {
        PyErr_SetString(PyExc_ImportError, "snapengine: the C API is older, or another version");
        return NULL;
    }
    return api;
}
#endif

#ifdef __cplusplus
}
#endif

#endif

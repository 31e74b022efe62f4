/* An embedder in C: it needs the installed header and the capsule, and links to no library of ours. */
#include <Python.h>
#include <errno.h>
#include <pthread.h>
#include <snapengine/snapengine.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE 4096

static const snapengine_api *api;

/* One snapshot, by a thread that Python does not know. */
struct job {
    int fd, use_malloc, cancel;
    size_t pages;
    snapengine_options options;
    snapengine_result result;
    int err, pauses;
    char text[256];
};

static int count_pause(void *context) {
    ((struct job *)context)->pauses += 1;
    return 0;
}

static int refuse_pause(void *context) {
    (void)context;
    return EBUSY;
}

static int resume(void *context) {
    (void)context;
    return 0;
}

static void *save(void *arg) {
    struct job *job = arg;
    size_t length = job->pages * PAGE;
    char *ram = job->use_malloc ? malloc(length)
                                : mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (size_t page = 0; page < job->pages; page += 2) /* every second page stays a hole */
        memset(ram + page * PAGE, 1 + (int)(page % 200), PAGE);
    snapengine_capture *capture = api->snapshot_start(ram, length, job->fd, &job->options);
    if (capture == NULL) {
        job->err = -1;
    } else {
        if (job->cancel)
            api->snapshot_cancel(capture);
        memset(ram, 255, length); /* after T: must not be in the image */
        job->err = api->snapshot_wait(capture, &job->result);
    }
    if (job->err)
        api->last_error(job->text, sizeof job->text);
    api->snapshot_free(capture);
    if (job->use_malloc)
        free(ram);
    else
        munmap(ram, length);
    return NULL;
}

static int load(void) { return api != NULL || (api = snapengine_import()) != NULL; }

static PyObject *snapshot(PyObject *self, PyObject *args, PyObject *keywords) {
    static char *names[] = {"fd",      "pages",  "malloc",       "cancel", "method",
                            "zstd",    "pauses", "memory_limit", "newer",  "own_thread", NULL};
    struct job job = {.options = SNAPENGINE_OPTIONS_INIT, .result = SNAPENGINE_RESULT_INIT};
    /* A struct as a later header would define it, with one more field. */
    struct {
        snapengine_options options;
        uint64_t unknown;
    } newer = {.unknown = 0};
    int pauses = 0, newer_value = 0, own_thread = 1;
    unsigned long long memory_limit = 0;
    pthread_t thread;
    (void)self;
    if (!load() || !PyArg_ParseTupleAndKeywords(args, keywords, "in|ppiiiKip", names, &job.fd, &job.pages,
                                                &job.use_malloc, &job.cancel, &job.options.method,
                                                &job.options.zstd_level, &pauses, &memory_limit,
                                                &newer_value, &own_thread))
        return NULL;
    job.options.memory_limit = memory_limit;
    if (pauses) {
        job.options.pause = pauses > 0 ? count_pause : refuse_pause;
        job.options.resume = resume;
        job.options.context = &job;
    }
    if (newer_value) {
        newer.options = job.options;
        newer.options.struct_size = sizeof newer;
        newer.unknown = (uint64_t)newer_value;
        snapengine_capture *capture = api->snapshot_start(&newer, sizeof newer, job.fd, &newer.options);
        api->last_error(job.text, sizeof job.text);
        return Py_BuildValue("Os", capture ? Py_True : Py_False, job.text);
    }
    if (own_thread) {
        Py_BEGIN_ALLOW_THREADS
        if (pthread_create(&thread, NULL, save, &job) == 0)
            pthread_join(thread, NULL);
        Py_END_ALLOW_THREADS
    } else {
        save(&job); /* with the GIL: writes to protected memory must be released nevertheless */
    }
    return Py_BuildValue("{s:i,s:s,s:i,s:K,s:K,s:K,s:K,s:K}", "err", job.err, "text", job.text, "pauses",
                         job.pauses, "pages_total", job.result.pages_total, "pages_saved",
                         job.result.pages_saved, "hole_pages", job.result.hole_pages, "image_bytes",
                         job.result.image_bytes, "fault_max_ns", job.result.fault_max_ns);
}

/* A result struct of an older header: the bytes behind it must not change. */
static PyObject *short_result(PyObject *self, PyObject *args) {
    snapengine_result result;
    int fd, err;
    (void)self;
    if (!load() || !PyArg_ParseTuple(args, "i", &fd))
        return NULL;
    memset(&result, 0x5a, sizeof result);
    result.struct_size = offsetof(snapengine_result, region_bytes);
    char *ram = malloc(16 * PAGE);
    memset(ram, 1, 16 * PAGE);
    snapengine_capture *capture = api->snapshot_start(ram, 16 * PAGE, fd, NULL);
    if (capture == NULL) {
        char text[256];
        api->last_error(text, sizeof text);
        return PyErr_Format(PyExc_RuntimeError, "%s", text);
    }
    err = api->snapshot_wait(capture, &result);
    api->snapshot_free(capture);
    free(ram);
    return Py_BuildValue("iKK", err, result.image_bytes, result.region_bytes);
}

static PyObject *primitives(PyObject *self, PyObject *unused) {
    char from[PAGE] = {0}, to[PAGE];
    (void)self, (void)unused;
    if (!load())
        return NULL;
    int before = api->page_nonzero(from);
    from[PAGE - 1] = 7;
    int copied = api->copy_page(to, from);
    return Py_BuildValue("iiik", before != 0, copied != 0, memcmp(from, to, PAGE),
                         (unsigned long)api->crc32c(0, "123456789", 9));
}

static PyObject *version(PyObject *self, PyObject *unused) {
    (void)self, (void)unused;
    return load() ? PyLong_FromUnsignedLong(api->abi_version) : NULL;
}

static PyMethodDef methods[] = {
    {"version", version, METH_NOARGS, "The ABI version of the installed package."},
    {"primitives", primitives, METH_NOARGS, "Zero test before, after, memcmp of the copy, CRC."},
    {"snapshot", (PyCFunction)(void (*)(void))snapshot, METH_VARARGS | METH_KEYWORDS, "Take a snapshot."},
    {"short_result", short_result, METH_VARARGS, "errno, image_bytes, and a field that must be untouched."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {
    .m_base = PyModuleDef_HEAD_INIT, .m_name = "c_consumer", .m_size = -1, .m_methods = methods};

PyMODINIT_FUNC PyInit_c_consumer(void) { return PyModule_Create(&module); }

/* A program in C that saves its memory while one of its threads writes to it.
 *
 * It is an extension module, built by setup.py against the installed header; it links to nothing of snapengine. The writer
 * is a thread that Python has never seen: write n puts n into page n modulo the number of pages. The image must hold
 * exactly the first so many writes. */
#include <Python.h>
#include <pthread.h>
#include <snapengine/snapengine.h>
#include <stdatomic.h>
#include <sys/mman.h>

#define PAGE 4096

struct simulation {
    uint64_t *ram;
    size_t pages;
    atomic_int stop;
    _Atomic uint64_t writes;
};

static void *simulate(void *arg) {
    struct simulation *sim = arg;
    for (uint64_t n = 1; !atomic_load(&sim->stop); n++) {
        ((volatile uint64_t *)sim->ram)[n % sim->pages * (PAGE / 8)] = n; /* after T: may wait until the page is saved */
        atomic_store(&sim->writes, n);
    }
    return NULL;
}

/* Save the simulation into `fd` while it runs. Returns 0, or an errno value with `text` set. Runs without the GIL. */
static int save(const snapengine_api *api, struct simulation *sim, int fd, snapengine_result *result, char *text,
                size_t size) {
    snapengine_options options = SNAPENGINE_OPTIONS_INIT;
    options.zstd_level = 3;
    snapengine_capture *capture = api->snapshot_start(sim->ram, sim->pages * PAGE, fd, &options);
    if (capture == NULL) {
        api->last_error(text, size);
        return -1;
    }
    /* T is fixed. The writer goes on; its pages of T are being saved. */
    int err = api->snapshot_wait(capture, result);
    if (err)
        api->last_error(text, size);
    api->snapshot_free(capture);
    return err;
}

static PyObject *save_simulation(PyObject *self, PyObject *args) {
    const snapengine_api *api = snapengine_import(); /* with the GIL; NULL: an ImportError is set */
    struct simulation sim = {0};
    snapengine_result result = SNAPENGINE_RESULT_INIT;
    char text[256] = "the simulation's thread could not be started";
    pthread_t thread;
    Py_ssize_t pages;
    int fd, err = -1;
    (void)self;
    if (api == NULL || !PyArg_ParseTuple(args, "in", &fd, &pages))
        return NULL;
    if (pages < 1)
        return PyErr_Format(PyExc_ValueError, "pages: %zd is less than 1", pages);
    sim.pages = (size_t)pages;
    sim.ram = mmap(NULL, sim.pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (sim.ram == MAP_FAILED)
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    if (pthread_create(&thread, NULL, simulate, &sim) == 0) {
        err = save(api, &sim, fd, &result, text, sizeof text);
        atomic_store(&sim.stop, 1);
        pthread_join(thread, NULL);
    }
    munmap(sim.ram, sim.pages * PAGE); /* not before the capture has ended */
    Py_END_ALLOW_THREADS
    if (err)
        return PyErr_Format(PyExc_RuntimeError, "%s", text);
    return Py_BuildValue("{s:K,s:K,s:K,s:K}", "writes", (unsigned long long)atomic_load(&sim.writes), "image_bytes",
                         (unsigned long long)result.image_bytes, "faults", (unsigned long long)result.faults,
                         "fault_max_ns", (unsigned long long)result.fault_max_ns);
}

static PyMethodDef methods[] = {
    {"save_simulation", save_simulation, METH_VARARGS,
     "save_simulation(fd, pages): run a writer over so many pages, save them into fd meanwhile; the figures."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {
    .m_base = PyModuleDef_HEAD_INIT, .m_name = "embedder", .m_size = -1, .m_methods = methods};

PyMODINIT_FUNC PyInit_embedder(void) { return PyModule_Create(&module); }

/* An embedder in C: needs the installed header and the capsule, and links to nothing of ours. */
#include <Python.h>
#include <snapengine/snapengine.h>

/* The capsule's API, or NULL with ImportError: it is append-only, so a larger one is as good. */
static const snapengine_api *load(void) {
    const snapengine_api *api = PyCapsule_Import(SNAPENGINE_CAPSULE, 0);
    if (api == NULL)
        return NULL;
    if (api->abi_version != SNAPENGINE_ABI_VERSION || api->struct_size < sizeof(snapengine_api)) {
        PyErr_SetString(PyExc_ImportError, "snapengine: the C API is another version");
        return NULL;
    }
    return api;
}

static PyObject *version(PyObject *self, PyObject *unused) {
    const snapengine_api *api = load();
    (void)self, (void)unused;
    return api ? PyLong_FromUnsignedLong(api->abi_version) : NULL;
}

static PyMethodDef methods[] = {
    {"version", version, METH_NOARGS, "The ABI version of the installed package."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {
    .m_base = PyModuleDef_HEAD_INIT, .m_name = "c_consumer", .m_size = -1, .m_methods = methods};

PyMODINIT_FUNC PyInit_c_consumer(void) { return PyModule_Create(&module); }

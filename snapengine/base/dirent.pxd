# extern-only: no matching .pyx. opendir(3), readdir(3) and closedir(3).
cdef extern from "<dirent.h>" nogil:
    ctypedef struct DIR:
        pass
    struct dirent:
        char *d_name
    DIR *opendir(const char *name)
    dirent *readdir(DIR *folder)
    int closedir(DIR *folder)

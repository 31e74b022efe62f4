"""The kernel's name of the calling thread."""

from snapengine.base.pthreads cimport snap_name_thread


def name_thread(str name not None):
    """Set the name of the calling thread (PR_SET_NAME), truncated to 15 bytes."""
    snap_name_thread(name.encode())

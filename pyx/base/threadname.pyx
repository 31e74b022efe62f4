"""The calling thread's name, as the kernel has it."""

from snapengine.base.pthreads cimport snap_name_thread


def name_thread(str name not None):
    """Let `ps` and /proc show the calling thread under `name` (of its bytes the first 15)."""
    snap_name_thread(name.encode())

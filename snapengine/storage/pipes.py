"""Pipe capacity."""

from __future__ import annotations

import contextlib
import fcntl

PIPE_BYTES = 1 << 20  # default limit for unprivileged processes (fs.pipe-max-size)


def enlarge_pipe(fd: int) -> None:
    """Set the capacity of a pipe to 1 MiB instead of 64 KiB, for fewer context switches. Errors are ignored,
    also if `fd` is not a pipe: this is only an optimization."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

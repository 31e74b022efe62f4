"""How big a pipe is made."""

from __future__ import annotations

import contextlib
import fcntl

PIPE_BYTES = 1 << 20  # what an unprivileged process may set (fs.pipe-max-size)


def enlarge_pipe(fd: int) -> None:
    """A pipe of 1 MiB instead of 64 KiB: fewer switches to the other end. Not vital, so errors are ignored,
    and that `fd` may be no pipe."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

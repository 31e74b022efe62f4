"""The limit of the path of a Unix socket."""

from __future__ import annotations

import os

MAX_SOCKET_PATH_BYTES = 107  # sun_path of unix(7) less its NUL


def path_too_long(path: str | os.PathLike[str]) -> str:
    """Return the message of an error if `path` is too long for a Unix socket, or an empty string."""
    size = len(os.fsencode(path))
    if size <= MAX_SOCKET_PATH_BYTES:
        return ""
    return (
        f"{os.fspath(path)}: a socket's path has at most {MAX_SOCKET_PATH_BYTES} bytes, this one has {size}: "
        "use a shorter one"
    )

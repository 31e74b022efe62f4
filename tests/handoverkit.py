"""Helpers for tests of the hand-over: the open descriptors, and a peer that connects."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
from pathlib import Path

from waitkit import until


def open_fds() -> set[str]:
    """The open descriptors of this process with their files, so that a replaced one is noticed too."""
    result = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            result.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
    return {entry for entry in result if "/proc/" not in entry}


def fds_before() -> set[str]:
    """`open_fds()`, when those that earlier tests left to the garbage collector are closed: it runs when it
    likes, and a later comparison must not depend on that."""
    gc.collect()
    return open_fds()


def connect(path: Path) -> socket.socket:
    """Connect to the listener at that path; wait for it if there is none yet."""

    def attempt() -> socket.socket | None:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(os.fspath(path))
        except OSError:
            sock.close()
            return None
        return sock

    found: socket.socket = until(attempt, f"nobody listens at {path}")
    return found

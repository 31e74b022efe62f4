"""Shared by the tests of the hand-over: what is open, and a peer that connects."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path


def open_fds() -> set[str]:
    """What this process has open, by content, so that a swap of one for another shows too."""
    result = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            result.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
    return {entry for entry in result if "/proc/" not in entry}


def connect(path: Path) -> socket.socket:
    deadline = time.monotonic() + 10
    while True:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(os.fspath(path))
            return sock
        except OSError:
            sock.close()
            assert time.monotonic() < deadline
            time.sleep(0.001)

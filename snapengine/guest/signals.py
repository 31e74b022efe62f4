"""Signals that end a guest; the parent's death is one of them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
from types import FrameType, TracebackType
from typing import Any

PR_SET_PDEATHSIG = 1
PARENT_SIGNAL = signal.SIGUSR1
SIGNALS = (signal.SIGTERM, signal.SIGINT, PARENT_SIGNAL)


class EndSignals:
    """While entered, SIGTERM, SIGINT and the end of the parent process only set `received`.

    Main thread only. Enter it before the process announces itself, so that no signal arrives unhandled.
    """

    def __init__(self) -> None:
        self.received = False
        self._parent = os.getppid()
        self._old: dict[signal.Signals, Any] = {}

    @property
    def fd(self) -> int:
        """Becomes readable at every signal, so that select() cannot miss one."""
        return self._read.fileno()

    def drain(self) -> None:
        """Empty `fd`, so that it is no longer readable."""
        with contextlib.suppress(BlockingIOError):
            self._read.recv(4096)

    def __enter__(self) -> EndSignals:
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        _prctl(PR_SET_PDEATHSIG, PARENT_SIGNAL)
        self._on_signal(PARENT_SIGNAL, None)  # the parent may have ended before prctl()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _prctl(PR_SET_PDEATHSIG, 0)
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        self._read.close()
        self._write.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # The kernel signals the end of the *thread* that started us; ignore it while its process lives.
        if number != PARENT_SIGNAL or os.getppid() != self._parent:
            self.received = True


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, int(value), 0, 0, 0)

"""The signals that end a guest, and the end of its parent."""

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

    Main thread only. To be entered before anybody is told of the process, so that no signal finds it
    unprepared.
    """

    def __init__(self) -> None:
        self.received = False
        self._parent = os.getppid()
        self._old: dict[signal.Signals, Any] = {}

    @property
    def fd(self) -> int:
        """Becomes readable with every signal, so that a select() cannot miss one."""
        return self._read.fileno()

    def drain(self) -> None:
        """Make `fd` not readable."""
        with contextlib.suppress(BlockingIOError):
            self._read.recv(4096)

    def __enter__(self) -> EndSignals:
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._old = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        _prctl(PR_SET_PDEATHSIG, PARENT_SIGNAL)
        self._on_signal(PARENT_SIGNAL, None)  # it may have ended before
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
        # The kernel tells when the *thread* that started us ends: of no interest while its process lives.
        if number != PARENT_SIGNAL or os.getppid() != self._parent:
            self.received = True


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, int(value), 0, 0, 0)

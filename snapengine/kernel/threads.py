"""Threads of a process, as /proc shows them, and whether the process has ended."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass

from snapengine.kernel import procfs

END_SECONDS = 5.0  # a process with much memory, on a busy machine
POLL_SECONDS = 0.01
POLLS = 3
KILL_BIT = 1 << signal.SIGKILL - 1
PF_EXITING = 0x4


@dataclass(frozen=True, slots=True)
class ThreadStat:
    """Some fields of /proc/PID/task/TID/stat."""

    tid: int
    name: str
    state: str
    flags: int

    @property
    def alive(self) -> bool:
        """Whether it has neither ended nor begun to exit."""
        return self.state not in "ZXx" and not self.flags & PF_EXITING


def thread_stat(pid: int, tid: int) -> ThreadStat:
    """Raises OSError (ESRCH or ENOENT: it has ended)."""
    head, _, tail = procfs.read(f"/proc/{pid}/task/{tid}/stat").rpartition(")")
    fields = tail.split()
    return ThreadStat(tid, head.partition("(")[2], fields[0], int(fields[6]))


def ends(pid: int) -> bool:
    """Whether a process has ended or is exiting. Waits until an exit that has begun is complete.

    A killed process ends thread by thread. Until the last one has ended, it can look like a process whose
    first thread has ended, that cannot be traced, or whose files in /proc are empty.
    """
    until = time.monotonic() + END_SECONDS
    living = 0
    while ending := _threads_ending(pid):
        # A thread that has dequeued its SIGKILL, but not begun to exit, looks alive for a moment.
        living = 0 if all(ending) else living + 1
        if living == POLLS or time.monotonic() > until:
            return False
        time.sleep(POLL_SECONDS)
    return True


def _threads_ending(pid: int) -> list[bool]:
    """For each thread that has not ended yet: whether it is about to end."""
    found = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for tid in map(int, os.listdir(f"/proc/{pid}/task")):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                stat = thread_stat(pid, tid)
                pending = int(procfs.status(f"/proc/{pid}/task/{tid}/status")["SigPnd"], 16)
                if stat.state not in "ZXx":
                    found.append(not stat.alive or bool(pending & KILL_BIT))
    return found

"""The progress of a guest: its counter of written pages, read from outside every millisecond.

Run as a program, this file is the sampler itself, in a process that has no other work:
``progresskit.py PID ADDRESS`` samples until its input ends, then writes the samples to its output.
"""

import contextlib
import os
import select
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
from waitkit import PATIENCE_S

PERIOD_NS = 1_000_000
BIN_NS = 10_000_000
SAMPLE = np.dtype([("time_ns", "<u8"), ("count", "<u4")])


@dataclass(frozen=True)
class Progress:
    """`pages` written by the guest up to each of `times_ns` (CLOCK_MONOTONIC), from 0 at the first one."""

    times_ns: np.ndarray
    pages: np.ndarray

    @classmethod
    def of(cls, samples):
        """From an array of SAMPLE; the counter may have wrapped around."""
        steps = np.diff(samples["count"])  # unsigned: correct across the wrap
        pages = np.concatenate(([0], np.cumsum(steps, dtype=np.int64)))
        return cls(samples["time_ns"].astype(np.int64), pages)

    def between(self, begin_ns, end_ns):
        """The samples within that time span."""
        inside = slice(*np.searchsorted(self.times_ns, [begin_ns, end_ns]))
        return Progress(self.times_ns[inside], self.pages[inside])

    def rate(self):
        """Pages per second over the whole time span."""
        self._check()
        return float(self.pages[-1] - self.pages[0]) / ((self.times_ns[-1] - self.times_ns[0]) / 1e9)

    def bins(self, width_ns=BIN_NS):
        """Pages per second in each whole bin."""
        self._check()
        edges = np.arange(self.times_ns[0], self.times_ns[-1] + 1, width_ns)
        return np.diff(np.interp(edges, self.times_ns, self.pages)) / (width_ns / 1e9)

    def longest_gap_ns(self):
        """The longest time without progress in the samples: the true time is at most two periods longer."""
        self._check()
        moved = np.flatnonzero(np.diff(self.pages)) + 1
        first = np.concatenate(([0], moved))  # of consecutive samples with the same count
        last = np.concatenate((moved - 1, [len(self.pages) - 1]))
        return int((self.times_ns[last] - self.times_ns[first]).max())

    def longest_wait_ns(self):
        """The longest time between two samples: pauses of the guest that are shorter can go unnoticed."""
        self._check()
        return int(np.diff(self.times_ns).max())

    def _check(self):
        assert len(self.times_ns) >= 2, "too few samples"


class ProgressSampler:
    """``with ProgressSampler(machine) as sampler: ...``; then `sampler.progress`."""

    def __init__(self, machine):
        self._address = machine.ram_address + machine.progress_address
        self._pid = machine.pid
        self.progress = None

    def __enter__(self):
        command = [sys.executable, __file__, str(self._pid), str(self._address)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout.read(1) == b"+", "the sampler did not start"
        return self

    def __exit__(self, kind, error, trace):
        output, _ = self._process.communicate(timeout=PATIENCE_S)
        assert self._process.returncode == 0 or kind, "the sampler failed"
        if not kind:
            self.progress = Progress.of(np.frombuffer(output, SAMPLE))


def sample(pid, address):
    """Sample until standard input or the process ends."""
    taken = bytearray()
    with contextlib.suppress(PermissionError):  # otherwise samples are rare on busy CPUs
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    count = bytearray(4)
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        sys.stdout.buffer.write(b"+")
        sys.stdout.buffer.flush()
        due = time.monotonic_ns()
        while os.preadv(memory.fileno(), [count], address) == 4:
            now = time.monotonic_ns()
            taken += now.to_bytes(8, "little") + count
            due = max(due + PERIOD_NS, now)
            if select.select([sys.stdin], [], [], (due - now) / 1e9)[0]:
                break
    sys.stdout.buffer.write(taken)


if __name__ == "__main__":
    sample(int(sys.argv[1]), int(sys.argv[2]))

"""The sampler of a guest's progress: its arithmetic, and machines with known pauses."""

import time

import numpy as np
import pytest
from machinekit import MIB
from progresskit import SAMPLE, Progress, ProgressSampler
from sweepkit import Sweep
from waitkit import attempts

MS = 1_000_000


def samples(times_ms, counts):
    found = np.zeros(len(times_ms), SAMPLE)
    found["time_ns"] = np.array(times_ms) * MS
    found["count"] = np.array(counts, dtype=np.uint64) % (1 << 32)
    return found


def test_rate_and_bins():
    progress = Progress.of(samples(range(41), [min(i, 20) * 5 for i in range(41)]))
    assert progress.rate() == 2500
    assert progress.bins().tolist() == [5000, 5000, 0, 0]
    assert progress.between(0, 21 * MS).rate() == 5000


def test_the_counter_wraps():
    top = (1 << 32) - 3
    assert Progress.of(samples([0, 1, 2], [top, top + 2, top + 7])).pages.tolist() == [0, 2, 7]


def test_gaps():
    progress = Progress.of(samples([0, 1, 2, 3, 4, 5, 17], [0, 1, 1, 1, 1, 2, 9]))
    assert progress.longest_gap_ns() == 3 * MS
    assert progress.longest_wait_ns() == 12 * MS
    assert Progress.of(samples([0, 5], [3, 3])).longest_gap_ns() == 5 * MS


def test_too_few_samples_are_an_error():
    with pytest.raises(AssertionError, match="too few samples"):
        Progress.of(samples([0], [0])).rate()


def test_a_pause_of_the_guest_is_seen(machines, accel):
    machine = machines(Sweep(memory=16 * MIB), accel=accel).ready()
    for _ in attempts("no samples of a stopped machine"):
        with ProgressSampler(machine) as sampler:
            machine.wait_progress(1000)
            machine.qmp("stop")
            begin = time.monotonic_ns()
            time.sleep(0.1)
            end = time.monotonic_ns()
            machine.qmp("cont")
            machine.wait_progress(1000)
        progress = sampler.progress
        before, stopped = progress.between(0, begin), progress.between(begin, end)
        if len(before.pages) > 1 and len(stopped.pages) > 1 and progress.pages[-1] >= 1000:
            break
    assert before.rate() > 0
    assert stopped.pages[0] == stopped.pages[-1]
    assert progress.longest_gap_ns() >= stopped.times_ns[-1] - stopped.times_ns[0]


def test_a_machine_that_is_killed_ends_the_sampling(machines):
    for pause in attempts("no sample of the machine"):
        machine = machines(Sweep(memory=16 * MIB)).ready()
        with ProgressSampler(machine) as sampler:
            time.sleep(0.05 * (pause + 1))
            machine.kill()
        if len(sampler.progress.pages) > 2:
            break

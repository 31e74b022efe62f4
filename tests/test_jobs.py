"""Jobs of several threads: each part is done once; an error or an interrupt ends the work early."""

import _thread
import threading
import time

import pytest
from waitkit import PATIENCE_S

from snapengine.base.jobs import run_jobs


@pytest.mark.parametrize("threads", [0, 1, 2, 7])
@pytest.mark.parametrize("jobs", [0, 1, 5, 16, 1000])
def test_every_job_is_done_once(jobs, threads):
    done = []
    run_jobs(jobs, threads, lambda begin, end: done.extend(range(begin, end)))
    assert sorted(done) == list(range(jobs))


def test_the_first_error_is_raised_and_the_rest_is_left():
    done = []

    def work(begin, end):
        done.append(begin)
        raise ValueError(begin)

    with pytest.raises(ValueError, match=r"^\d+$"):
        run_jobs(1000, 2, work)
    assert 1 <= len(done) <= 2


def test_nobody_works_after_an_interrupt():
    done, gate = [], threading.Event()

    def work(begin, end):
        done.append(begin)
        if len(done) == 2:
            _thread.interrupt_main()
            gate.set()
        assert gate.wait(PATIENCE_S)
        time.sleep(0.1)

    with pytest.raises(KeyboardInterrupt):
        run_jobs(1000, 2, work)
    count = len(done)
    assert count <= 4
    time.sleep(0.05)
    assert len(done) == count

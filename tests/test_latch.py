"""Latches and crews of threads stay usable after an interrupt at any step of a wait."""

import sys
import threading

import pytest
from waitkit import PATIENCE_S, until

from snapengine.base.latch import Latch
from snapengine.base.workers import Workers


class Interrupt(KeyboardInterrupt):
    """The exception that a signal handler raises."""


def interrupted_at(step, work):
    """Call `work`, and raise at the `step`-th place where Python handles signals: where a Python function
    begins or a C function has returned. False if `work` has fewer such places."""
    left = step

    def at_event(frame, event, argument):
        nonlocal left
        if event in ("call", "c_return"):
            left -= 1
            if left == 0:
                raise Interrupt

    before = sys.getprofile()
    sys.setprofile(at_event)
    try:
        work()
    except Interrupt:
        return True
    finally:
        sys.setprofile(before)
    return False


def every_step(work):
    """``for again in every_step(work)``: `work` was interrupted, in each iteration one event later."""
    step = 1
    while interrupted_at(step, work):
        yield step
        step += 1
    assert step > 2


def in_thread(work):
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def joins(thread):
    thread.join(PATIENCE_S)
    return not thread.is_alive()


@pytest.mark.parametrize("method", ["set", "wait"])
def test_a_latch_that_is_interrupted_at_any_step_still_opens(method):
    latch = [Latch()]

    def work():
        latch[0].set() if method == "set" else latch[0].wait(0.0)

    for _ in every_step(work):
        waiters = [in_thread(latch[0].wait) for _ in range(2)]
        latch[0].set()
        assert all(map(joins, waiters))
        assert latch[0].wait(0)
        latch[0] = Latch()


def test_a_crew_that_is_waited_for_with_interrupts_at_any_step():
    workers, gate = Workers(), Latch()
    workers.start("worker", gate.wait)
    until(lambda: workers.working)
    steps = sum(1 for _ in every_step(lambda: workers.wait(0.0)))
    assert steps
    gate.set()
    assert in_time(workers.wait)


def in_time(work):
    return joins(in_thread(work))


def test_a_crew_that_is_dismissed_with_interrupts_at_any_step():
    for _ in every_step(Workers().close):
        pass
    workers = Workers()
    for _ in every_step(workers.close):
        assert in_time(workers.close)


def test_waiting():
    latch = Latch()
    assert not latch.is_set()
    assert not latch.wait(0)
    assert not latch.wait(0.01)
    threading.Timer(0.05, latch.set).start()
    assert latch.wait()
    assert latch.wait(0)
    assert latch.is_set()
    assert not Latch().wait(-1)

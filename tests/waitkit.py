"""Wait for a condition that must become true, and repeat attempts that succeed only sometimes.

On a loaded machine a thread may run seconds later than on an idle one. So a limit here says nothing about
speed: it only ends a test that hangs.
"""

import time

PATIENCE_S = 100.0


def until(condition, what="it did not happen in time", deadline_s=PATIENCE_S, period_s=0.002):
    """The first true value of `condition()`. After the deadline: AssertionError with `what` or `what()`."""
    end = time.monotonic() + deadline_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, what() if callable(what) else what
        time.sleep(period_s)


def attempts(what, deadline_s=PATIENCE_S):
    """``for n in attempts(what)``: repeats until the loop is left; AssertionError with `what` if it never is.

    For effects that depend on scheduling: leave the loop once the effect was seen.
    """
    end = time.monotonic() + deadline_s
    number = 0
    while number == 0 or time.monotonic() < end:
        yield number
        number += 1
    raise AssertionError(f"{what}, in {number} attempts")

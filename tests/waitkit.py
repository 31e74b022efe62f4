"""How long a test waits for what must come, and how it lets come what only usually comes.

A machine with other work runs a thread seconds later than an idle one. So a limit here is no claim about
speed: it only ends a test that hangs.
"""

import time

PATIENCE_S = 100.0


def until(condition, what="it did not happen in time", deadline_s=PATIENCE_S, period_s=0.002):
    """The first true value of `condition()`; AssertionError with `what` (or what it returns) in the end."""
    end = time.monotonic() + deadline_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, what() if callable(what) else what
        time.sleep(period_s)


def attempts(what, deadline_s=PATIENCE_S):
    """``for n in attempts(what)``: until the loop is left; AssertionError with `what` if it never is.

    For what depends on who gets a CPU when: the loop is left once it was seen.
    """
    end = time.monotonic() + deadline_s
    number = 0
    while number == 0 or time.monotonic() < end:
        yield number
        number += 1
    raise AssertionError(f"{what}, in {number} attempts")

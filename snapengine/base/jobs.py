"""Many small pieces of work, such as the chunks of an image, done by several threads."""

from __future__ import annotations

import os
from collections.abc import Callable

from snapengine.base.workers import Crew

JOBS_PER_THREAD = 4  # a thread takes longer to start than so many chunks to read
PIECES_PER_THREAD = 4


def run_jobs(jobs: int, threads: int, work: Callable[[int, int], None]) -> None:
    """Call ``work(begin, end)`` so that it covers [0, jobs), on `threads` threads; 0: one per usable CPU, at
    most 4, and fewer for few jobs.

    Raises what one of them raises. By then none works any more; nor does any after an interrupt.
    """
    threads = min(threads or min(4, len(os.sched_getaffinity(0)), jobs // JOBS_PER_THREAD), jobs)
    if threads <= 1:
        work(0, jobs)
        return
    step = max(1, jobs // (threads * PIECES_PER_THREAD))
    pieces = iter(range(0, jobs, step))  # the next one is taken in C: no two threads take the same
    failures: list[BaseException] = []
    over = False

    def take() -> None:
        nonlocal over
        try:
            for begin in pieces:
                if over:
                    return
                work(begin, min(begin + step, jobs))
        except BaseException as error:
            over = True
            failures.append(error)

    crew = Crew()
    try:
        for number in range(threads):
            crew.start(f"snap-job-{number}", take)
        crew.wait()
    except BaseException:
        over = True
        crew.dismiss()
        crew.wait()
        raise
    if failures:
        del failures[1:]
        raise failures.pop()  # in the list it would be in a cycle, which keeps the memory that `work` fills

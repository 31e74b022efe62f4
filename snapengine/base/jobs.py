"""Runs many small jobs, such as the chunks of an image, on several threads."""

from __future__ import annotations

import os
from collections.abc import Callable

from snapengine.base.workers import Workers

JOBS_PER_THREAD = 4  # starting a thread takes longer than reading fewer chunks
RANGES_PER_THREAD = 4


def run_jobs(jobs: int, threads: int, work: Callable[[int, int], None]) -> None:
    """Call ``work(begin, end)`` for ranges that cover [0, jobs), on `threads` threads.

    With 0 threads: one per usable CPU, at most 4, and fewer for few jobs. Raises the exception of a thread.
    When this returns or raises, also after an interrupt, no thread is working.
    """
    threads = min(threads or min(4, len(os.sched_getaffinity(0)), jobs // JOBS_PER_THREAD), jobs)
    if threads <= 1:
        work(0, jobs)
        return
    step = max(1, jobs // (threads * RANGES_PER_THREAD))
    ranges = iter(range(0, jobs, step))  # advanced in C: no two threads get the same range
    failures: list[BaseException] = []
    stopped = False

    def run_ranges() -> None:
        nonlocal stopped
        try:
            for begin in ranges:
                if stopped:
                    return
                work(begin, min(begin + step, jobs))
        except BaseException as error:
            stopped = True
            failures.append(error)

    workers = Workers()
    try:
        for number in range(threads):
            workers.start(f"snap-job-{number}", run_ranges)
        workers.wait()
    except BaseException:
        stopped = True
        workers.close()
        workers.wait()
        raise
    if failures:
        del failures[1:]
        raise failures.pop()  # popped: a reference cycle would keep the memory that `work` fills

"""One snapshot, from arming to its result: the steps, the threads, the progress and the result.

The caller's thread opens the target, allocates all resources, arms, and returns after T. A finisher thread
waits for the capture threads and the encoders, writes the end of the image and commits the sink. After any
failure the target is released first, then the sink is aborted.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, ClassVar

from snapengine.base.latch import Latch
from snapengine.base.workers import Workers
from snapengine.capture.arguments import check_before_open
from snapengine.capture.dirty_logging import DirtyLogging
from snapengine.capture.explain import explain, explain_end
from snapengine.capture.finalize import finish_image
from snapengine.capture.live import live, wait_for_cancelled
from snapengine.capture.progress import Progress, progress_of
from snapengine.capture.resources import Resources
from snapengine.capture.setup import make_engine, open_target
from snapengine.capture.write_tracking import WriteTracking
from snapengine.errors import CaptureCancelled, TimeLimitError
from snapengine.image.region_pack import numbered
from snapengine.options import WRITE_TRACKING, Options
from snapengine.result import NOT_CONVERGED, Result
from snapengine.targets.base import Target
from snapengine.targets.buffer import BufferTarget

NEW, PREPARED, FIXED, RUNNING = "new", "prepared", "fixed", "running"
STATES = {
    NEW: "is not prepared",
    PREPARED: "is prepared already, and T is not fixed",
    FIXED: "has its T already, and has not gone on",
    RUNNING: "was started already: a capture runs once",
}


def snapshot(
    target: Any,
    sink: Any,
    options: Options | None = None,
    *,
    vmstate: dict[str, bytes] | None = None,
    **fields: Any,
) -> Capture:
    """Take a live snapshot of `target` into `sink`.

    Parameters
    ----------
    target:
        A writable buffer of this process, a dict of them, or a `Target`.
    sink:
        A path, ``"file:PATH"``, ``"exec:COMMAND"``, ``"fd:N"``, ``"-"``, a writable binary file, or a
        `snapengine.storage.sinks.Sink`.
    options, fields:
        `Options`, or its fields by name.
    vmstate:
        Named blobs to keep in the image beside the memory.

    Returns
    -------
    Capture
        A context manager. Its block is entered once T is fixed, and runs while the pages are saved. Leaving
        the block waits for the image. With dirty logging the block is entered at once, and T is at the end.
        An exception in the block cancels the capture and leaves no image, unless the image is complete
        already: it is consistent and stays. `Capture.result` returns the figures in that case, and raises
        `CaptureCancelled` otherwise.

    Raises
    ------
    ValueError, TypeError
        Bad arguments.
    SnapengineError
        On entering or leaving the block: see `snapengine.errors`.
    """
    if options is not None and fields:
        raise TypeError("give options or fields, not both")
    chosen = options if options is not None else Options(**fields)
    if not isinstance(target, Target):
        target = BufferTarget(target)
    return Capture(target, sink, chosen, vmstate or {})


class Capture:
    """One capture, made by `snapshot`. It runs once.

    Use it as a context manager, or call `start` and `wait`. For several captures that share one instant, take
    the steps of `start` one by one:

    ========== ============ ======================================================================
    step       state after  what it does
    ========== ============ ======================================================================
    --         new
    `prepare`  prepared     opens the target, makes threads and buffers, protects as far as it can
    `fix`      fixed        pauses the target if it can, fixes T
    `go_on`    running      lets the target go on, begins to save; `wait` says when it is done
    ========== ============ ======================================================================

    Pause whatever writes to all of the memory, `fix` every capture, let the writers go on, and `go_on` with
    every capture: the images hold the same instant. Without a pause each has its own T, and together they may
    hold a state that never was.

    A step in another state raises RuntimeError. A step that fails, or is interrupted, ends the capture as
    `start` does: the target is released and no image is left. An error of the caller between two steps ends
    nothing: call `cancel` and `wait` then. A capture between two steps keeps its memory protected.

    Write tracking: with two-step arming `prepare` registers and protects while the target runs; with plain
    arming (below 64 MiB, or an attached process that is stopped) that is part of `fix`. A process that is
    attached to with ``cut="stop"`` is stopped from `prepare` to `go_on`. After `fix` write faults are served;
    what is copied for them waits in the buffer and the spill file until `go_on`.

    Dirty logging: `prepare` starts the rounds. `fix` waits until they have converged, takes the last one in
    the pause, and returns at T; False if they do not converge. Rounds go on until `fix` is called;
    `max_seconds` counts from `prepare`.
    """

    _session_extra: ClassVar[dict[str, Any]] = {}  # the negative controls of the tests change the arming

    def __init__(self, target: Target, sink: Any, options: Options, vmstate: dict[str, bytes]) -> None:
        self._target = target
        self._sink_spec = sink
        self._options = options
        self._vmstate = dict(vmstate)
        self._lock = threading.Lock()
        self._steps = threading.Lock()  # held by a step while it runs
        self._stepping = 0  # the thread that runs it
        self._last_step: object = None
        self._state = NEW
        self._done = Latch()
        self._begun = Latch()  # the image has its header: chunks may follow
        self._cancelled = self._given_up = False
        self._error: BaseException | None = None
        self._result: Result | None = None
        self._resources = Resources(target)
        self._engine: WriteTracking | DirtyLogging | None = None
        self._encoders = Workers()
        self._finisher = Workers()  # of one
        self._expired = False
        self._limiter = Workers()  # of one, if there is a limit of time
        self._ended = 0

    # -- what callers use --

    def __enter__(self) -> Capture:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.cancel()
            self._wait_for_end()
            return
        try:
            self.wait()
        except BaseException:
            self.cancel()
            self._wait_for_end()
            raise
        if self._error is not None:
            raise self._error

    def start(self) -> None:
        """`prepare`, `fix` and `go_on`: returns once T is fixed and the target runs. With dirty logging it
        returns once the rounds have begun; the other steps follow when they have converged."""
        self._step("start", NEW, self._start, RUNNING)

    def prepare(self) -> None:
        """Open the target, make everything, protect as far as can be before T (see `Capture`)."""
        self._step("prepare", NEW, self._prepare, PREPARED)

    def fix(self) -> bool:
        """Pause the target if it can, and fix T. False: dirty logging did not converge, there is no T; the
        capture ends by itself, with the status ``"not-converged"``."""
        return self._step("fix", PREPARED, self._fix, FIXED)

    def go_on(self) -> None:
        """Let the target go on, and begin to save. Returns then; `wait` says when the image is complete."""
        self._step("go_on", FIXED, self._go_on, RUNNING)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the image is complete or the capture has failed; False if `timeout` seconds passed."""
        # In short waits: a Ctrl-C must not wait for the end of a long capture.
        until = None if timeout is None else time.monotonic() + timeout
        self._end_if_never_started()
        while not self._done.wait(0.1 if until is None else max(0.0, min(0.1, until - time.monotonic()))):
            self._end_if_never_started()
            if until is not None and time.monotonic() >= until:
                return False
        self._wait_for_end()
        return True

    def _end_if_never_started(self) -> None:
        """A cancelled capture that has not begun a step has nothing to clean up, and no thread that would end
        it. While a step runs, that step ends it."""
        if not self._cancelled or not self._steps.acquire(blocking=False):
            return
        try:
            if self._last_step is None and not self._done.is_set():
                self._error = CaptureCancelled("the capture was cancelled")
                self._done.set()
        finally:
            self._steps.release()

    def _wait_for_end(self) -> None:
        """Wait until everything is cleaned up and no thread of the capture is left."""
        self._done.wait()
        self._finisher.wait()
        self._limiter.wait()

    def cancel(self) -> None:
        """Give up: the target is released, the sink is aborted. Returns at once; `wait` says when."""
        self._cancelled = True
        if not self._resources.opened and hasattr(self._target, "cancel"):
            self._target.cancel()  # it may be waiting for a peer
        if self._resources.attached is not None:
            self._resources.attached.cancelled()
        if self._resources.sink is not None:
            self._resources.sink.cancel()
        self._stop_engine()
        if self._resources.writer is not None:
            self._resources.writer.cancel()

    @property
    def result(self) -> Result:
        """The figures. Raises what the capture failed with; RuntimeError while it runs."""
        if not self._done.is_set():
            raise RuntimeError("the capture is not finished")
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def progress(self) -> Progress:
        """How far the capture is; may be called from any thread at any time."""
        return progress_of(self._resources, self._options, self._done.is_set(), self._ended)

    # -- the steps, on the caller's threads --

    def _step(self, name: str, before: str, work: Callable[[], bool], after: str) -> bool:
        """Do the work of a step. A signal handler may raise between any two lines. After `_last_step` is set,
        such an exception ends the capture."""
        if self._stepping == threading.get_ident():
            raise RuntimeError(f"{name}() within another step of the capture")
        this = object()
        try:
            with self._steps:
                try:
                    self._stepping = threading.get_ident()
                    self._check_order(name, before)
                    self._last_step = this
                    if self._cancelled:
                        raise CaptureCancelled("the capture was cancelled")
                    done = work()
                    self._state = after
                    return done
                except BaseException as caught:
                    if self._last_step is this:
                        self._note_failure(caught)
                    raise
                finally:
                    self._stepping = 0
        except BaseException as caught:
            if self._last_step is not this:
                raise
            other = self._undo(caught)
            if other is None:
                raise
            raise other from None

    def _check_order(self, name: str, before: str) -> None:
        if self._state != before:
            raise RuntimeError(f"{name}(): the capture {STATES[self._state]}")
        if self._done.is_set() and self._error is not None:
            raise self._error

    def _start(self) -> bool:
        self._prepare()
        assert self._engine is not None
        if isinstance(self._engine, DirtyLogging):
            self._engine.let_go()
            return True
        return self._fix() and self._go_on()

    def _prepare(self) -> bool:
        wait_for_cancelled()
        self._resources.times.began = time.monotonic_ns()
        live.add(self)
        if self._options.timeout:
            self._limiter.start("snap-timeout", self._expire)
        self._make_resources()
        self._make_engine()
        self._finisher.start("snap-finish", self._finish)
        return True

    def _make_resources(self) -> None:
        options, resources = self._options, self._resources
        check_before_open(self._target, options, self._vmstate, self._session_extra)
        pid, regions = open_target(resources, self._sink_spec, options)
        resources.times.began = time.monotonic_ns()  # without the wait for a peer
        make_engine(resources, pid, regions, options, self._session_extra)
        for number in range(options.encoders):
            self._encoders.start(f"snap-encode-{number}", self._encode, number)
        if self._cancelled and resources.session is not None:
            resources.session.fail(errno.ECANCELED)

    def _make_engine(self) -> None:
        """All is made, and nothing is registered yet."""
        if self._options.method == WRITE_TRACKING:
            self._engine = WriteTracking(self._resources, self._vmstate, self._steps)
            self._engine.prepare()
            self._raise_if_failed()  # before the target is stopped for nothing
        else:
            self._engine = DirtyLogging(self._resources, self._vmstate, self._options, self._done)
            self._begin_image()

    def _fix(self) -> bool:
        assert self._engine is not None
        if isinstance(self._engine, WriteTracking):
            self._engine.fix()
            self._raise_if_failed()
            return True
        fixed = self._engine.fix()
        if self._error is not None:
            raise self._error
        return fixed

    def _go_on(self) -> bool:
        assert self._engine is not None
        self._engine.go_on()
        if isinstance(self._engine, WriteTracking):
            self._raise_if_failed()
            self._begin_image()
            self._engine.let_go()
        return True

    def _begin_image(self) -> None:
        """Write the header. With write tracking after T: a slow sink must not keep the target stopped."""
        resources = self._resources
        assert resources.plan is not None
        assert resources.writer is not None
        resources.writer.begin(numbered(resources.plan.regions) + resources.copied)
        self._begun.set()

    def _raise_if_failed(self) -> None:
        assert self._resources.session is not None
        if self._resources.session.failure:
            assert isinstance(self._engine, WriteTracking)
            self._engine.join()
            self._raise_failure()

    def _expire(self) -> None:
        if not self._done.wait(self._options.timeout):
            self._expired = True
            self.cancel()

    # -- the encoder threads and the finisher thread --

    def _encode(self, number: int) -> None:
        assert self._resources.session is not None
        assert self._resources.encoder is not None
        self._begun.wait()
        try:
            self._resources.encoder.run(number)
        except BaseException as error:
            if self._given_up:
                return
            with self._lock:
                self._error = self._error or error
            self._resources.session.fail(getattr(error, "errno", None) or errno.EIO, b"encoder")

    def _finish(self) -> None:
        assert self._engine is not None
        try:
            status = self._engine.run()
            if not self._begun.is_set():
                self._raise_failure()  # it ended between two steps
            if status == NOT_CONVERGED:
                self._give_up()
            self._encoders.wait()
            self._raise_failure()
            self._result = finish_image(self._resources, self._options, self._vmstate, status)
        except BaseException as error:
            self._error = self._in_words(self._error or error)
            self._stop_encoders()
            self._clean_up("cancelled" if self._cancelled else "failed")
        else:
            self._clean_up(status)
        finally:
            self._ended = time.monotonic_ns()
            self._done.set()

    def _give_up(self) -> None:
        """There will be no image: discard what still waits for the sink."""
        assert self._resources.writer is not None
        self._raise_failure()
        self._given_up = True
        self._resources.writer.cancel()

    # -- failure --

    def _raise_failure(self) -> None:
        """Raise what stopped the capture, in words, if anything did."""
        assert self._resources.session is not None
        if self._cancelled:
            raise CaptureCancelled("the capture was cancelled")
        if self._error is not None:
            raise self._error
        failure = self._resources.session.failure
        if failure is not None:
            assert self._resources.plan is not None
            raise explain(*failure, self._resources.plan)

    def _in_words(self, error: BaseException) -> BaseException:
        """What stopped the capture, as its caller is told."""
        if self._expired and isinstance(error, Exception):
            return TimeLimitError(f"not done within {self._options.timeout:g} s: the target is released")
        return explain_end(error, self._resources)

    def _note_failure(self, caught: BaseException) -> None:
        """A step failed.

        An interrupt is not stored: its traceback refers to the variables of every frame that it passed. A
        stored one would keep their objects, such as an open file, until the garbage collector runs.
        """
        if isinstance(caught, Exception):
            self._error = self._error or self._in_words(caught)
        else:
            self._error = self._error or CaptureCancelled("the capture was interrupted")

    def _undo(self, caught: BaseException) -> BaseException | None:
        """A step failed: undo what all steps did. Returns what to raise instead, if anything."""
        self._note_failure(caught)  # again: an interrupt may have come before it
        error = self._in_words(caught)
        if self._finisher.close():
            if isinstance(caught, Exception):
                self._stop_engine()
            else:
                self.cancel()
            self._wait_for_end()
        else:
            self._abandon()
        return None if error is caught else error

    def _abandon(self) -> None:
        """`prepare` failed before the finisher thread had begun: undo all that it made."""
        if self._resources.session is not None:
            self._resources.session.fail(errno.ECANCELED)
        if isinstance(self._engine, WriteTracking):
            self._engine.join()  # its threads use what is closed next
        self._stop_encoders()
        try:
            self._clean_up("cancelled" if self._cancelled else "failed")
        finally:
            self._done.set()
            self._limiter.close()
            self._limiter.wait()

    def _stop_engine(self) -> None:
        """Make the engine release the target and the finisher thread clean up."""
        if self._resources.session is not None and not self._done.is_set():
            self._resources.session.fail(errno.ECANCELED)
        if self._engine is not None:
            self._engine.let_go()

    def _stop_encoders(self) -> None:
        """The capture has failed: end the threads that use the pool and the sink, which are closed next."""
        if self._resources.session is not None:
            self._resources.session.fail(errno.ECANCELED)
        if self._resources.writer is not None:
            self._resources.writer.cancel()
        self._begun.set()  # they find that the capture has failed
        self._encoders.close()
        self._encoders.wait()

    def _clean_up(self, status: str) -> None:
        live.discard(self)
        self._resources.close(status)

    # -- the end of the process, and its children (`snapengine.capture.live`) --

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled

    def drop_in_child(self) -> None:
        """In a forked child: it has none of the threads, and must not keep the userfaultfd open."""
        if self._resources.session is not None:
            self._resources.session.close_uffds()
        self._error = CaptureCancelled("the capture belongs to the parent process")
        self._done = Latch()
        self._done.set()
        self._steps = threading.Lock()
        self._stepping = 0
        self._finisher = Workers()
        self._limiter = Workers()

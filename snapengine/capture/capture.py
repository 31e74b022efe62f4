"""One snapshot, from arm to result: owns the threads, gives progress and the result.

The caller's thread opens the target, makes everything, arms, and returns at T. A finisher thread then
waits for the capture threads and the encoders, writes the end of the image and commits the sink. Whatever
fails, at any line, the target is released first and the sink is aborted.
"""

from __future__ import annotations

import atexit
import errno
import os
import threading
import time
import weakref
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar

from snapengine.base.latch import Latch
from snapengine.base.workers import Crew
from snapengine.capture.explain import explain
from snapengine.capture.finalize import Times, finish_image
from snapengine.capture.instant import to_unix_ns
from snapengine.capture.resources import Resources
from snapengine.capture.setup import make_engine, open_target
from snapengine.engine.dirtylog import DirtyLog
from snapengine.engine.tracker import Tracker
from snapengine.errors import (
    AttachError,
    CaptureCancelled,
    HandoverError,
    MachineError,
    SinkError,
    TargetGoneError,
    TimeLimitError,
    UnsupportedError,
)
from snapengine.image.region_pack import numbered
from snapengine.kernel.threads import ends
from snapengine.options import WRITE_TRACKING, Options
from snapengine.result import COMPLETED, NOT_CONVERGED, Result
from snapengine.targets.base import Target
from snapengine.targets.buffer import BufferTarget

CANCEL_SECONDS = 10.0
_live: weakref.WeakSet[Capture] = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a capture is. ``phase``: ``"arming"``, ``"saving"``, ``"writing"`` or ``"done"``."""

    phase: str
    pages_total: int
    pages_done: int
    image_bytes: int
    faults: int
    rounds: int
    seconds: float


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
        A context manager. Its block is entered once T is fixed and runs while the pages are saved; leaving
        it waits for the image. With dirty logging the block is entered at once and T lies at the end.
        A block that raises cancels the capture, and nothing of the image is left; unless the image was
        complete by then: a complete image is consistent, whatever came after T, and stays. `Capture.result`
        tells which it was: it returns the figures, or raises `CaptureCancelled`.

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
    """One capture, made by `snapshot`. Use it as a context manager, or call `start` and `wait`."""

    _session_extra: ClassVar[dict[str, Any]] = {}  # the negative control of the tests arms otherwise

    def __init__(self, target: Target, sink: Any, options: Options, vmstate: dict[str, bytes]) -> None:
        self._target = target
        self._sink_spec = sink
        self._options = options
        self._vmstate = dict(vmstate)
        self._lock = threading.Lock()
        self._done = Latch()
        self._begun = Latch()  # the image has its header: chunks may follow
        self._started = self._cancelled = self._given_up = False
        self._error: BaseException | None = None
        self._result: Result | None = None
        self._parts = Resources(target)
        self._encoders = Crew()
        self._finisher = Crew()  # of one
        self._times = Times()
        self._expired = False
        self._limiter = Crew()  # of one, if there is a limit of time
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
        """Arm; returns once T is fixed (dirty logging: once the first round runs)."""
        with self._lock:
            if self._started:
                raise RuntimeError("a capture runs once")
            self._started = True
        _wait_for_cancelled()
        self._times.began = time.monotonic_ns()
        _live.add(self)
        try:
            self._limit_time()
            self._prepare()
            assert self._parts.session is not None
            if self._options.method == WRITE_TRACKING:
                engine: Tracker | DirtyLog = self._arm()
            else:
                engine = DirtyLog(self._parts.session)
            self._begin_image()
            self._finisher.start("snap-finish", self._finish, engine)
        except BaseException as caught:
            other = self._undo_start(caught)
            if other is None:
                raise
            raise other from None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the image is complete or the capture has failed; False if `timeout` seconds passed."""
        # In short waits: a Ctrl-C must not wait for the end of a long capture.
        until = None if timeout is None else time.monotonic() + timeout
        while not self._done.wait(0.1 if until is None else max(0.0, min(0.1, until - time.monotonic()))):
            if until is not None and time.monotonic() >= until:
                return False
        self._wait_for_end()
        return True

    def _wait_for_end(self) -> None:
        """Until all is cleaned up, and no thread of the capture is left."""
        self._done.wait()
        self._finisher.wait()
        self._limiter.wait()

    def cancel(self) -> None:
        """Give up: the target is released, the sink is aborted. Returns at once; `wait` says when."""
        self._cancelled = True
        if not self._parts.opened and hasattr(self._target, "cancel"):
            self._target.cancel()  # it may be waiting for a peer
        if self._parts.attached is not None:
            self._parts.attached.hurry()
        if self._parts.sink is not None:
            self._parts.sink.cancel()
        if self._parts.session is not None and not self._done.is_set():
            self._parts.session.fail(errno.ECANCELED)
        if self._parts.writer is not None:
            self._parts.writer.cancel()

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
        session, writer = self._parts.session, self._parts.writer
        done = self._done.is_set()
        began, now = self._times.began, self._ended or time.monotonic_ns()
        seconds = (now - began) / 1e9 if began else 0.0
        if session is None:
            return Progress("done" if done else "arming", 0, 0, 0, 0, 0, seconds)
        counts = session.counters()
        pages = counts["data"] + counts["zero"] + counts["hole"] + counts["lost"]
        phase = "saving" if session.armed else "arming"
        if session.armed and pages >= session.total_pages and self._options.method == WRITE_TRACKING:
            phase = "writing"
        return Progress(
            phase="done" if done else phase,
            pages_total=session.total_pages,
            pages_done=pages,
            image_bytes=writer.image_bytes if writer is not None else 0,
            faults=counts["faults"],
            rounds=session.rounds,
            seconds=seconds,
        )

    # -- making and arming, on the caller's thread --

    def _limit_time(self) -> None:
        if self._options.timeout:
            self._limiter.start("snap-timeout", self._expire)

    def _expire(self) -> None:
        if not self._done.wait(self._options.timeout):
            self._expired = True
            self.cancel()

    def _prepare(self) -> None:
        options, parts = self._options, self._parts
        pid, regions = open_target(parts, self._sink_spec, options)
        self._times.began = time.monotonic_ns()  # without the wait for a peer
        make_engine(parts, pid, regions, options, self._session_extra)
        for number in range(options.encoders):
            self._encoders.start(f"snap-encode-{number}", self._encode, number)
        if self._cancelled and parts.session is not None:
            parts.session.fail(errno.ECANCELED)

    def _begin_image(self) -> None:
        """Not before T of write tracking: a sink that does not read must not keep a target stopped."""
        parts = self._parts
        assert parts.plan is not None
        assert parts.writer is not None
        parts.writer.begin(numbered(parts.plan.regions) + parts.copied)
        self._begun.set()

    def _arm(self) -> Tracker:
        assert self._parts.session is not None
        tracker = self._parts.tracker = Tracker(self._parts.session)
        tracker.start()
        self._raise_if_failed(tracker)  # before the target is stopped for nothing
        stopped = time.monotonic_ns()
        paused = False
        try:
            if self._target.can_pause:
                paused = True
                self._target.pause()
            self._vmstate.update(self._target.vmstate())
            tracker.arm(hold=paused)
        finally:
            if paused:
                self._target.resume()
                self._times.stop = time.monotonic_ns() - stopped
        tracker.walk()
        self._times.t_unix = to_unix_ns(self._parts.session.t_ns)
        self._raise_if_failed(tracker)
        if self._parts.attached:
            self._parts.attached.armed()
            self._times.stop = self._parts.attached.stop_ns
        return tracker

    def _raise_if_failed(self, tracker: Tracker) -> None:
        assert self._parts.session is not None
        if self._parts.session.failure:
            tracker.join()
            self._raise_failure()

    # -- the finisher thread --

    def _encode(self, number: int) -> None:
        assert self._parts.session is not None
        assert self._parts.encoder is not None
        self._begun.wait()
        try:
            self._parts.encoder.run(number)
        except BaseException as error:
            if self._given_up:
                return
            with self._lock:
                self._error = self._error or error
            self._parts.session.fail(getattr(error, "errno", None) or errno.EIO, b"encoder")

    def _finish(self, engine: Tracker | DirtyLog) -> None:
        assert self._parts.session is not None
        status = COMPLETED
        try:
            if isinstance(engine, DirtyLog):
                status = self._log_rounds(engine)
                if status == NOT_CONVERGED:
                    self._give_up()
            else:
                engine.join()
            self._encoders.wait()
            self._raise_failure()
            self._result = finish_image(
                self._parts, self._options, self._vmstate, status, self._times
            )
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
        """There will be no image: what waits for a slow sink need not reach it."""
        assert self._parts.writer is not None
        self._raise_failure()
        self._given_up = True
        self._parts.writer.cancel()

    def _log_rounds(self, engine: DirtyLog) -> str:
        options = self._options
        try:
            self._times.stop, blobs = engine.run(
                self._target, options.downtime_limit, options.max_rounds, options.max_seconds
            )
        finally:
            engine.release()
        self._times.t_unix = to_unix_ns(engine.session.t_ns)
        self._vmstate.update(blobs or {})
        return COMPLETED if blobs is not None else NOT_CONVERGED

    # -- failure --

    def _raise_failure(self) -> None:
        """Raise what stopped the capture, in words, if anything did."""
        assert self._parts.session is not None
        if self._cancelled:
            raise CaptureCancelled("the capture was cancelled")
        if self._error is not None:
            raise self._error
        failure = self._parts.session.failure
        if failure is not None:
            assert self._parts.plan is not None
            raise explain(*failure, self._parts.plan)

    def _in_words(self, error: BaseException) -> BaseException:
        """What stopped the capture, as its caller is told."""
        if self._expired and isinstance(error, Exception):
            return TimeLimitError(f"not done within {self._options.timeout:g} s: the target is released")
        # A target in another process may end between any two looks at it, whatever that looks like then.
        pid = int(getattr(self._target, "pid", 0))
        ours = isinstance(error, TargetGoneError | SinkError | UnsupportedError)
        if not pid or ours or not isinstance(error, OSError | HandoverError | MachineError):
            return error
        attached = self._parts.attached
        never_there = isinstance(error, AttachError) and error.errno == errno.ESRCH
        if self._parts.sink is None or (never_there and (attached is None or not attached.found)):
            return error
        if not ends(pid):
            return error
        return TargetGoneError(errno.ESRCH, f"the target process {pid} ended during the capture")

    def _undo_start(self, caught: BaseException) -> BaseException | None:
        """start() failed. Returns what to raise instead, if anything.

        An interrupt is neither kept nor named by whoever it is raised through: its traceback has their
        variables, and together they would keep what those held, such as a file in the middle of being read,
        until the garbage collector runs.
        """
        error = self._in_words(caught)
        if self._finisher.dismiss():
            self.cancel()  # interrupted after it had begun: it cleans up
            self._wait_for_end()
        elif isinstance(error, Exception):
            self._abandon(error)
        else:
            self._abandon(CaptureCancelled("the capture was interrupted"))
        return None if error is caught else error

    def _abandon(self, error: Exception) -> None:
        """start() failed: undo all that it made."""
        if self._parts.session is not None:
            self._parts.session.fail(errno.ECANCELED)
        if self._parts.tracker is not None:
            self._parts.tracker.join()  # before anything that its threads use is closed
        self._stop_encoders()
        self._error = self._error or error
        try:
            self._clean_up("cancelled" if self._cancelled else "failed")
        finally:
            self._done.set()
            self._limiter.dismiss()
            self._limiter.wait()

    def _stop_encoders(self) -> None:
        """The capture has failed: wait for the threads that use the pool and the sink, closed next."""
        if self._parts.session is not None:
            self._parts.session.fail(errno.ECANCELED)
        if self._parts.writer is not None:
            self._parts.writer.cancel()
        self._begun.set()  # they find that the capture has failed
        self._encoders.dismiss()
        self._encoders.wait()

    def _clean_up(self, status: str) -> None:
        _live.discard(self)
        self._parts.close(status)


def _wait_for_cancelled() -> None:
    """A capture that was cancelled a moment ago may still have its memory registered; it lets go at once."""
    for capture in list(_live):
        if capture._cancelled:
            capture._done.wait(CANCEL_SECONDS)


def _cancel_all() -> None:
    """At interpreter exit: the threads are daemons, so that this runs before anybody waits for them."""
    for capture in list(_live):
        capture.cancel()
        capture.wait(10)


def _drop_in_child() -> None:
    """A forked child must not keep the parent's userfaultfd open: the kernel releases a target when the last
    copy is closed, and that must be when the parent dies. The child has no capture threads to wait for."""
    for capture in list(_live):
        if capture._parts.session is not None:
            capture._parts.session.close_uffds()
        capture._error = CaptureCancelled("the capture belongs to the parent process")
        capture._done = Latch()
        capture._done.set()
        capture._finisher = Crew()
        capture._limiter = Crew()
    _live.clear()


atexit.register(_cancel_all)
os.register_at_fork(after_in_child=_drop_in_child)

"""Write tracking in three steps: protect, fix T, let the target go on."""

from __future__ import annotations

import errno
import threading
import time

from snapengine.base.latch import Latch
from snapengine.capture.instant import to_unix_ns
from snapengine.capture.resources import Resources
from snapengine.engine.tracker import Tracker
from snapengine.result import COMPLETED


class WriteTracking:
    """The engine of one capture. `prepare`, `fix` and `go_on` run on the caller's threads, one at a time,
    with `steps` held; `run` runs on the finisher thread, and ends it."""

    def __init__(self, resources: Resources, vmstate: dict[str, bytes], steps: threading.Lock) -> None:
        assert resources.session is not None
        self._resources = resources
        self._target = resources.target
        self._vmstate = vmstate
        self._steps = steps
        self._session = resources.session
        self._tracker = Tracker(resources.session)
        self._proceed = Latch()  # `go_on` is done, or there will be none
        self._paused_at = 0

    def prepare(self) -> None:
        """Make the threads; with two-step arming, register and protect all."""
        self._tracker.start()

    def fix(self) -> None:
        """Pause the target if it can, and fix T. Faults are served from then on; the walk waits."""
        if self._target.can_pause:
            self._paused_at = time.monotonic_ns()
            self._target.pause()
        self._vmstate.update(self._target.vmstate())
        self._tracker.arm(hold=True)

    def go_on(self) -> None:
        """Let the target go on, and the walk begin."""
        self._resume()
        self._tracker.walk()
        resources = self._resources
        resources.times.t_unix = to_unix_ns(self._session.t_ns)
        if resources.attached and not self._session.failure:
            resources.attached.armed()
            resources.times.stop = resources.attached.stop_ns

    def join(self) -> None:
        """Wait until the engine has released the target and its threads have ended. Idempotent."""
        self._tracker.join()

    def run(self) -> str:
        """Wait until all pages are saved and the target is released, or the capture has failed."""
        self._proceed.wait()
        try:
            with self._steps:  # a step that is running still uses the target
                self._resume()
        except BaseException:
            # The target has ended, or could not be resumed. What the threads use is freed next, so they end
            # first. They must not wait for room: no encoder takes anything before the image has begun.
            self._session.fail(errno.ECANCELED)
            self.join()
            raise
        self.join()
        return COMPLETED

    def let_go(self) -> None:
        """Have `run` end: all steps are done, or none will follow. Any thread."""
        self._proceed.set()

    def _resume(self) -> None:
        """Once; again only if it was interrupted before it had returned."""
        if not self._paused_at:
            return
        try:
            self._target.resume()
        except Exception:
            self._paused_at = 0
            raise
        self._resources.times.stop, self._paused_at = time.monotonic_ns() - self._paused_at, 0

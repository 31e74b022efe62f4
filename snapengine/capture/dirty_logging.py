"""Dirty logging in three steps: rounds, the last round and T, the end of the pause."""

from __future__ import annotations

from snapengine.base.latch import Latch
from snapengine.capture.instant import to_unix_ns
from snapengine.capture.resources import Resources
from snapengine.engine.dirtylog import DirtyLog
from snapengine.options import Options
from snapengine.result import COMPLETED, NOT_CONVERGED

LOOK_SECONDS = 0.1


class DirtyLogging:
    """The engine of one capture. `run` runs on the finisher thread and does the work; the steps, on the
    caller's threads, tell it how far it may go. To `DirtyLog` it is the target, whose pause lasts until
    `go_on`."""

    def __init__(
        self, resources: Resources, vmstate: dict[str, bytes], options: Options, done: Latch
    ) -> None:
        """`done`: set when `run` has ended and all is cleaned up."""
        assert resources.session is not None
        self._resources = resources
        self._target = resources.target
        self._vmstate = vmstate
        self._options = options
        self._session = resources.session
        self._log = DirtyLog(resources.session)
        self._done = done
        self._wanted = Latch()  # the last round may come
        self._proceed = Latch()  # the target may go on
        self._fixed = Latch()
        self._resumed = Latch()

    # -- steps --

    def fix(self) -> bool:
        """Wait for T, which comes as soon as the rounds have converged. False: they did not converge."""
        self._wanted.set()
        while not self._fixed.wait(LOOK_SECONDS) and not self._done.is_set():
            pass
        return self._fixed.is_set()

    def go_on(self) -> None:
        """Let the target go on; returns when it does."""
        self._proceed.set()
        while not self._resumed.wait(LOOK_SECONDS) and not self._done.is_set():
            pass

    def let_go(self) -> None:
        """Have `run` wait for no step. Any thread."""
        self._wanted.set()
        self._proceed.set()

    # -- the finisher thread --

    def run(self) -> str:
        """All rounds; the target is released at the end."""
        options, times = self._options, self._resources.times
        try:
            times.stop, blobs = self._log.run(
                self, options.downtime_limit, options.max_rounds, options.max_seconds, self._wanted
            )
        finally:
            self._log.release()
        times.t_unix = to_unix_ns(self._session.t_ns)
        self._vmstate.update(blobs or {})
        return COMPLETED if blobs is not None else NOT_CONVERGED

    # -- what `DirtyLog` asks of a target --

    def pause(self) -> None:
        """As `Target.pause`."""
        self._target.pause()

    def vmstate(self) -> dict[str, bytes]:
        """As `Target.vmstate`; T is fixed."""
        blobs = self._target.vmstate()
        self._fixed.set()
        return blobs

    def resume(self) -> None:
        """As `Target.resume`, but after T not before `go_on`."""
        if self._fixed.is_set():
            self._proceed.wait()
        self._target.resume()
        self._resumed.set()

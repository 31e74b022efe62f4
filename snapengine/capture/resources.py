"""The resources of one capture, and the one place that frees them."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field

from snapengine.capture.region_plan import Plan
from snapengine.engine.session import Session
from snapengine.image.writer import Writer
from snapengine.kernel.uffd import Uffd
from snapengine.pipeline.encoder import Encoder
from snapengine.regions import Region
from snapengine.storage.sinks import Sink
from snapengine.targets.base import AttachedTarget, Target


@dataclass(slots=True)
class Times:
    """When things happened, in nanoseconds; 0: not yet, or never."""

    began: int = 0
    """The start of the capture, by CLOCK_MONOTONIC."""
    stop: int = 0
    """How long the target was paused."""
    t_unix: int = 0
    """T, by CLOCK_REALTIME."""


@dataclass(slots=True)
class Resources:
    """What one capture holds, in the order in which it is made; None: not yet."""

    target: Target
    sink: Sink | None = None
    opened: bool = False
    """Whether `target` was opened."""
    fd: int = -1
    """The target's userfaultfd, until `uffd` has it."""
    uffd: Uffd | None = None
    pidfd: int = -1
    plan: Plan | None = None
    session: Session | None = None
    writer: Writer | None = None
    copied: list[tuple[Region, int]] = field(default_factory=list)
    """Regions that the engine does not see, and their first pages."""
    encoder: Encoder | None = None
    warnings: list[str] = field(default_factory=list)
    times: Times = field(default_factory=Times)

    @property
    def attached(self) -> AttachedTarget | None:
        """The target, if it is another process that was attached to."""
        return self.target if isinstance(self.target, AttachedTarget) else None

    def close(self, status: str) -> None:
        """Free everything, even if a step fails. Only after the threads that use them have ended."""
        self.encoder = None  # frees its buffers; the session frees the pool's
        with contextlib.ExitStack() as stack:
            if self.sink is not None:
                stack.callback(self.sink.abort)
            if self.opened:
                stack.callback(self.target.close, status)
            if self.plan is not None:
                stack.callback(self.plan.close)
            if self.uffd is not None:
                stack.callback(self.uffd.close)
            if self.session is not None:
                stack.callback(self.session.close)
            if self.fd >= 0:
                stack.callback(os.close, self.fd)
                self.fd = -1
            if self.pidfd >= 0:
                stack.callback(os.close, self.pidfd)
                self.pidfd = -1

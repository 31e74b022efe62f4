"""What a capture requires of a target, and the base class of targets that are attached to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from snapengine.kernel.procmaps import Mapping
from snapengine.regions import Region
from snapengine.result import NotCaptured

if TYPE_CHECKING:
    from snapengine.kernel.uffd import Uffd

__all__ = ["AttachedTarget", "Copied", "Target"]


@runtime_checkable
class Target(Protocol):
    """The interface between a capture and the owner of the memory.

    A capture calls `open` once, then `pause`, `vmstate` and `resume` around T where `can_pause` is
    true (`vmstate` alone otherwise), and `close` exactly once at the end, also after an error.
    """

    can_pause: bool

    def open(self, features: int) -> tuple[int, int, list[Region]]:
        """Return ``(pid, uffd, regions)``.

        ``pid`` is 0 for this process. ``uffd`` is a userfaultfd descriptor of the target, or -1: the capture
        opens one (only for this process). ``features``: the UFFD_FEATURE bits that the capture wants.
        """

    def pause(self) -> None:
        """Stop every writer of the memory. Returns when they are stopped."""

    def resume(self) -> None:
        """Resume the writers."""

    def vmstate(self) -> dict[str, bytes]:
        """Named blobs that belong to T."""

    def close(self, status: str) -> None:
        """The capture is over: ``"completed"``, ``"not-converged"``, ``"cancelled"`` or ``"failed"``."""


@dataclass(slots=True)
class Copied:
    """The content of a copied region: runs of (first page, bytes), in any order, and pages that could not be
    read. All other pages are holes."""

    runs: list[tuple[int, bytes]] = field(default_factory=list)
    unreadable: list[int] = field(default_factory=list)


class AttachedTarget(ABC):
    """A process that does not cooperate, and is attached to. Besides `Target`, the members by which a capture
    learns what a cooperating target would announce.

    ``cut``, ``injection_ns``, ``stop_parts_ns``, ``warnings`` and ``not_captured`` are as in `Result`.
    """

    can_pause = True
    cut = "stop"
    found = True
    """Whether the process existed when the target was made."""
    stops_first = False
    """Whether its threads are stopped before its memory is listed, and until T."""
    is_stopped = False
    """Whether everything that could change its mappings is stopped now."""

    def __init__(self, pid: int, copy_limit: int | None = None) -> None:
        self.pid = pid
        self.copy_limit = copy_limit
        self.injection_ns = 0
        self.stop_parts_ns: dict[str, int] = {}
        self.warnings: list[str] = []
        self.not_captured: list[NotCaptured] = []
        self.events: frozenset[str] = frozenset()
        """The userfaultfd features (``EVENT_...``, without forks) that report changes of its mappings."""
        self.copied_regions: list[Region] = []
        """Regions that are copied during a stop instead of tracked: see `copied_bytes`."""
        self._copied: list[Copied | None] = []

    @abstractmethod
    def check(self) -> None:
        """Before `open`: raise AttachError or TargetGoneError if the process cannot be attached to."""

    def look_ahead(self) -> list[Region] | None:
        """Before `open`: the regions that would be tracked now, if planning ahead for them is worthwhile."""
        return None

    @property
    def mappings(self) -> list[Mapping] | None:
        """Its mappings at the time of `open`; None: not read."""
        return None

    @abstractmethod
    def open(self, features: int) -> tuple[int, int, list[Region]]:
        """As `Target.open`."""

    @abstractmethod
    def registered(self, uffd: Uffd) -> list[Region]:
        """The regions to track with the negotiated `uffd`, without those that the kernel refuses. They may be
        registered already."""

    @abstractmethod
    def pause(self) -> None:
        """As `Target.pause`."""

    @abstractmethod
    def resume(self) -> None:
        """As `Target.resume`."""

    @abstractmethod
    def vmstate(self) -> dict[str, bytes]:
        """As `Target.vmstate`."""

    @abstractmethod
    def close(self, status: str) -> None:
        """As `Target.close`."""

    def cancelled(self) -> None:
        """The capture is cancelled: skip every wait that can be skipped."""
        return

    @property
    def stop_ns(self) -> int:
        """How long all threads were stopped, in nanoseconds."""
        return 0

    def armed(self) -> None:
        """T is fixed, and the target runs. Write tracking only."""
        return

    def late_warnings(self) -> list[str]:
        """Changes after T that the image may miss unnoticed; called when all pages are saved."""
        return []

    def record(self) -> dict[str, bytes]:
        """Blobs that describe the target at T; called when all pages are saved."""
        return {}

    def copied_bytes(self, number: int) -> Copied | None:
        """The content of ``copied_regions[number]`` at T; None if it could not be read."""
        return self._copied[number]

"""Whose memory a capture saves: the parts that every target has in common."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from snapengine.base.buffers import HeldBuffer
from snapengine.kernel.backing import Backings
from snapengine.kernel.procmaps import Mapping, covering, read_maps
from snapengine.region import Region

if TYPE_CHECKING:
    from snapengine.kernel.uffd import Uffd
    from snapengine.process.copied import Copied
    from snapengine.process.record import NotCaptured

PAGE_BYTES = 4096
__all__ = ["KINDS", "PAGE_BYTES", "AttachedTarget", "BufferTarget", "Region", "Target"]

KINDS = ("anon", "shared", "hugetlb", "hugetlb-shared")


@runtime_checkable
class Target(Protocol):
    """What a capture asks of a target.

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
        """Stop every writer of the memory. Returns when they stand."""

    def resume(self) -> None:
        """Let the writers go on."""

    def vmstate(self) -> dict[str, bytes]:
        """Named blobs that belong to T."""

    def close(self, status: str) -> None:
        """The capture is over: ``"completed"``, ``"not-converged"``, ``"cancelled"`` or ``"failed"``."""


@runtime_checkable
class AttachedTarget(Target, Protocol):
    """A target that knows nothing of us: what is left to ask of it, since it cannot say it itself.

    ``cut``, ``injection_ns``, ``stop_ns``, ``stop_parts_ns``, ``warnings`` and ``not_captured`` are as in
    `Result`.
    ``frozen_regions`` are copied while the target stands, beside the engine. ``events``: names of the
    userfaultfd features that tell what it does to its mappings.
    """

    pid: int
    cut: str
    injection_ns: int
    stop_parts_ns: dict[str, int]
    warnings: list[str]
    events: frozenset[str]
    copy_limit: int | None
    not_captured: list[NotCaptured]
    frozen_regions: list[Region]

    @property
    def stop_ns(self) -> int:
        """How long all threads stood."""

    def check(self) -> None:
        """Before `open`: raise AttachError or TargetGoneError for what cannot be attached to."""

    def registered(self, uffd: Uffd) -> list[Region]:
        """The regions that are to be tracked with `uffd`, which is negotiated; what the kernel refuses is
        left out. They may be registered already."""

    def late_warnings(self) -> list[str]:
        """What it did after T that the image may lack unseen; asked for when all pages are saved."""

    def armed(self) -> None:
        """T is fixed, and the target runs. Write tracking only."""

    def record(self) -> dict[str, bytes]:
        """Blobs that describe the target at T; asked for when all pages are saved."""

    def frozen_bytes(self, number: int) -> Copied | None:
        """What ``frozen_regions[number]`` held at T; None if it could not be read."""


class BufferTarget:
    """Writable buffers of this process: bytearray, mmap, numpy array, shared memory, CPU tensor.

    Parameters
    ----------
    buffers:
        One C-contiguous writable buffer, or a dict of name → buffer. They need not be page-aligned; the image
        holds exactly their bytes. They must not overlap. The target keeps them alive and unresized; what
        their owner frees, unmaps or cuts short all the same before it was saved is lost (`Result.lost_runs`).
    pause, resume:
        Callables that stop and restart everything that writes to the buffers. Dirty logging needs them; write
        tracking calls them around T if given.
    vmstate:
        A callable that returns named blobs (name → bytes); called at T.

    Raises
    ------
    TypeError
        An object offers neither the buffer protocol nor a CPU tensor's ``data_ptr``, or holds Python objects.
    ValueError
        A buffer is empty, read-only or not C-contiguous, or only one of pause and resume is given.

    Memory that other processes map too (a shared memory file) is tracked in this process and its forked
    children only: what others write there after T goes unseen.
    """

    def __init__(
        self,
        buffers: Any,
        *,
        pause: Callable[[], None] | None = None,
        resume: Callable[[], None] | None = None,
        vmstate: Callable[[], dict[str, bytes]] | None = None,
    ) -> None:
        if (pause is None) != (resume is None):
            raise ValueError("pause and resume go together")
        named = buffers if isinstance(buffers, dict) else {"buffer": buffers}
        if not named:
            raise ValueError("no buffers")
        self._held = {
            str(name): HeldBuffer(str(name), buffer, "nothing can change it, save it as it is")
            for name, buffer in named.items()
        }
        self._pause, self._resume, self._vmstate = pause, resume, vmstate
        self.can_pause = pause is not None

    def open(self, features: int) -> tuple[int, int, list[Region]]:
        """The buffers as regions of this process; the capture opens the userfaultfd."""
        for held in self._held.values():
            held.check()
        mappings = read_maps("self")
        backings = Backings()
        return 0, -1, [_region_of(held, mappings, backings) for held in self._held.values()]

    def pause(self) -> None:
        """Call the caller's `pause`."""
        if self._pause:
            self._pause()

    def resume(self) -> None:
        """Call the caller's `resume`."""
        if self._resume:
            self._resume()

    def vmstate(self) -> dict[str, bytes]:
        """What the caller's `vmstate` returns, or nothing."""
        return self._vmstate() if self._vmstate else {}

    def close(self, status: str) -> None:
        """Let go of the buffers. Idempotent."""
        for held in self._held.values():
            held.release()


def _region_of(held: HeldBuffer, mappings: list[Mapping], backings: Backings) -> Region:
    """The buffer as a region. `mappings`: all of this process, by address."""
    end = held.addr + held.length
    first = bisect.bisect_right(mappings, held.addr, key=lambda mapping: mapping.end)
    last = bisect.bisect_left(mappings, end, key=lambda mapping: mapping.start)
    covered = covering(mappings[first:last], held.addr, end)
    found = [backings.of(mapping) for mapping in covered]
    sizes = {backing.page_bytes for backing in found} or {PAGE_BYTES}
    zeros = {m.inode for m, b in zip(covered, found, strict=True) if b.kind == "anonymous"} - {0}
    shared = {mapping.shared for mapping in covered}
    if len(sizes) > 1 or len(shared) > 1:
        raise ValueError(f"buffer {held.name!r} spans mappings of different kinds")
    size = sizes.pop()
    kind = "hugetlb" if size > PAGE_BYTES else "anon"
    if True in shared:
        kind = "hugetlb-shared" if size > PAGE_BYTES else "shared"
    return Region(held.name, held.addr, held.length, size, kind, zero_inode=max(zeros, default=0))

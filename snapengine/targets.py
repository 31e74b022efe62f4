"""Whose memory a capture saves: the parts that every target has in common."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from snapengine.maps import covering, page_size_of, read_maps

if TYPE_CHECKING:
    from snapengine.processrecord import NotCaptured

PAGE_BYTES = 4096
KINDS = ("anon", "shared", "hugetlb", "hugetlb-shared")


@dataclass(frozen=True, slots=True)
class Region:
    """One run of tracked memory.

    ``addr`` and ``length`` are bytes in the target's address space; a region of this process's own
    buffers may begin and end inside a page. ``page_size`` is the size of the mapping's pages (4096, or
    the hugetlb page size). ``kind`` is one of `KINDS`. ``memfd`` is a descriptor of the memory that
    this process holds, or -1; ``memfd_offset`` is where the region begins in it.
    """

    name: str
    addr: int
    length: int
    page_size: int = PAGE_BYTES
    kind: str = "anon"
    memfd: int = -1
    memfd_offset: int = 0


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
    not_captured: list[NotCaptured]
    frozen_regions: list[Region]

    @property
    def stop_ns(self) -> int:
        """How long all threads stood."""

    def check(self) -> None:
        """Before `open`: raise AttachError or TargetGoneError for what cannot be attached to."""

    def late_warnings(self) -> list[str]:
        """What it did after T that the image may lack unseen; asked for when all pages are saved."""

    def armed(self) -> None:
        """T is fixed, and the target runs. Write tracking only."""

    def record(self) -> dict[str, bytes]:
        """Blobs that describe the target at T; asked for when all pages are saved."""

    def frozen_bytes(self, number: int) -> bytes | None:
        """What ``frozen_regions[number]`` held at T; None if it could not be read."""


class BufferTarget:
    """Writable buffers of this process: bytearray, mmap, numpy array, shared memory, CPU tensor.

    Parameters
    ----------
    buffers:
        One C-contiguous writable buffer, or a dict of name → buffer. They need not be page-aligned; the image
        holds exactly their bytes. They must not overlap. The target keeps them alive and unresized.
    pause, resume:
        Callables that stop and restart everything that writes to the buffers. Dirty logging needs them; write
        tracking calls them around T if given.
    vmstate:
        A callable that returns named blobs (name → bytes); called at T.

    Raises
    ------
    TypeError
        An object offers neither the buffer protocol nor a CPU tensor's ``data_ptr``.
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
        self._held = {str(name): _Held(str(name), buffer) for name, buffer in named.items()}
        self._pause, self._resume, self._vmstate = pause, resume, vmstate
        self.can_pause = pause is not None

    def open(self, features: int) -> tuple[int, int, list[Region]]:
        """The buffers as regions of this process; the capture opens the userfaultfd."""
        return 0, -1, [held.region() for held in self._held.values()]

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


class _Held:
    """One buffer, kept exported (so that it cannot be resized or freed), and its address."""

    def __init__(self, name: str, buffer: Any) -> None:
        self.name = name
        self._export: Any = None
        try:
            view = memoryview(buffer)
        except TypeError:
            self.addr, self.length = _tensor_address(name, buffer)
            self._export = buffer
        else:
            self.addr, self.length = self._hold(view)
        if self.length == 0:
            raise ValueError(f"buffer {name!r} is empty")

    def _hold(self, view: memoryview) -> tuple[int, int]:
        if view.readonly:
            raise ValueError(f"buffer {self.name!r} is read-only: nothing can change it, save it as it is")
        if not view.c_contiguous:
            raise ValueError(f"buffer {self.name!r} is not C-contiguous")
        if view.nbytes == 0:
            return 0, 0
        self._export = (ctypes.c_char * view.nbytes).from_buffer(view)
        return ctypes.addressof(self._export), view.nbytes

    def region(self) -> Region:
        end = self.addr + self.length
        covered = covering(read_maps("self", self.addr, end), self.addr, end)
        sizes = {page_size_of(mapping) for mapping in covered} or {PAGE_BYTES}
        shared = {mapping.shared for mapping in covered}
        if len(sizes) > 1 or len(shared) > 1:
            raise ValueError(f"buffer {self.name!r} spans mappings of different kinds")
        size = sizes.pop()
        kind = "hugetlb" if size > PAGE_BYTES else "anon"
        if True in shared:
            kind = "hugetlb-shared" if size > PAGE_BYTES else "shared"
        return Region(self.name, self.addr, self.length, size, kind)

    def release(self) -> None:
        self._export = None


def _tensor_address(name: str, tensor: Any) -> tuple[int, int]:
    """Address and bytes of a CPU tensor (PyTorch's interface), which has no buffer protocol."""
    try:
        device, addr = str(tensor.device), int(tensor.data_ptr())
        length = int(tensor.numel()) * int(tensor.element_size())
        contiguous = bool(tensor.is_contiguous())
    except AttributeError:
        raise TypeError(f"{name!r}: {type(tensor).__name__} is neither a buffer nor a tensor") from None
    if device != "cpu":
        raise ValueError(f"tensor {name!r} is on {device}, not in this machine's memory")
    if not contiguous:
        raise ValueError(f"tensor {name!r} is not contiguous")
    return addr, length

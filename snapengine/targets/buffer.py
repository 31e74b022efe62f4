"""Buffers of this process as a target."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any

from snapengine.base.buffers import ExportedBuffer
from snapengine.kernel.backing import Backings
from snapengine.kernel.procmaps import Mapping, covering, read_maps
from snapengine.regions import PAGE_BYTES, Region, kind_of


class BufferTarget:
    """Writable buffers of this process: bytearray, mmap, numpy array, shared memory, CPU tensor.

    Parameters
    ----------
    buffers:
        One C-contiguous writable buffer, or a dict of name → buffer. They need not be page-aligned; the image
        holds exactly their bytes. They must not overlap. The target keeps them alive and prevents resizing.
        Memory that their owner nevertheless frees, unmaps or truncates before it was saved is lost
        (`Result.lost_runs`).
    pause, resume:
        Callables that stop and restart everything that writes to the buffers. Dirty logging needs them; write
        tracking calls them around T if given.
    vmstate:
        A callable that returns named blobs (name → bytes); called at T.

    Raises
    ------
    TypeError
        An object has neither the buffer protocol nor a CPU tensor's ``data_ptr``, or contains Python objects.
    ValueError
        A buffer is empty, read-only or not C-contiguous, or only one of pause and resume is given.

    Memory that other processes map too (a shared memory file) is tracked in this process and its forked
    children only: writes by other processes after T are not seen.
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
            str(name): ExportedBuffer(str(name), buffer, "nothing can change it, save it as it is")
            for name, buffer in named.items()
        }
        self._pause, self._resume, self._vmstate = pause, resume, vmstate
        self.can_pause = pause is not None

    def open(self, features: int) -> tuple[int, int, list[Region]]:
        """The buffers as regions of this process; the capture opens the userfaultfd."""
        for exported in self._held.values():
            exported.check()
        mappings = read_maps("self")
        backings = Backings()
        return 0, -1, [_region_of(exported, mappings, backings) for exported in self._held.values()]

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
        """Release the buffers. Idempotent."""
        for exported in self._held.values():
            exported.release()


def _region_of(exported: ExportedBuffer, mappings: list[Mapping], backings: Backings) -> Region:
    """The buffer as a region. `mappings`: all mappings of this process, by address."""
    end = exported.addr + exported.length
    first = bisect.bisect_right(mappings, exported.addr, key=lambda mapping: mapping.end)
    last = bisect.bisect_left(mappings, end, key=lambda mapping: mapping.start)
    covered = covering(mappings[first:last], exported.addr, end)
    found = [backings.of(mapping) for mapping in covered]
    sizes = {backing.page_bytes for backing in found} or {PAGE_BYTES}
    zeros = {m.inode for m, b in zip(covered, found, strict=True) if b.kind == "anonymous"} - {0}
    shared = {mapping.shared for mapping in covered}
    if len(sizes) > 1 or len(shared) > 1:
        raise ValueError(f"buffer {exported.name!r} spans mappings of different kinds")
    size = sizes.pop()
    kind = kind_of(size, True in shared)
    return Region(exported.name, exported.addr, exported.length, size, kind, zero_inode=max(zeros, default=0))

"""An image as a raw file: the bytes of its regions, and nothing else."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from snapengine.packing import ZERO
from snapengine.restorer import Restorer
from snapengine.sections import ImageRegion
from snapengine.sinks import whole_file

if TYPE_CHECKING:
    from snapengine.image import Image

BLOCK = bytes(1 << 20)


def export_raw(
    image: Image, regions: list[ImageRegion], path: str | os.PathLike[str], write_zeros: bool
) -> int:
    """Write the regions one behind the other; the file appears, complete, under its name at the end.

    With pwrite, not through a mapping: a full disk is then ENOSPC and not SIGBUS. Returns the size.
    `SinkError`: the file cannot be written; nothing of it is left.
    """
    plans = [(image.restorer(region, 0, region.length), region.length) for region in regions]
    with whole_file(path) as fd:
        start = 0
        for plan, length in plans:
            os.ftruncate(fd, start + length)  # what is not written stays a hole
            plan.into_file(fd, start, 0, plan.jobs)
            if write_zeros:
                _write_zeros(plan, fd, start)
            start += length
    return start


def _write_zeros(plan: Restorer, fd: int, start: int) -> None:
    for offset, count in plan.spans(ZERO):
        position = start + offset
        end = position + count
        while position < end:
            position += os.pwrite(fd, BLOCK[: end - position], position)

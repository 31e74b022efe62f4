"""Check whether an image of the embedded guest is a consistent cut."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from snapengine.base.jsonfields import Fields, parse_object
from snapengine.errors import ImageError
from snapengine.guest.check import CutReport, check_cut
from snapengine.guest.loop import BLOB, REGION
from snapengine.guest.params import GuestParams

READ_BYTES = 4 << 20


class ImageRegion(Protocol):
    """What `check_image` needs of a region."""

    @property
    def name(self) -> str: ...
    @property
    def length(self) -> int: ...


class Image(Protocol):
    """What `check_image` needs of an image. It uses `restore_into(region, buffer)` if the image has it."""

    @property
    def regions(self) -> Sequence[Any]: ...
    @property
    def vmstate(self) -> Mapping[str, bytes]: ...
    def read(self, region: Any, offset: int, length: int) -> bytes: ...


def check_image(image: Image) -> CutReport:
    """Run the oracle on an image of a guest.

    If the guest was paused when it reported its state, the cut must be exactly at its write counts.

    Raises
    ------
    ImageError
        It is not an image of a guest, or the guest's state in it is malformed.
    """
    if BLOB not in image.vmstate:
        raise ImageError(f"not an image of a snapengine guest: it has no vmstate {BLOB!r}")
    try:
        state = parse_object(image.vmstate[BLOB])
        params = GuestParams.from_json(state.object("params").members)
        writes = _writes(state, params.threads) if state.flag("paused") else None
    except ValueError as error:
        raise ImageError(f"malformed guest state (vmstate {BLOB!r}): {error}") from None
    regions = [region for region in image.regions if region.name == REGION]
    if len(regions) != 1 or regions[0].length != params.size:
        raise ImageError(f"not an image of a snapengine guest: no region {REGION!r} of {params.size} bytes")
    with mmap.mmap(-1, params.size) as ram:
        _load(image, regions[0], ram)
        return check_cut(ram, params, writes)


def _writes(state: Fields, threads: int) -> list[int]:
    """Completed writes of each thread."""
    counts = state.integers("writes", 63)
    if len(counts) != threads:
        raise ValueError(f"'writes' has {len(counts)} numbers for {threads} threads")
    return counts


def _load(image: Image, region: Any, ram: mmap.mmap) -> None:
    restore_into = getattr(image, "restore_into", None)
    if restore_into is not None:
        restore_into(region, ram)
        return
    for offset in range(0, len(ram), READ_BYTES):
        length = min(READ_BYTES, len(ram) - offset)
        ram[offset : offset + length] = image.read(region, offset, length)

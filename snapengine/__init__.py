"""Live snapshots of memory: the state at one instant, saved while the program goes on writing.

>>> import snapengine
>>> data = bytearray(64 << 20)
>>> with snapengine.snapshot(data, "state.snap") as capture:
...     data[0] = 1                     # runs while the state before it is being saved
>>> capture.result.pages_total
16385
"""

from __future__ import annotations

from pathlib import Path

from snapengine.capi import _C_API as _C_API  # the capsule is importable only by this name
from snapengine.capture import Capture, Progress, snapshot
from snapengine.errors import (
    AlreadyTrackedError,
    AttachError,
    CaptureCancelled,
    CorruptImageError,
    HandoverError,
    ImageError,
    LostPagesError,
    RegisterError,
    SinkError,
    SnapengineError,
    TargetGoneError,
    TruncatedImageError,
    UffdError,
    UffdPermissionError,
    UnsupportedError,
    UnsupportedVersionError,
)
from snapengine.image import Image, open_image
from snapengine.options import Options
from snapengine.peer import PeerTarget
from snapengine.process import ProcessTarget
from snapengine.result import Result
from snapengine.targets import BufferTarget, Region, Target

__version__ = "0.1.0"

__all__ = [
    "AlreadyTrackedError",
    "AttachError",
    "BufferTarget",
    "Capture",
    "CaptureCancelled",
    "CorruptImageError",
    "HandoverError",
    "Image",
    "ImageError",
    "LostPagesError",
    "Options",
    "PeerTarget",
    "ProcessTarget",
    "Progress",
    "Region",
    "RegisterError",
    "Result",
    "SinkError",
    "SnapengineError",
    "Target",
    "TargetGoneError",
    "TruncatedImageError",
    "UffdError",
    "UffdPermissionError",
    "UnsupportedError",
    "UnsupportedVersionError",
    "get_include",
    "open_image",
    "snapshot",
]


def get_include() -> list[str]:
    """Directories that a C or Cython embedder passes as ``include_dirs`` and ``include_path``."""
    package = Path(__file__).parent
    return [str(package / "include"), str(package.parent)]

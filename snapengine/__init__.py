"""Live snapshots of memory: the state at one instant, saved while the program goes on writing.

>>> import snapengine
>>> data = bytearray(64 << 20)
>>> with snapengine.snapshot(data, "state.snap") as capture:
...     data[0] = 1                     # runs while the state before it is being saved
>>> capture.result.pages_total
16385
"""

from __future__ import annotations

TYPE_CHECKING = False  # type checkers know the name; to import `typing` would take longer than all else here

if TYPE_CHECKING:
    from snapengine.capi import _C_API as _C_API
    from snapengine.capture.capture import Capture, snapshot
    from snapengine.capture.progress import Progress
    from snapengine.errors import (
        AlreadyTrackedError,
        AttachError,
        CaptureCancelled,
        CorruptImageError,
        HandoverError,
        ImageError,
        LostPagesError,
        NoSuchRegionError,
        RegisterError,
        SinkError,
        SnapengineError,
        TargetGoneError,
        TimeLimitError,
        TruncatedImageError,
        UffdError,
        UffdPermissionError,
        UnsupportedError,
        UnsupportedVersionError,
    )
    from snapengine.handover.peer import PeerTarget
    from snapengine.image import Image, open_image
    from snapengine.options import Options
    from snapengine.process.target import ProcessTarget
    from snapengine.regions import Region
    from snapengine.result import Result
    from snapengine.targets.base import Target
    from snapengine.targets.buffer import BufferTarget

__version__ = "0.1.0"

_PLACES = {
    "AlreadyTrackedError": "errors",
    "AttachError": "errors",
    "BufferTarget": "targets.buffer",
    "Capture": "capture.capture",
    "CaptureCancelled": "errors",
    "CorruptImageError": "errors",
    "HandoverError": "errors",
    "Image": "image.image",
    "ImageError": "errors",
    "LostPagesError": "errors",
    "NoSuchRegionError": "errors",
    "Options": "options",
    "PeerTarget": "handover.peer",
    "ProcessTarget": "process.target",
    "Progress": "capture.progress",
    "Region": "regions",
    "RegisterError": "errors",
    "Result": "result",
    "SinkError": "errors",
    "SnapengineError": "errors",
    "Target": "targets.base",
    "TargetGoneError": "errors",
    "TimeLimitError": "errors",
    "TruncatedImageError": "errors",
    "UffdError": "errors",
    "UffdPermissionError": "errors",
    "UnsupportedError": "errors",
    "UnsupportedVersionError": "errors",
    "_C_API": "capi",
    "open_image": "image.image",
    "snapshot": "capture.capture",
}
"""Name and module. Each is imported when it is first used, as submodules are: `import snapengine` costs
almost nothing. The capsule `_C_API` is importable only by this name."""

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
    "NoSuchRegionError",
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
    "TimeLimitError",
    "TruncatedImageError",
    "UffdError",
    "UffdPermissionError",
    "UnsupportedError",
    "UnsupportedVersionError",
    "get_include",
    "open_image",
    "snapshot",
]


if not TYPE_CHECKING:  # or every misspelled name would have a type

    def __getattr__(name):
        from importlib import import_module

        if name in _PLACES:
            value = globals()[name] = getattr(import_module(f"snapengine.{_PLACES[name]}"), name)
            return value
        if not name.startswith("__"):
            try:
                return import_module(f"snapengine.{name}")
            except ModuleNotFoundError:
                pass
        raise AttributeError(f"module 'snapengine' has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})


def get_include() -> list[str]:
    """Directories that a C or Cython embedder passes as ``include_dirs`` and ``include_path``."""
    from pathlib import Path

    package = Path(__file__).parent
    return [str(package / "include"), str(package.parent)]

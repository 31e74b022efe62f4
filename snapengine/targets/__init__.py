"""Whose memory is saved: the interface of targets, and buffers of this process."""

TYPE_CHECKING = False

if TYPE_CHECKING:
    from snapengine.targets.base import Target as Target
    from snapengine.targets.buffer import BufferTarget as BufferTarget

__all__ = ["BufferTarget", "Target"]
_PLACES = {"Target": "base", "BufferTarget": "buffer"}  # each is imported when first asked for

if not TYPE_CHECKING:  # or every misspelled name would have a type
    from snapengine.base.lazy import exports

    __getattr__, __dir__ = exports(__name__, _PLACES)

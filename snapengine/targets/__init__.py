"""Whose memory is saved: the interface of targets, and buffers of this process."""

TYPE_CHECKING = False

if TYPE_CHECKING:
    from snapengine.targets.base import Target as Target
    from snapengine.targets.buffer import BufferTarget as BufferTarget

__all__ = ["BufferTarget", "Target"]
_PLACES = {"Target": "base", "BufferTarget": "buffer"}  # each is imported when first asked for


if not TYPE_CHECKING:

    def __getattr__(name):
        from importlib import import_module

        if name in _PLACES:
            return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

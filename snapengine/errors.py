"""The error tree.

Every error of this package is a `SnapengineError`; each also inherits the built-in class that fits,
so that ``except OSError`` or ``except ValueError`` go on working. An error that came from a system
call carries its ``errno``.
"""

from __future__ import annotations

__all__ = [
    "AlreadyTrackedError",
    "AttachError",
    "CaptureCancelled",
    "CorruptImageError",
    "HandoverError",
    "ImageError",
    "LostPagesError",
    "MachineError",
    "NoSuchRegionError",
    "RegisterError",
    "SinkError",
    "SnapengineError",
    "StreamError",
    "TargetGoneError",
    "TimeLimitError",
    "TruncatedImageError",
    "UffdError",
    "UffdPermissionError",
    "UnsupportedError",
    "UnsupportedVersionError",
]


class SnapengineError(Exception):
    """Base class of the errors that this package raises itself."""


class UnsupportedError(SnapengineError, OSError):
    """This kernel, host or target cannot do what was asked; the text says what would."""


class UffdError(SnapengineError, OSError):
    """A userfaultfd call failed (``errno`` says why)."""


class UffdPermissionError(UffdError, PermissionError):
    """userfaultfd is not allowed for this user; the text names the ways to allow it."""


class RegisterError(UffdError):
    """A mapping cannot be tracked; the text names the mapping and the reason."""


class AlreadyTrackedError(RegisterError):
    """The memory is already registered with another userfaultfd (EBUSY)."""


class AttachError(SnapengineError, OSError):
    """A running process cannot be attached to; the text names it and the reason. ``errno``: ESRCH no such
    process, EPERM not allowed, EBUSY traced already, ETIMEDOUT it did not stop, EOPNOTSUPP never possible."""


class MachineError(SnapengineError, RuntimeError):
    """A QEMU machine cannot be saved or restored, or refused a command; the text says which and why."""


class HandoverError(SnapengineError, ValueError):
    """A peer's hand-over message is malformed or does not fit its memory map."""


class TargetGoneError(SnapengineError, ProcessLookupError):
    """The target process ended before its memory was saved."""


class SinkError(SnapengineError, OSError):
    """The sink refused bytes (EPIPE, ENOSPC, ...); nothing of the image is left behind."""


class CaptureCancelled(SnapengineError):
    """The capture was cancelled; the target is released and no image is left."""


class TimeLimitError(CaptureCancelled, TimeoutError):
    """The capture took longer than its `timeout`; the target is released and no image is left."""


class StreamError(SnapengineError, ValueError):
    """A virtual machine's migration stream is truncated, damaged, or holds something unknown.

    ``offset`` is the byte offset in the stream of what is refused.
    """

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(f"{message} (at byte {offset})")
        self.offset = offset


class ImageError(SnapengineError, ValueError):
    """An image cannot be used. ``offset`` is the byte offset of the record at fault."""

    def __init__(self, message: str, offset: int | None = None) -> None:
        super().__init__(message if offset is None else f"{message} (at byte {offset})")
        self.offset = offset


class NoSuchRegionError(ImageError, KeyError):
    """The image has no region of that name or number, or several of that name; the text lists its regions."""

    __str__ = Exception.__str__  # KeyError's puts the text into quotes


class TruncatedImageError(ImageError):
    """The image ends early: it was never completed, or was cut."""


class CorruptImageError(ImageError):
    """A checksum, a size or a reference in the image is wrong."""


class UnsupportedVersionError(ImageError):
    """The image was written by a newer format version, or uses an unknown feature."""


class LostPagesError(ImageError):
    """The bytes asked for were lost at capture time (see `Result.lost_runs`)."""

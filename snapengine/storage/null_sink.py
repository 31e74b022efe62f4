"""A sink that discards the image."""

from __future__ import annotations

from snapengine.storage.sink import DISCARD, Sink


class NullSink(Sink):
    """Discards all bytes; `Writer.image_bytes` counts them. For measuring a capture without output."""

    fd = DISCARD

    def __init__(self) -> None:
        super().__init__("null:")

    def write(self, data: memoryview | bytes) -> None:
        """Discard `data`."""

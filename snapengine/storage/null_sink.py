"""An image to nowhere."""

from __future__ import annotations

from snapengine.storage.sink import DISCARD, Sink


class NullSink(Sink):
    """Counts (`Writer.image_bytes`) and discards: what a capture costs without any output."""

    fd = DISCARD

    def __init__(self) -> None:
        super().__init__("null:")

    def write(self, data: memoryview | bytes) -> None:
        """Discard."""

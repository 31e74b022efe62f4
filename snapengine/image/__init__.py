"""Images: format, records, index, writer, reader, verification. FORMAT.md defines the format."""

from snapengine.image.image import Image, open_image

__all__ = ["Image", "open_image"]

"""What an image is: format, records, index, writer, reader, verification. FORMAT.md describes it."""

from snapengine.image.image import Image, open_image

__all__ = ["Image", "open_image"]

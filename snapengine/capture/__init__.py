"""One snapshot from arming to its result."""

from snapengine.capture.capture import Capture, snapshot
from snapengine.capture.progress import Progress

__all__ = ["Capture", "Progress", "snapshot"]

"""One snapshot from arming to its result."""

from snapengine.capture.capture import Capture, Progress, snapshot

__all__ = ["Capture", "Progress", "snapshot"]

"""One snapshot from arming to its result."""

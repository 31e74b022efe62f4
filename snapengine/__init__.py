"""Live snapshots of memory."""

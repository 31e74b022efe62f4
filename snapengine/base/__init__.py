"""Utilities independent of snapshots: bitmaps, checksums, file I/O, worker threads, units."""

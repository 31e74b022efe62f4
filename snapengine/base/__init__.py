"""Small parts that know nothing of snapshots: atomics, bitmaps, checksums, file I/O, worker threads, units."""

"""Small parts that know nothing of snapshots: bitmaps, checksums, file I/O, worker threads, units."""

"""Storage of images: sinks for output, sources for input."""

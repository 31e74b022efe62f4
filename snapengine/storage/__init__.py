"""Where the bytes of an image go to and come from: sinks and sources."""

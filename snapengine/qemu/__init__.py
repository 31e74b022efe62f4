"""Machines of QEMU: their migration stream into an image and back. Nothing here is imported by the engine."""

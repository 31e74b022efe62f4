"""Virtual machines that stock QEMU runs: live snapshots of them, machines restored from those, and QEMU's own
migration stream into an image and back. Nothing here is imported by the engine."""

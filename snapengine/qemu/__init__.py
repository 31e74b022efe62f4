"""Machines of QEMU: live snapshots, machines restored from them, and migration streams as images."""

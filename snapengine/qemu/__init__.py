"""Virtual machines that stock QEMU runs: live snapshots of them, and machines restored from those."""

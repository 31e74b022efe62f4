"""The ways to save a running QEMU machine, by name; importable without QEMU."""

OURS = "ours"
BACKGROUND = "QEMU background-snapshot"
QEMU_ROUNDS = ("QEMU dirty logging", "QEMU mapped-ram")
"""Iterative ways: they may not converge, and they leave the machine stopped."""
OUR_ROUNDS = "ours, dirty logging"
ZSTD = "ours, zstd:1"
STREAM = "ours, QEMU's stream"
WAYS = (*QEMU_ROUNDS, BACKGROUND, OURS, ZSTD, OUR_ROUNDS, STREAM)
MAY_GIVE_UP = (*QEMU_ROUNDS, OUR_ROUNDS)
MAIN = 127 << 20
"""The hot set, in bytes, that has goals."""

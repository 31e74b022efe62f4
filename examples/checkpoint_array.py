"""Checkpoint a numpy array while a computation goes on, and go back to the checkpoint.

Usage: python checkpoint_array.py IMAGE
"""

import sys

import numpy as np

import snapengine

STEPS_BEFORE = 3
STEPS_AFTER = 5


def step(state: np.ndarray) -> None:
    """One step of the computation: it writes to every page of the state."""
    state += 1


def main(path: str) -> None:
    state = np.zeros(4 << 20, dtype=np.int64)  # 32 MiB
    for _ in range(STEPS_BEFORE):
        step(state)

    # The block begins once T is fixed. Its steps run while the pages of T are being saved; each first write
    # to a page that is not saved yet waits some microseconds. Leaving the block waits for the image.
    with snapengine.snapshot({"state": state}, path, vmstate={"step": b"%d" % STEPS_BEFORE}) as capture:
        for _ in range(STEPS_AFTER):
            step(state)

    result = capture.result
    print(f"computed to step {state[0]}; saved step {STEPS_BEFORE} in {result.duration_ns / 1e6:.0f} ms")
    longest = result.fault_ns["max"] / 1e6
    print(f"{result.image_bytes} bytes, {result.faults} writes waited, at most {longest:.2f} ms")

    # Back to the checkpoint: every checksum is verified, then the array is filled in place.
    with snapengine.open_image(path) as image:
        image.verify()
        image.restore_into("state", state)
        saved_step = int(image.vmstate["step"])
    if not (state == saved_step).all():
        raise SystemExit("the image does not hold the state of its step")
    print(f"restored step {saved_step}")


if __name__ == "__main__":
    main(sys.argv[1])

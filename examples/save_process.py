"""Save another process while it writes to its memory, and read what it had at T.

Usage: python save_process.py IMAGE

The process (here a child, so that the example is complete) does not cooperate and does not notice. It counts
in two places that are pages apart, always the first one first. A copy that is not of one instant can show the
second count ahead of the first, or far behind it; the image cannot.
"""

import subprocess
import sys

import snapengine
from snapengine.process.record import process_of

COUNTER = """
import ctypes, mmap
memory = mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
counts = (ctypes.c_uint64 * (len(memory) // 8)).from_buffer(memory)
print(ctypes.addressof(counts), flush=True)
last = len(counts) - 1
while True:
    counts[0] += 1
    counts[last] += 1
"""
LAST = (32 << 20) - 8


def main(path: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", COUNTER], stdout=subprocess.PIPE, text=True)
    try:
        addr = int(process.stdout.readline())
        # A soft cut: one thread stops for a fraction of a millisecond, to open a userfaultfd. ProcessTarget
        # takes any process that this user may trace; with cut="stop" all its threads stand at T.
        target = snapengine.ProcessTarget(process.pid)
        with snapengine.snapshot(target, path, compress="zstd") as capture:
            pass  # T is fixed; the process goes on while its pages are saved
        result = capture.result
        if process.poll() is not None:
            raise SystemExit("the process has ended")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()

    print(f"one thread stood for {result.injection_ns / 1e6:.2f} ms; {result.pages_saved} pages saved")
    for mapping in result.not_captured:
        print(f"not captured: {mapping['path'] or 'anonymous memory'}: {mapping['reason']}")

    with snapengine.open_image(path) as image:
        image.verify()
        record = process_of(image)
        first = int.from_bytes(image.read_at(addr, 8), "little")
        second = int.from_bytes(image.read_at(addr + LAST, 8), "little")
    print(f"process {record.pid} ({record.comm}) had counted to {first} and {second} at T")
    if not 0 <= first - second <= 1:
        raise SystemExit("the image is not a state that the process had")


if __name__ == "__main__":
    main(sys.argv[1])

"""Scripts for a child process, with a `check` for what is left behind: threads, descriptors, files,
protected memory.

In the test's own process a limit or a signal would affect the test itself.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

COMMON = r"""
    import contextlib, errno, io, mmap, os, random, re, resource, signal, sys, threading, time
    import snapengine
    from snapengine.errors import SinkError, SnapengineError
    from snapengine.image import open_image

    MIB = 1 << 20
    draw = random.Random(int(sys.argv[2]))
    folder = sys.argv[1]
    buffer = mmap.mmap(-1, 8 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer.write(os.urandom(8 * MIB))

    def capture(method="write-tracking", sink=os.path.join(folder, "image"), **how):
        target = snapengine.BufferTarget({"ram": buffer}, pause=lambda: None, resume=lambda: None)
        with snapengine.snapshot(target, sink, method=method, **how):
            buffer[0] = 1

    def open_files():
        found = []
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):    # the descriptor of this listing
                found.append((number, os.readlink(f"/proc/self/fd/{number}")))
        # Python's own tempfile loses its unnamed file if the Ctrl-C comes as open() returns.
        return sorted(pair for pair in found if not re.fullmatch(r".*/#\d+ \(deleted\)", pair[1]))

    def check(before):
        for start in range(0, 8 * MIB, 4096):
            buffer[start] = 7                       # would block for ever if still protected
        for _ in range(200):                        # a joined thread may still be exiting
            if len(os.listdir("/proc/self/task")) == 1:
                break
            time.sleep(0.01)
        assert [thread.name for thread in threading.enumerate()] == ["MainThread"]
        assert len(os.listdir("/proc/self/task")) == 1
        assert open_files() == before, (open_files(), before)
        left = set(os.listdir(folder))
        if "image" in left:
            with open_image(os.path.join(folder, "image")) as image:
                image.verify()
            os.unlink(os.path.join(folder, "image"))
        assert left <= {"image"}, left

    capture(sink="null:")                           # imports everything, and shows that it works
    before = open_files()
    check(before)
"""


def run(script: str, folder, seed: int = 0, **how) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMMON) + textwrap.dedent(script), str(folder), str(seed)],
        capture_output=True, text=True, check=False, timeout=100, **how,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stdout[-500:], done.stderr[-3000:])
    return done.stdout

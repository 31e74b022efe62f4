"""Shared memory of known content that is written to, punched, truncated and filled: in this process, or in a
child that is attached to or hands over its memory (``python sharekit.py KIND DIRECTORY [SOCKET]``, which
reads commands from stdin).
"""

import contextlib
import ctypes
import json
import mmap
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

PAGE, MIB = 4096, 1 << 20
N_PAGES = 96 * MIB // PAGE  # the last quarter of them is never touched: holes
HOLES = N_PAGES * 3 // 4
KINDS = ("memfd", "shm", "tmpfs", "anonymous", "hugetlb")
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
LATER = 77
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
LIBC.mmap.restype = ctypes.c_void_p


class Share:
    """Pages 0 ... `HOLES`: every other unit zero, the others i + 1 in words 0 and 511 of page i."""

    def __init__(self, kind, directory):
        self.unit = 512 if kind == "hugetlb" else 1  # pages
        self.fd = self._file(kind, directory)
        if self.fd >= 0:
            os.ftruncate(self.fd, N_PAGES * PAGE)
        flags = mmap.MAP_SHARED | (mmap.MAP_ANONYMOUS if self.fd < 0 else 0)
        self.memory = mmap.mmap(self.fd, N_PAGES * PAGE, flags=flags)
        if kind != "hugetlb":
            self.memory.madvise(mmap.MADV_NOHUGEPAGE)
        self.words = np.frombuffer(self.memory, "<u8").reshape(N_PAGES, 512)
        self.words[:HOLES, [0, 511]] = expected(self.unit)[:HOLES, None]
        self._stop = threading.Event()

    @staticmethod
    def _file(kind, directory):
        if kind == "anonymous":
            return -1
        if kind in ("memfd", "hugetlb"):
            return os.memfd_create("share", os.MFD_HUGETLB if kind == "hugetlb" else os.MFD_ALLOW_SEALING)
        path = Path("/dev/shm" if kind == "shm" else directory) / f"snapengine-share-{os.getpid()}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        os.unlink(path)
        return fd

    @property
    def addr(self):
        return self.words.ctypes.data

    # -- actions on the pages first ... first + count --

    def punch(self, first, count):
        if self.fd < 0:
            self.memory.madvise(mmap.MADV_REMOVE, first * PAGE, count * PAGE)
            return
        self._fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, first, count)

    def rewrite(self, first, count):
        self.punch(first, count)
        self.words[first : first + count, [0, 511]] = LATER

    def look(self, first, count):
        """Punch the pages out and read them, which makes zero pages."""
        self.punch(first, count)
        assert not self.words[first : first + count, 0].any()

    def regrow(self, first, count):
        os.ftruncate(self.fd, first * PAGE)
        os.ftruncate(self.fd, N_PAGES * PAGE)
        self.words[first : first + count, [0, 511]] = LATER

    def allocate(self, first, count):
        """No content changes: data stays, and holes still read as zeros."""
        self._fallocate(0, 0, N_PAGES)

    def fill(self, first, count):
        self.words[HOLES:, 0] = LATER

    def read_holes(self, first, count):
        assert not self.words[HOLES:, 0].any()

    def replace(self, first, count):
        """Map another file there, whose last page is a hole."""
        other = os.memfd_create("other")
        os.ftruncate(other, count * PAGE)
        os.pwrite(other, (LATER.to_bytes(8, "little") * 512) * (count - 1), 0)
        start, flags = self.addr + first * PAGE, mmap.MAP_SHARED | 0x10  # MAP_FIXED
        assert LIBC.mmap(start, count * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, other, 0) == start

    def touch(self, first, count):
        self.words[first : first + count, 0] = LATER

    def nothing(self, first, count):
        """Do nothing: only the neighbouring pages are written to (`written`)."""

    def _fallocate(self, mode, first, count):
        if LIBC.fallocate(self.fd, mode, first * PAGE, count * PAGE):
            raise OSError(ctypes.get_errno(), "fallocate")

    # -- writers --

    @contextlib.contextmanager
    def written(self, first, count):
        """Meanwhile a thread increments word 1 of all data pages outside that range."""
        pages = np.flatnonzero(expected(self.unit))
        pages = pages[(pages < first) | (pages >= first + count)]
        self._stop.clear()
        thread = threading.Thread(target=self._write, args=(pages,))
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _write(self, pages):
        while not self._stop.is_set():
            for page in pages:
                self.words[page, 1] += 1
            time.sleep(0.001)


def expected(unit):
    """Word 0 of each page before any action."""
    pages = np.arange(N_PAGES, dtype=np.uint64)
    return np.where((pages // unit % 2 == 1) & (pages < HOLES), pages + 1, 0).astype(np.uint64)


class Child:
    """A process with such memory. `act` and `written` as in `Share`."""

    def __init__(self, kind, directory, path=""):
        command = [sys.executable, __file__, kind, str(directory), *([str(path)] if path else [])]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid
        try:
            self.addr = int(self._answer())
        except BaseException:
            self.__exit__()
            raise

    def _answer(self):
        line = self._process.stdout.readline()
        assert line, f"the child ended: {self._process.wait()}"
        return line

    def act(self, deed, first, count):
        self._process.stdin.write(f"{deed} {first} {count}\n")
        self._process.stdin.flush()
        assert self._answer() == "done\n"

    @contextlib.contextmanager
    def written(self, first, count):
        self.act("begin", first, count)
        yield
        self.act("end", first, count)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._process.kill()
        self._process.communicate()


def _hand_over(share, kind, path):
    """Serve as a peer. pause and resume do nothing: this process acts only on commands of the test."""
    from snapengine.kernel.uffd import FEATURES, Uffd

    with socket.socket(socket.AF_UNIX) as connection:
        while connection.connect_ex(path):
            time.sleep(0.01)
        lines = connection.makefile("r")
        wanted = json.loads(lines.readline())["features"]
        page_size = share.unit * PAGE
        mapping = {"base_host_virt_addr": share.addr, "size": N_PAGES * PAGE, "offset": 0, "name": "share",
                   "page_size": page_size, "page_size_kib": page_size,
                   "snapengine": {"version": 1, "controls": ["pause", "resume"]}}  # fmt: skip
        with Uffd(wanted & sum(FEATURES.values())) as uffd:
            socket.send_fds(connection, [json.dumps([mapping]).encode()], [uffd.fd])
        for line in lines:
            if json.loads(line)["cmd"] == "done":
                return
            connection.sendall(b'{"ok": true}\n')


def _main(kind, directory, path=""):
    share = Share(kind, directory)
    threading.Thread(target=_hand_over, args=(share, kind, path), daemon=True).start() if path else None
    print(share.addr, flush=True)
    writers = contextlib.ExitStack()
    for line in sys.stdin:
        deed, first, count = line.split()
        if deed == "begin":
            writers.enter_context(share.written(int(first), int(count)))
        elif deed == "end":
            writers.close()
        else:
            getattr(share, deed)(int(first), int(count))
        print("done", flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])

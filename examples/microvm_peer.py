"""A microVM monitor that hands the memory of its guest over to an engine, without any library.

Usage: python microvm_peer.py SOCKET        (an engine: snapengine save --socket SOCKET vm.img)

What a monitor in any language has to do: connect, open a userfaultfd, send the memory map with the
descriptors, close the userfaultfd, answer control lines. The message is the one of Firecracker's snapshot
loading, with some keys more. The guest is a thread that writes to its RAM; its "device state" is the number
of its writes.
"""

import base64
import ctypes
import fcntl
import json
import mmap
import os
import socket
import struct
import sys
import threading
import time

PAGE = 4096
RAM_BYTES = 32 << 20
CONNECT_SECONDS = 60

# From linux/userfaultfd.h and asm/unistd_64.h.
SYS_USERFAULTFD = 323
USERFAULTFD_IOC_NEW = 0xAA00
UFFDIO_API = 0xC018AA3F
UFFD_API = 0xAA


class Guest:
    """RAM, and one virtual CPU: write n puts n into page n modulo the number of pages."""

    def __init__(self) -> None:
        # A memfd, so that the engine can read it with pread; sealed, so that nobody can cut it short.
        self.memfd = os.memfd_create("guest-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.memfd, RAM_BYTES)
        fcntl.fcntl(self.memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self._ram = mmap.mmap(self.memfd, RAM_BYTES)
        self._words = (ctypes.c_uint64 * (RAM_BYTES // 8)).from_buffer(self._ram)
        self.addr = ctypes.addressof(self._words)
        self.writes = 0
        self._may_run = True
        self._changed = threading.Condition()
        self._standing = False
        threading.Thread(target=self._run, name="vcpu", daemon=True).start()

    def _run(self) -> None:
        pages = RAM_BYTES // PAGE
        while True:
            if not self._may_run:
                with self._changed:
                    self._standing = True
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._may_run)
                    self._standing = False
            number = self.writes + 1
            # After T this may wait until the page is saved.
            self._words[number % pages * (PAGE // 8)] = number
            self.writes = number

    def pause(self) -> None:
        """Returns when the virtual CPU stands."""
        with self._changed:
            self._may_run = False
            self._changed.wait_for(lambda: self._standing)

    def resume(self) -> None:
        with self._changed:
            self._may_run = True
            self._changed.notify_all()


def open_userfaultfd(wanted: int) -> int:
    """A userfaultfd with those of the features `wanted` that this kernel has."""
    probe = new_userfaultfd()
    try:
        supported = negotiate(probe, 0)
    finally:
        os.close(probe)
    fd = new_userfaultfd()
    negotiate(fd, wanted & supported)
    return fd


def new_userfaultfd() -> int:
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)  # Linux 6.1
    except OSError:
        libc = ctypes.CDLL(None, use_errno=True)
        fd = libc.syscall(SYS_USERFAULTFD, flags)
        if fd < 0:
            error = ctypes.get_errno()
            raise OSError(error, f"userfaultfd: {os.strerror(error)}") from None
        return fd
    try:
        return fcntl.ioctl(device, USERFAULTFD_IOC_NEW, flags)
    finally:
        os.close(device)


def negotiate(fd: int, features: int) -> int:
    """UFFDIO_API; returns all features that the kernel has."""
    api = fcntl.ioctl(fd, UFFDIO_API, struct.pack("=QQQ", UFFD_API, features, 0))
    return struct.unpack("=QQQ", api)[1]


def hand_over(engine: socket.socket, guest: Guest, features: int) -> None:
    mapping = {
        "base_host_virt_addr": guest.addr, "size": RAM_BYTES, "offset": 0,
        "page_size": PAGE, "page_size_kib": PAGE,  # the second name is an old one, and means bytes, too
        "name": "ram", "kind": "shared", "memfd": 1,
        "snapengine": {"version": 1, "controls": ["pause", "resume", "vmstate"]},
    }  # fmt: skip
    uffd = open_userfaultfd(features)
    try:
        socket.send_fds(engine, [json.dumps([mapping]).encode()], [uffd, guest.memfd])
    finally:
        os.close(uffd)  # whoever keeps a copy keeps the memory protected after the engine's death


def answer(guest: Guest, command: str) -> dict:
    if command == "pause":
        guest.pause()
        return {"ok": True}
    if command == "resume":
        guest.resume()
        return {"ok": True}
    if command == "vmstate":
        state = json.dumps({"writes": guest.writes}).encode()
        return {"ok": True, "vmstate": {"vcpu": base64.b64encode(state).decode()}}
    return {"ok": False, "error": f"unknown command {command!r}"}


def connect(path: str) -> socket.socket:
    """A connection to the engine, which may be started a moment later."""
    end = time.monotonic() + CONNECT_SECONDS
    while True:
        engine = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            engine.connect(path)
            return engine
        except OSError:
            engine.close()
            if time.monotonic() > end:
                raise
        time.sleep(0.01)


def main(path: str) -> int:
    guest = Guest()
    with connect(path) as engine:
        lines = engine.makefile("rb")
        greeting = json.loads(lines.readline())
        hand_over(engine, guest, greeting["features"])
        # This thread must never write to the RAM: it could wait for an engine that waits for its answer.
        for line in lines:
            request = json.loads(line)
            if request["cmd"] == "done":
                print(f"{request['status']}; the guest has done {guest.writes} writes", flush=True)
                return 0 if request["status"] == "completed" else 1
            engine.sendall(json.dumps(answer(guest, request["cmd"])).encode() + b"\n")
    guest.resume()  # the engine is gone without a word: the guest must not stay paused
    print("the engine went away", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

"""Machines of QEMU for tests and benches: which QEMU there is, and one that runs a guest until killed."""

import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from qmpkit import Qmp

MIB = 1 << 20
PIECE = 4 * MIB
DEADLINE_S = 60
BACKENDS = ("private", "memfd", "hugetlb", "file")


def find_qemu():
    """The path of QEMU, from the environment's QEMU or PATH; None if there is none."""
    return shutil.which(os.environ.get("QEMU", "qemu-system-x86_64"))


@functools.cache
def qemu_version(qemu):
    """(major, minor, micro) of the QEMU at this path."""
    shown = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(map(int, re.search(r"version (\d+)\.(\d+)\.(\d+)", shown).groups()))


def kvm_usable():
    """Whether this user may open /dev/kvm. (Whether it runs a Linux guest is another matter.)"""
    return os.access("/dev/kvm", os.R_OK | os.W_OK)


def until(condition, what, deadline_s=DEADLINE_S):
    """The first true value of `condition()`; AssertionError with `what` (or what it returns) in the end."""
    end = time.monotonic() + deadline_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, what() if callable(what) else what
        time.sleep(0.005)


class Machine:
    """A QEMU that runs `guest` (sweepkit.Sweep, linuxkit.Linux), its files in `room`, whose path is short.

    `ram`: one of BACKENDS. `incoming`: it waits for ``migrate-incoming``, stopped. `extra`: more arguments
    for QEMU. Two monitors: ``machine.qmp(...)`` is the kit's own, `socket` is free for what is tested.
    The main thread must start it: the kernel kills it when the thread that started it ends.
    """

    def __init__(self, guest, room, accel="tcg", ram="private", *, qemu=None, extra=(), incoming=False):
        self.guest, self.accel, self.ram, self.qemu = guest, accel, ram, qemu or find_qemu()
        self.room = Path(tempfile.mkdtemp(prefix="m", dir=room))
        self.socket, self._serial, self._log = (self.room / name for name in ("qmp", "serial", "log"))
        self._shared = Path("/dev/shm") / f"{self.room.parent.name}-{self.room.name}"
        self.arguments = [*self._arguments(), *extra]
        self.command = [self.qemu, *self.arguments]
        stopped = ["-S"] if incoming or guest.fill else []
        if incoming:
            stopped += ["-incoming", "defer"]
        monitors = []
        for path in (self.room / "kit", self.socket):
            monitors += ["-qmp", f"unix:{path},server=on,wait=off"]
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *self.command, *stopped, *monitors],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.pid = self.process.pid
        self.qmp = None
        try:
            self._connect()
            if guest.fill and not incoming:
                guest.fill(self)
                self.qmp("cont")
        except BaseException:
            self.kill()
            raise

    def _connect(self):
        def ended():
            return self.process.poll() is not None

        until(lambda: (self.room / "kit").exists() or ended(), "QEMU opens no monitor")
        try:
            self.qmp = Qmp(self.room / "kit")
        except OSError as error:
            until(ended, f"QEMU does not answer: {error}")
            raise AssertionError(f"QEMU did not start: {self.log()}") from error

    def _arguments(self):
        size = self.guest.memory // MIB
        arguments = [
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-accel", self.accel, "-m", str(size), "-serial", f"file:{self._serial}"),
        ]
        kinds = {
            "private": None,
            "memfd": "memory-backend-memfd,share=on",
            "hugetlb": "memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M",
            "file": f"memory-backend-file,share=on,mem-path={self._shared}",
        }
        backend = kinds[self.ram]
        if backend:
            arguments += ["-object", f"{backend},id=ram,size={size}M", "-machine", "pc,memory-backend=ram"]
        else:
            arguments += ["-machine", "pc"]
        return [*arguments, *self.guest.arguments]

    def successor(self, *extra, **changes):
        """The same machine anew, waiting for ``migrate-incoming``."""
        kept = {"accel": self.accel, "ram": self.ram, "qemu": self.qemu} | changes
        new = Machine(self.guest, self.room.parent, extra=extra, incoming=True, **kept)
        new.__dict__["progress_address"] = self.progress_address  # its guest will not print it again
        return new

    def log(self):
        """What QEMU itself has printed."""
        return self._log.read_text(errors="replace").strip()

    def serial(self):
        """What the guest has printed."""
        with contextlib.suppress(FileNotFoundError):
            return self._serial.read_bytes().replace(b"\0", b"").decode(errors="replace")
        return ""

    def wait_serial(self, pattern, deadline_s=DEADLINE_S, start=0):
        """The match of the regular expression in what the guest printed from character `start` on."""
        expression = re.compile(pattern, re.MULTILINE)

        def look():
            found = expression.search(self.serial(), start)
            assert found or self.process.poll() is None, f"QEMU ended: {self.log()}"
            return found

        return until(
            look, lambda: f"the guest did not print {pattern!r}: ...{self.serial()[-300:]}", deadline_s
        )

    def ready(self):
        """Wait until the guest works as it will go on; the machine."""
        self.guest.wait_ready(self)
        return self

    @functools.cached_property
    def ram_address(self):
        """Where the machine's RAM begins in the QEMU process (below 3 GiB it is one piece)."""
        shown = self.qmp.hmp(f"gpa2hva {MIB:#x}")
        found = re.search(r"is 0x([0-9a-f]+)", shown)
        assert found, shown
        return int(found[1], 16) - MIB

    def read_ram(self, offset=0, length=None):
        """Bytes of the RAM, read while the machine does what it does: no state of one instant."""
        buffer = bytearray(self.guest.memory - offset if length is None else length)
        view = memoryview(buffer)
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as memory:
            for at in range(0, len(buffer), PIECE):
                piece = view[at : at + PIECE]
                done = os.preadv(memory.fileno(), [piece], self.ram_address + offset + at)
                assert done == len(piece), f"{done} of {len(piece)} bytes at {offset + at:#x}"
        view.release()
        return buffer

    def write_ram(self, offset, data):
        """Put bytes into the RAM from outside, past QEMU."""
        with open(f"/proc/{self.pid}/mem", "r+b", buffering=0) as memory:
            done = os.pwrite(memory.fileno(), data, self.ram_address + offset)
        assert done == len(data), f"{done} of {len(data)} bytes at {offset:#x}"

    @functools.cached_property
    def progress_address(self):
        """Where in the RAM the guest counts the pages that it has written (32 bits)."""
        return self.guest.progress(self)

    def counter(self):
        """Pages that the guest has written; it wraps round at 32 bits."""
        return int.from_bytes(self.read_ram(self.progress_address, 4), "little")

    def wait_progress(self, pages=1, deadline_s=DEADLINE_S):
        """Wait until the guest has written so many pages more."""
        before = self.counter()
        until(lambda: (self.counter() - before) % (1 << 32) >= pages, "the guest stands still", deadline_s)

    def migrate(self, uri, deadline_s=DEADLINE_S, **capabilities):
        """QEMU's own ``migrate``, to its end; the last ``query-migrate``. Capabilities with "_" for "-"."""
        if capabilities:
            names = [
                {"capability": name.replace("_", "-"), "state": state} for name, state in capabilities.items()
            ]
            self.qmp("migrate-set-capabilities", capabilities=names)
        self.qmp("migrate-set-parameters", max_bandwidth=1 << 40)
        self.qmp("migrate", uri=uri)
        return self._migrated(deadline_s)

    def load(self, uri, deadline_s=DEADLINE_S):
        """``migrate-incoming`` of a whole stream; the machine is loaded and does not run yet."""
        self.qmp("migrate-incoming", uri=uri)
        return self._migrated(deadline_s)

    def _migrated(self, deadline_s):
        def ended():
            info = self.qmp("query-migrate")
            return info if info.get("status") in ("completed", "failed", "cancelled") else None

        info = until(ended, lambda: f"still migrating: {self.qmp('query-migrate')}", deadline_s)
        assert info["status"] == "completed", f"{info} {self.log()}"
        return info

    def kill(self):
        """End QEMU and all that it started; what it left in /dev/shm goes, too."""
        if self.qmp:
            self.qmp.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()
        if self.ram == "file":
            self._shared.unlink(missing_ok=True)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.kill()


class Machines:
    """``with Machines() as machines: machines(guest, accel=...)``: none of them outlives the block."""

    def __init__(self):
        self._room = tempfile.TemporaryDirectory(prefix="qemu-")  # a socket's path has at most 107 bytes
        self.room = Path(self._room.name)
        self._started = []

    def __call__(self, guest, *arguments, **named):
        return self._add(Machine(guest, self.room, *arguments, **named))

    def successor(self, machine, *extra, **changes):
        return self._add(machine.successor(*extra, **changes))

    def _add(self, machine):
        self._started.append(machine)
        return machine

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        for machine in self._started:
            machine.kill()
        self._room.cleanup()

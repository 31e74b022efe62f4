"""A running QEMU machine as a test sees it: its monitor, serial port, memory and progress."""

import contextlib
import functools
import os
import re
from pathlib import Path

from qmpkit import Qmp
from waitkit import PATIENCE_S, until

MIB = 1 << 20
PIECE = 4 * MIB


def state_of(pid):
    """The state letter of a process (proc(5)); "" if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[0]


class Observed:
    """A QEMU that runs `guest` with the files in `room` (qemukit.Setup). Anyone may have started it."""

    def __init__(self, guest, room, pid):
        self.guest, self.room, self.pid = guest, Path(room), pid
        self.socket = self.room / "qmp"  # the monitor for the code under test; the kit has its own
        self.qmp = None

    def connect(self):
        """Wait for the kit's monitor; AssertionError with what QEMU said if it ends instead."""

        def attempt():
            try:
                self.qmp = Qmp(self.room / "kit")
            except OSError:  # between bind() and listen() QEMU's socket exists but refuses connections
                return self.ended()
            return True

        until(attempt, lambda: f"QEMU's monitor does not answer: {self.log()}")
        assert self.qmp, f"QEMU did not start: {self.log()}"

    def disconnect(self):
        """Close the kit's connection to the monitor; it may be called twice."""
        if self.qmp:
            self.qmp.close()

    def ended(self):
        """Whether the process has ended, or is a zombie."""
        return state_of(self.pid) in ("", "Z", "X")

    def check_alive(self, found):
        """AssertionError with the output of QEMU and its guest, if QEMU ended before it was `found`."""
        if not found and self.ended():
            raise AssertionError(f"QEMU ended: {self.log()} guest: ...{self.serial()[-2000:]}")

    def log(self):
        """The output of QEMU itself."""
        with contextlib.suppress(FileNotFoundError):  # the starter may have redirected it
            return (self.room / "log").read_text(errors="replace").strip()
        return ""

    def serial(self):
        """The output of the guest."""
        with contextlib.suppress(FileNotFoundError):
            return (self.room / "serial").read_bytes().replace(b"\0", b"").decode(errors="replace")
        return ""

    def wait_serial(self, pattern, deadline_s=PATIENCE_S, start=0):
        """Wait for a match of the regular expression in the guest's output from character `start` on."""
        expression = re.compile(pattern, re.MULTILINE)

        def look():
            found = expression.search(self.serial(), start)
            self.check_alive(found)
            return found

        return until(
            look, lambda: f"the guest did not print {pattern!r}: ...{self.serial()[-300:]}", deadline_s
        )

    def ready(self):
        """Wait until the guest has started up and writes; the machine."""
        self.guest.wait_ready(self)
        return self

    @functools.cached_property
    def ram_address(self):
        """Address of the machine's RAM in the QEMU process (below 3 GiB it is one mapping)."""
        shown = self.qmp.hmp(f"gpa2hva {MIB:#x}")
        found = re.search(r"is 0x([0-9a-f]+)", shown)
        assert found, shown
        return int(found[1], 16) - MIB

    def read_ram(self, offset=0, length=None):
        """Bytes of the RAM, read while the machine runs: not a state of one instant."""
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
        """Write bytes into the RAM from outside, without QEMU."""
        with open(f"/proc/{self.pid}/mem", "r+b", buffering=0) as memory:
            done = os.pwrite(memory.fileno(), data, self.ram_address + offset)
        assert done == len(data), f"{done} of {len(data)} bytes at {offset:#x}"

    @functools.cached_property
    def progress_address(self):
        """Offset in the RAM of the guest's counter of written pages (32 bits)."""
        return self.guest.progress(self)

    def counter(self):
        """Number of pages that the guest has written; it wraps around at 32 bits."""
        return int.from_bytes(self.read_ram(self.progress_address, 4), "little")

    def wait_progress(self, pages=1, deadline_s=PATIENCE_S):
        """Wait until the guest has written that many more pages."""
        before = self.counter()
        until(lambda: (self.counter() - before) % (1 << 32) >= pages, "no progress of the guest", deadline_s)

    def migrate(self, uri, deadline_s=PATIENCE_S, **capabilities):
        """Run QEMU's own ``migrate``; returns the last ``query-migrate``. Capabilities have "_" for "-"."""
        if capabilities:
            names = [
                {"capability": name.replace("_", "-"), "state": state} for name, state in capabilities.items()
            ]
            self.qmp("migrate-set-capabilities", capabilities=names)
        self.qmp("migrate-set-parameters", max_bandwidth=1 << 40)
        self.qmp("migrate", uri=uri)
        return self._migrated(deadline_s)

    def load(self, uri, deadline_s=PATIENCE_S):
        """``migrate-incoming`` of a complete stream; then the machine is loaded but does not run yet."""
        self.qmp("migrate-incoming", uri=uri)
        return self._migrated(deadline_s)

    def _migrated(self, deadline_s):
        def ended():
            info = self.qmp("query-migrate")
            return info if info.get("status") in ("completed", "failed", "cancelled") else None

        info = until(ended, lambda: f"still migrating: {self.qmp('query-migrate')}", deadline_s)
        assert info["status"] == "completed", f"{info} {self.log()}"
        return info

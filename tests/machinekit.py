"""What a test sees of a machine of QEMU that runs: its monitor, its serial port, its memory, its progress."""

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
    """A QEMU, whoever started it, that runs `guest` with the files that `room` names (qemukit.Setup)."""

    def __init__(self, guest, room, pid):
        self.guest, self.room, self.pid = guest, Path(room), pid
        self.socket = self.room / "qmp"  # a monitor for what is tested; the kit has its own
        self.qmp = None

    def connect(self):
        """Wait for the kit's monitor; AssertionError with what QEMU said if it ends instead."""

        def attempt():
            try:
                self.qmp = Qmp(self.room / "kit")
            except OSError:  # between bind() and listen() QEMU's socket is there and refuses
                return self.ended()
            return True

        until(attempt, lambda: f"QEMU's monitor does not answer: {self.log()}")
        assert self.qmp, f"QEMU did not start: {self.log()}"

    def disconnect(self):
        """Close the kit's connection to the monitor; it may be called twice."""
        if self.qmp:
            self.qmp.close()

    def ended(self):
        """Whether the process is gone, or only waits to be waited for."""
        return state_of(self.pid) in ("", "Z", "X")

    def check_alive(self, found):
        """AssertionError with what QEMU and its guest said, if it ended before what we want was `found`."""
        if not found and self.ended():
            raise AssertionError(f"QEMU ended: {self.log()} guest: ...{self.serial()[-2000:]}")

    def log(self):
        """What QEMU itself has printed."""
        with contextlib.suppress(FileNotFoundError):  # who started it may keep that for itself
            return (self.room / "log").read_text(errors="replace").strip()
        return ""

    def serial(self):
        """What the guest has printed."""
        with contextlib.suppress(FileNotFoundError):
            return (self.room / "serial").read_bytes().replace(b"\0", b"").decode(errors="replace")
        return ""

    def wait_serial(self, pattern, deadline_s=PATIENCE_S, start=0):
        """The match of the regular expression in what the guest printed from character `start` on."""
        expression = re.compile(pattern, re.MULTILINE)

        def look():
            found = expression.search(self.serial(), start)
            self.check_alive(found)
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

    def wait_progress(self, pages=1, deadline_s=PATIENCE_S):
        """Wait until the guest has written so many pages more."""
        before = self.counter()
        until(lambda: (self.counter() - before) % (1 << 32) >= pages, "the guest stands still", deadline_s)

    def migrate(self, uri, deadline_s=PATIENCE_S, **capabilities):
        """QEMU's own ``migrate``, to its end; the last ``query-migrate``. Capabilities with "_" for "-"."""
        if capabilities:
            names = [
                {"capability": name.replace("_", "-"), "state": state} for name, state in capabilities.items()
            ]
            self.qmp("migrate-set-capabilities", capabilities=names)
        self.qmp("migrate-set-parameters", max_bandwidth=1 << 40)
        self.qmp("migrate", uri=uri)
        return self._migrated(deadline_s)

    def load(self, uri, deadline_s=PATIENCE_S):
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

"""Real machines of QEMU for the tests: the emulators that are here, a guest that sweeps its memory, QMP."""

import contextlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

MIB = 1 << 20
MEMORY = 32 * MIB
HOT = 12 * MIB
WAIT_S = 60


def emulators():
    """Paths: those in SNAPENGINE_TEST_QEMU (separated by colons), else the one in PATH."""
    named = os.environ.get("SNAPENGINE_TEST_QEMU")
    found = named.split(":") if named else [shutil.which("qemu-system-x86_64")]
    return [path for path in found if path]


def version(emulator):
    """Such as (7, 2)."""
    text = subprocess.run([emulator, "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(int(part) for part in text.split("version ")[1].split()[0].split(".")[:2])


def build_guest(room):
    """The boot sector of targets/sweepguest.S as a disk image."""
    source = Path(__file__).parent / "targets" / "sweepguest.S"
    objects, disk = room / "guest.o", room / "guest.img"
    symbols = [f"--defsym=END={MEMORY}", f"--defsym=HOT={HOT}"]
    subprocess.run(["as", "--32", *symbols, "-o", objects, source], check=True)
    link = ["ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary", "-o", disk, objects]
    subprocess.run(link, check=True)
    with disk.open("r+b") as file:
        file.truncate(64 << 10)
    return disk


class Machine:
    """One QEMU process, TCG, with a QMP socket; `serial` is what the guest said."""

    def __init__(self, emulator, room, disk, *arguments, env=None):
        self._socket = room / f"qmp{time.monotonic_ns()}"
        self.serial = room / "serial"
        line = [emulator, "-machine", "pc", "-accel", "tcg", "-m", str(MEMORY // MIB), "-display", "none",
                "-nodefaults", "-snapshot", "-drive", f"file={disk},format=raw,if=ide",
                "-serial", f"file:{self.serial}", "-qmp", f"unix:{self._socket},server=on,wait=off",
                *arguments]  # fmt: skip
        self.process = subprocess.Popen(line, cwd=room, env=env, stdin=subprocess.DEVNULL)
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.settimeout(WAIT_S)
        wait_for(self._connect)
        self._replies = self._connection.makefile("rb")
        self._replies.readline()
        self.qmp("qmp_capabilities")

    def _connect(self):
        assert self.process.poll() is None, "QEMU ended at its start"
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            self._connection.connect(str(self._socket))
            return True
        return False

    def qmp(self, command, **arguments):
        """The command's result; an error fails the test."""
        request = {"execute": command, "arguments": arguments}
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        while True:
            reply = json.loads(self._replies.readline())
            assert "error" not in reply, reply
            if "return" in reply:
                return reply["return"]

    def monitor(self, line):
        """A line of the human monitor; its answer."""
        return self.qmp("human-monitor-command", **{"command-line": line})

    def wait_migration(self):
        """Wait for the end; the status."""
        ends = ("completed", "failed", "cancelled")
        wait_for(lambda: self.qmp("query-migrate").get("status") in ends)
        return self.qmp("query-migrate")["status"]

    def read(self, start, length, room):
        """Guest memory."""
        path = room / "memory"
        self.qmp("pmemsave", val=start, size=length, filename=str(path))
        return path.read_bytes()

    def close(self):
        """End it, whatever state it is in."""
        self._replies.close()
        self._connection.close()
        self.process.kill()
        self.process.wait(WAIT_S)


def wait_for(condition):
    """Until it is true, or the test fails."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def steps(memory, start=0):
    """How often the swept byte changes from page to page; `memory` begins at 1 MiB."""
    values = memory[start + 8 : HOT - MIB : 4096]
    return [(a - b) % 256 for a, b in itertools.pairwise(values) if a != b]

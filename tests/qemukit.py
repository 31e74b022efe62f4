"""QEMU machines for tests and benches: finding QEMU, starting machines, and killing them at the end."""

import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from machinekit import MIB, Observed, until

BACKENDS = ("private", "memfd", "hugetlb", "file")


def find_qemu():
    """Return the path of QEMU, from the environment variable QEMU or PATH, or None."""
    return shutil.which(os.environ.get("QEMU", "qemu-system-x86_64"))


@functools.cache
def qemu_version(qemu):
    """Return (major, minor, micro) of the QEMU at this path."""
    shown = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True).stdout
    return tuple(map(int, re.search(r"version (\d+)\.(\d+)\.(\d+)", shown).groups()))


def kvm_usable():
    """Whether this user may open /dev/kvm. It may still be unable to run a Linux guest."""
    return os.access("/dev/kvm", os.R_OK | os.W_OK)


@dataclass(frozen=True)
class Setup:
    """The configuration of a QEMU that runs `guest` (sweepkit.Sweep, linuxkit.Linux), with files in `room`.

    `room` is a directory of this machine only, with a short path. `ram` is one of BACKENDS, `extra` holds
    more arguments.
    """

    guest: object
    room: Path
    accel: str = "tcg"
    ram: str = "private"
    qemu: str | None = None
    extra: tuple[str, ...] = ()

    @property
    def shared(self):
        """The file of the backend "file"."""
        return Path("/dev/shm") / f"{self.room.parent.name}-{self.room.name}"

    @property
    def machine_arguments(self):
        """Arguments that define the machine. They must be the same where its state is loaded."""
        size = self.guest.memory // MIB
        kinds = {
            "private": None,
            "memfd": "memory-backend-memfd,share=on",
            "hugetlb": "memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M",
            "file": f"memory-backend-file,share=on,mem-path={self.shared}",
        }
        backend = kinds[self.ram]
        arguments = ["-nodefaults", "-no-user-config", "-accel", self.accel, "-m", str(size)]
        if backend:
            arguments += ["-object", f"{backend},id=ram,size={size}M", "-machine", "pc,memory-backend=ram"]
        else:
            arguments += ["-machine", "pc"]
        return [*arguments, *self.guest.arguments, *self.extra]

    @property
    def command(self):
        """The command without monitors, as for ``snapengine qemu restore``."""
        arguments = ["-display", "none", "-no-reboot", "-serial", f"file:{self.room}/serial"]
        return [self.qemu or find_qemu(), *self.machine_arguments, *arguments]

    @property
    def monitors(self):
        """Arguments for two monitors: "kit" for this module, "qmp" for the code under test."""
        names = [f"unix:{self.room}/{name},server=on,wait=off" for name in ("kit", "qmp")]
        return [argument for name in names for argument in ("-qmp", name)]


class Machine(Observed):
    """A QEMU that this module starts. `incoming`: it is stopped, and waits for ``migrate-incoming``.

    The main thread must start it, because the kernel kills it when the starting thread ends.
    """

    def __init__(self, setup, incoming=False):
        self.setup = setup
        self.command = setup.command
        self.qemu = self.command[0]
        filled = setup.guest.fill and not incoming
        more = ["-S"] if incoming or filled else []
        if incoming:
            more += ["-incoming", "defer"]
        with open(setup.room / "log", "wb") as log:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *setup.command, *setup.monitors, *more],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        super().__init__(setup.guest, setup.room, self.process.pid)
        try:
            self.connect()
            if filled:
                setup.guest.fill(self)
                self.qmp("cont")
        except BaseException:
            self.kill()
            raise

    def kill(self):
        """Kill QEMU and its child processes, and remove its file in /dev/shm."""
        self.disconnect()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()
        self.setup.shared.unlink(missing_ok=True)


class Machines:
    """``with Machines() as machines: machines(guest, accel=...)``. The machines are killed at its end."""

    def __init__(self):
        self._room = tempfile.TemporaryDirectory(prefix="qemu-")  # a socket's path has at most 107 bytes
        self.room = Path(self._room.name)
        self._started = []
        self._adopted = []

    def __call__(self, guest, accel="tcg", ram="private", **more):
        """Start a machine; the arguments are those of Setup."""
        return self._start(Setup(guest, self._new_room(), accel, ram, **more))

    def setup_like(self, machine, *extra, **changes):
        """Return a Setup of the same machine, for a command that starts QEMU itself; see adopt()."""
        setup = machine.setup
        return replace(setup, room=self._new_room(), extra=(*setup.extra, *extra), **changes)

    def successor(self, machine, *extra, **changes):
        """Start the same machine again, waiting for ``migrate-incoming``."""
        return _as_before(self._start(self.setup_like(machine, *extra, **changes), True), machine)

    def adopt(self, setup, pid, machine):
        """Observe a QEMU that was started with the command and monitors of `setup`; kill it at the end."""
        found = Observed(setup.guest, setup.room, pid)
        self._adopted.append((setup, found))
        found.connect()
        return _as_before(found, machine)

    def _new_room(self):
        return Path(tempfile.mkdtemp(prefix="m", dir=self.room))

    def _start(self, setup, incoming=False):
        machine = Machine(setup, incoming)
        self._started.append(machine)
        return machine

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        for machine in self._started:
            machine.kill()
        for setup, found in self._adopted:
            found.disconnect()
            _kill_adopted(found)
            setup.shared.unlink(missing_ok=True)
        self._room.cleanup()


def _as_before(new, machine):
    """Copy the address of the counter, which the guest prints only once."""
    new.__dict__["progress_address"] = machine.progress_address
    return new


def _kill_adopted(found):
    """Kill a QEMU through a pidfd, after checking that the pid was not reused by another program."""
    try:
        pidfd = os.pidfd_open(found.pid)
    except ProcessLookupError:
        return
    try:
        name = os.path.basename(os.readlink(f"/proc/{found.pid}/exe"))
        if name.startswith("qemu-system"):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError):
        return
    finally:
        os.close(pidfd)
    until(found.ended, f"QEMU {found.pid} does not end")

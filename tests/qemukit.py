"""Machines of QEMU for tests and benches: which QEMU there is, how one is started, and that none survives."""

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


@dataclass(frozen=True)
class Setup:
    """How a QEMU is started that runs `guest` (sweepkit.Sweep, linuxkit.Linux) with its files in `room`.

    `room` is its own, with a short path. `ram`: one of BACKENDS. `extra`: more arguments.
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
        """What makes the machine, and must be the same where its state is loaded."""
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
        """The whole command: two monitors, "kit" for the kit and "qmp" for what is tested."""
        arguments = ["-display", "none", "-no-reboot", "-serial", f"file:{self.room}/serial"]
        for name in ("kit", "qmp"):
            arguments += ["-qmp", f"unix:{self.room}/{name},server=on,wait=off"]
        return [self.qemu or find_qemu(), *self.machine_arguments, *arguments]


class Machine(Observed):
    """A QEMU that the kit starts. `incoming`: it waits for ``migrate-incoming``, stopped.

    The main thread must start it: the kernel kills it when the thread that started it ends.
    """

    def __init__(self, setup, incoming=False):
        self.setup = setup
        self.qemu = setup.command[0]
        filled = setup.guest.fill and not incoming
        more = ["-S"] if incoming or filled else []
        if incoming:
            more += ["-incoming", "defer"]
        with open(setup.room / "log", "wb") as log:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *setup.command, *more],
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
        """End QEMU and all that it started; what it left in /dev/shm goes, too."""
        self.disconnect()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()
        self.setup.shared.unlink(missing_ok=True)


class Machines:
    """``with Machines() as machines: machines(guest, accel=...)``: none of them outlives the block."""

    def __init__(self):
        self._room = tempfile.TemporaryDirectory(prefix="qemu-")  # a socket's path has at most 107 bytes
        self.room = Path(self._room.name)
        self._started = []
        self._adopted = []

    def __call__(self, guest, accel="tcg", ram="private", **more):
        """Start a machine; the arguments are those of Setup."""
        return self._start(Setup(guest, self._new_room(), accel, ram, **more))

    def setup_like(self, machine, *extra, **changes):
        """The Setup of the same machine anew, for a command that starts QEMU itself; see adopt()."""
        setup = machine.setup
        return replace(setup, room=self._new_room(), extra=(*setup.extra, *extra), **changes)

    def successor(self, machine, *extra, **changes):
        """The same machine anew, waiting for ``migrate-incoming``."""
        return _as_before(self._start(self.setup_like(machine, *extra, **changes), True), machine)

    def adopt(self, setup, pid, machine):
        """Watch, and kill in the end, a QEMU that was started with ``setup.command`` to follow `machine`."""
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
    """The guest does not print a second time where its counter is."""
    new.__dict__["progress_address"] = machine.progress_address
    return new


def _kill_adopted(found):
    """Through a pidfd that is checked to be a QEMU: the number may have been given to another process."""
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

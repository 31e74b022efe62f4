"""Machines that were restored from an image, for tests: as qemukit's, but started by what is tested."""

import contextlib
import os
import signal

from qemukit import Machine
from qmpkit import Qmp

from snapengine.qemu.restore import restore_machine


class Adopted(Machine):
    """A machine that `restore_machine` started as the successor of `machine`; ended by `kill`."""

    def __init__(self, machine, restored):
        self.guest, self.accel, self.ram, self.qemu = machine.guest, machine.accel, machine.ram, machine.qemu
        self._serial, self._log, self._shared = machine._serial, machine._log, machine._shared
        self.room, self.process, self.pid = machine.room, restored.process, restored.pid
        self.__dict__["progress_address"] = machine.progress_address
        self.qmp = Qmp(restored.qmp)

    def kill(self):
        self.qmp.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.process.wait()


@contextlib.contextmanager
def restoring(image, machine, **options):
    """``with restoring(image, machine) as new``: the machine goes on from `image`; `machine` must be dead."""
    machine.progress_address  # noqa: B018 - known from now on; the new QEMU empties the file of the serial port
    restored = restore_machine(image, machine.command, qmp=str(machine.room / "restored"), **options)
    try:
        adopted = Adopted(machine, restored)
    except BaseException:
        restored.process.kill()
        restored.process.wait()
        raise
    try:
        yield adopted
    finally:
        adopted.kill()
        (machine.room / "restored").unlink(missing_ok=True)


def saved_ram(image, machine):
    """The bytes of the machine's RAM in its image."""
    largest = max(image.regions, key=lambda region: region.length)
    assert largest.length == machine.guest.memory
    return image.read(largest, 0, largest.length)

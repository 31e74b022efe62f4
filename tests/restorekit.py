"""Machines that are restored from an image: the code under test starts them, the kit watches them."""

import contextlib
import os
import signal

from snapengine.qemu.restore import restore_machine


@contextlib.contextmanager
def restoring(machines, image, machine, **options):
    """``with restoring(machines, image, machine) as new``: restores the ended `machine` from `image`."""
    machine.progress_address  # noqa: B018 - it is known from now on: the guest prints it only once
    setup = machines.setup_like(machine)
    command = [*setup.command, *setup.monitors]
    restored = restore_machine(image, command, qmp=str(setup.room / "restored"), **options)
    try:
        yield machines.adopt(setup, restored.pid, machine)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(restored.pid, signal.SIGKILL)
        restored.process.wait()


def saved_ram(image, machine):
    """The bytes of the machine's RAM in its image."""
    largest = max(image.regions, key=lambda region: region.length)
    assert largest.length == machine.guest.memory
    return image.read(largest, 0, largest.length)

"""The Linux guest: Debian's cloud kernel, and an initramfs whose only program is guests/worker.c."""

import atexit
import functools
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import guest_kernel
from machinekit import until

MIB = 1 << 20
SOURCE = Path(__file__).parent / "guests" / "worker.c"
KERNEL_LINE = "console=ttyS0 quiet panic=-1 nokaslr mitigations=off"
DISK_BYTES = MIB
REGULAR, FOLDER, DEVICE = 0o100755, 0o040755, 0o020600


def cpio_entry(name, mode, data=b"", device=(0, 0)):
    """One file of an initramfs, in the "newc" format (buffer-format.rst of the kernel)."""
    path = name.encode() + b"\0"
    fields = [0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0]
    header = b"070701" + b"".join(b"%08x" % field for field in fields)
    return _padded(header + path) + _padded(data)


def _padded(data):
    return data + bytes(-len(data) % 4)


@functools.cache
def initramfs():
    """The paths (kernel, initramfs); guest_kernel.NoKernel if no kernel is available."""
    kernel = guest_kernel.find()
    room = Path(tempfile.mkdtemp(prefix="snapengine-guests-"))
    atexit.register(shutil.rmtree, room)
    program = room / "init"
    command = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o", str(program), str(SOURCE)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    entries = [cpio_entry(name, FOLDER) for name in ("dev", "proc", "modules")]
    entries.append(cpio_entry("dev/console", DEVICE, device=(5, 1)))
    entries.append(cpio_entry("init", REGULAR, program.read_bytes()))
    for module in sorted(kernel.glob("*.ko")):
        entries.append(cpio_entry(f"modules/{module.name}", REGULAR, module.read_bytes()))
    entries.append(cpio_entry("TRAILER!!!", 0))
    (room / "initramfs").write_bytes(b"".join(entries))
    return kernel / "vmlinuz", room / "initramfs"


def make_disk(path):
    """Make an empty disk for the guest at `path`, and return `path`."""
    with open(path, "wb") as file:
        file.truncate(DISK_BYTES)
    return path


@dataclass(frozen=True)
class Linux:
    """A machine that writes to `size` MiB; `rate`, `batch` and `check` (of the disk) as in guests/worker.c.

    `disk`: a file made by make_disk(), or None. A second machine may open it while the first one runs:
    locking is off. To restore onto the same disk, use ``check="atleast"``.
    """

    size: int = 32
    memory: int = 160 * MIB
    rate: int = 0
    batch: int = 4096
    disk: Path | None = None
    check: str = "exact"
    fill = None

    @property
    def arguments(self):
        kernel, ramdisk = initramfs()
        worker = f"size={self.size} rate={self.rate} batch={self.batch}"
        arguments = ["-kernel", str(kernel), "-initrd", str(ramdisk)]
        if self.disk:
            worker += f" disk={self.check}"
            arguments += [
                *("-blockdev", f"driver=file,node-name=file0,filename={self.disk},locking=off"),
                *("-blockdev", "driver=raw,node-name=disk0,file=file0"),
                *("-device", "virtio-blk-pci,drive=disk0"),
            ]
        return [*arguments, "-append", f"{KERNEL_LINE} {worker}"]

    def wait_ready(self, machine):
        self.wait_round(machine)

    def wait_round(self, machine, rounds=1, start=0):
        """(round, records acknowledged) of the `rounds`th round printed from character `start` on.

        AssertionError if the guest has reported damage by then.
        """

        def look():
            text = machine.serial()[start:]
            failed = re.search(r"^FAIL .*", text, re.MULTILINE)
            assert not failed, failed[0]
            found = re.findall(r"^round (\d+) ok writes=\d+ records=(\d+)\r?\n", text, re.MULTILINE)
            machine.check_alive(found[rounds - 1 :])
            return found[rounds - 1 :]

        found = until(look, lambda: f"no {rounds} rounds: ...{machine.serial()[-300:]}")
        return int(found[0][0]), int(found[0][1])

    def progress(self, machine):
        """Address of the counter of written pages, as the guest printed it."""
        return self._printed(machine, "progress")

    def work_address(self, machine):
        """Address of the first page that the guest writes to, as the guest printed it."""
        return self._printed(machine, "memory")

    def _printed(self, machine, name):
        found = re.search(rf"^{name} at 0x([0-9a-f]+)", machine.serial(), re.MULTILINE)
        assert found, f"the guest has not printed its {name}"
        return int(found[1], 16)

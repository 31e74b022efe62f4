"""QemuTarget: a machine that stock QEMU runs, attached to from outside.

QEMU's process is attached to as any other (`snapengine.process.target`); its RAM blocks are tracked. T lies
between `stop` and `cont`: the devices' state is taken by QMP meanwhile, so it is of the same instant as the
memory. Tried on QEMU 7.2 and 10.0.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from snapengine.errors import MachineError, RegisterError, SnapengineError, TargetGoneError
from snapengine.kernel.backing import Backings
from snapengine.kernel.procmaps import Mapping as MemoryMapping
from snapengine.kernel.procmaps import covering, read_maps
from snapengine.kernel.uffd import Uffd
from snapengine.process import permissions
from snapengine.process.copied import Copy, copy_all
from snapengine.process.inject import inject_userfaultfd
from snapengine.qemu import machine
from snapengine.qemu.blobs import DEVICES, MACHINE, VIA_DEVICES
from snapengine.qemu.guard import Guard
from snapengine.qemu.monitor import Monitor
from snapengine.qemu.ram_blocks import RamBlock, locate, ram_blocks
from snapengine.qemu.replies import ask
from snapengine.regions import PAGE_BYTES, Region, kind_of
from snapengine.result import fitted_parts
from snapengine.targets.base import AttachedTarget

ROM_BYTES = 8 << 20  # of one block that is copied while the guest stands
TRACKED = ("anonymous", "shmem", "hugetlb")


class QemuTarget(AttachedTarget):
    """A running QEMU machine.

    Parameters
    ----------
    monitor:
        Its QMP connection. The target does not close it.
    pid:
        QEMU's process; 0: the one that listens at the monitor's Unix socket.
    block_snapshots:
        Disk (its device's or its node's name in `query-block`) → file: an external snapshot of each is taken
        at T, so the file that the disk had before keeps its content of T, and QEMU goes on in the new one.
    deadline:
        Seconds that a thread of QEMU may take to stop, for the moment in which it opens the userfaultfd.

    Raises (when the capture opens it)
    ----------------------------------
    MachineError
        The machine migrates, has a device whose memory accesses cannot be tracked, or QEMU refuses a command.
    AttachError
        This user may not attach to QEMU; the text says why.
    RegisterError
        A RAM block that the kernel cannot write-protect: a shared mapping of a file on a disk.
    """


    def __init__(
        self,
        monitor: Monitor,
        pid: int = 0,
        *,
        block_snapshots: Mapping[str, str] | None = None,
        deadline: float = 1.0,
    ) -> None:
        super().__init__(pid or monitor.peer_pid)
        self.monitor = monitor
        if not self.pid:
            raise MachineError(
                f"{monitor.address}: QEMU's process is not known (TCP, or a container): give its pid"
            )
        self.stop_parts_ns: dict[str, int] = {}
        """What the stop of the guest was spent on: ``stop``, ``block_snapshot``, ``device_state``, ``arm``
        (dirty logging: the last round) and ``cont``, by our clock; ``guest``: from QEMU's event STOP to
        RESUME, by QEMU's clock. What QEMU took to get to `stop`, and to answer `cont`, while the guest ran,
        is left out, so the parts come to no more than ``guest``."""
        self.moved_disks: list[str] = []
        """One line for each disk that goes on in another file since T, whatever becomes of the image."""
        self._disks = dict(block_snapshots or {})
        self._deadline = deadline
        self._info: permissions.ProcessInfo | None = None
        self._blocks: list[RamBlock] = []
        self._tracked: list[Region] = []
        self._copies: list[Copy] = []
        self._guard: Guard | None = None
        self._state_fd = self._state_set = -1
        self._machine: dict[str, Any] = {}
        self._changes: list[str] | None = None
        self._stopped_at = self._stood_ns = self._at = 0
        self._was_running = False
        self._saved: Callable[[], Any] | None = None

    # -- what a capture calls --

    def check(self) -> None:
        """Raise what speaks against attaching to QEMU: AttachError, TargetGoneError."""
        self._info = permissions.check_to_save(self.pid)

    def open(self, features: int) -> tuple[int, int, list[Region]]:
        """Attach, while the machine runs."""
        try:
            return self._attach()
        except BaseException:
            self._close_state_file()
            raise

    def _attach(self) -> tuple[int, int, list[Region]]:
        if self._info is None:
            self.check()
        info = self._info
        assert info is not None
        machine.refuse_busy(self.monitor)
        machine.refuse_blocked(self.monitor)
        self._open_state_file()
        self._refuse_another_process()
        machine.refuse_devices(self.monitor, self.pid)
        self._blocks = locate(ram_blocks(self.monitor), self.pid)
        tracked = self._tracked = self._sort(read_maps(self.pid))
        self._check_disks()
        self._machine = machine.describe(self.monitor, self.pid, self._blocks, VIA_DEVICES)
        injected = inject_userfaultfd(self.pid, deadline=self._deadline, info=info)
        self.injection_ns = injected.stop_ns
        if info.ksm_pages:
            self.warnings.append(
                f"KSM has merged {info.ksm_pages} pages of QEMU: pages that it merges from now on are lost "
                "(-machine mem-merge=off)"
            )
        return self.pid, injected.fd, tracked

    def cancelled(self) -> None:
        """From any thread: the capture is given up, so wait for no answer of QEMU's for long."""
        self.monitor.shorten_waits()

    def registered(self, uffd: Uffd) -> list[Region]:
        """All RAM blocks: one that the kernel refuses is an error when it is armed."""
        return self._tracked

    def pause(self) -> None:
        """Stop the guest, unless it stands already."""
        self.monitor.events()  # forget those of before
        self._was_running = ask(self.monitor, "query-status").flag("running")
        if self._was_running:
            self._guard = Guard(self.monitor.fileno(), [("cont", {})])
        self._at = self._stopped_at = time.monotonic_ns()
        stopped = self.monitor.send("stop") if self._was_running else None
        if not self._disks:
            self._saved = self._send_save()
        if stopped is not None:
            stopped()
        self._part("stop")

    def vmstate(self) -> dict[str, bytes]:
        """The devices' state at T, and what the machine is."""
        if self._disks:
            self._snapshot_disks()
            self._part("block_snapshot")
            self._saved = self._send_save()
        assert self._saved is not None
        self._saved()
        self._part("device_state")
        self._copied = [*copy_all(self.pid, self._copies)]
        return {}

    def resume(self) -> None:
        """Let the guest go on."""
        if not self._stopped_at:
            return
        self._part("arm")
        if self._was_running:
            self.monitor.execute("cont")
        self._part("cont")
        self._stood_ns = time.monotonic_ns() - self._stopped_at
        self._stopped_at = 0  # not before QEMU has said yes: what comes between has close() try again
        if self._guard is not None:
            self._guard.dismiss()
        self._note_events()

    def armed(self) -> None:
        """T is fixed, and the guest runs."""
        self._look_again()

    def late_warnings(self) -> list[str]:
        """Where the disks are now. Nothing of the RAM: QEMU maps it once."""
        return list(self.moved_disks)

    def record(self) -> dict[str, bytes]:
        """The blobs of the machine. Raises MachineError."""
        if self._changes is None:  # dirty logging: T was just now
            self._look_again()
        if self._changes:
            raise MachineError(
                "the machine was changed while its snapshot was prepared: " + "; ".join(self._changes)
            )
        size = os.fstat(self._state_fd).st_size
        if size <= 8:
            raise MachineError("QEMU wrote no device state")
        state = os.pread(self._state_fd, size, 0)
        return {MACHINE: machine.pack(self._machine), DEVICES: state}

    @property
    def stop_ns(self) -> int:
        """How long the guest stood, in nanoseconds, as QEMU's events tell; by our clock if they do not."""
        return self.stop_parts_ns.get("guest", self._stood_ns)

    def close(self, status: str) -> None:
        """Let the guest go on if it stands, and take back what QEMU was given. Idempotent."""
        try:
            if self._stopped_at:
                self.resume()
        except TargetGoneError:
            self._stopped_at = 0  # QEMU has ended: nothing stands
        finally:
            if self._guard is not None:
                if self._stopped_at:
                    self._guard.release()
                self._guard.dismiss()
            self._close_state_file()

    # -- parts --

    def _send_save(self) -> Callable[[], Any]:
        # live=false: otherwise QEMU gives up a stopped machine's disks, as after a migration.
        arguments = {"filename": f"/dev/fdset/{self._state_set}", "live": False}
        return self.monitor.send("xen-save-devices-state", arguments)

    def _look_again(self) -> None:
        """Whether blocks or devices came or went before T. Not at T itself: that would lengthen the stop."""
        now = machine.describe(self.monitor, self.pid, ram_blocks(self.monitor), VIA_DEVICES)
        self._changes = machine.changes(self._machine, now)

    def _part(self, name: str) -> None:
        now = time.monotonic_ns()
        self.stop_parts_ns[name] = now - self._at
        self._at = now

    def _note_events(self) -> None:
        stood = self.monitor.stood_ns()
        if stood is not None:
            self.stop_parts_ns["guest"] = stood
            self.stop_parts_ns = fitted_parts(self.stop_parts_ns, stood)

    def _sort(self, mappings: list[MemoryMapping]) -> list[Region]:
        tracked = []
        backings = Backings(self.pid)
        for block in self._blocks:
            length = -(-block.used // PAGE_BYTES) * PAGE_BYTES
            covered = covering(mappings, block.addr, block.addr + length)
            if not covered:
                raise MachineError(f"RAM block {block.name!r} is not mapped at {block.addr:#x}")
            shared = {mapping.shared for mapping in covered}.pop()
            found = [backings.of(mapping) for mapping in covered]
            writable = all("w" in mapping.perms for mapping in covered)
            if not writable or any(backing.kind not in TRACKED for backing in found):
                if length > ROM_BYTES:
                    raise RegisterError(
                        errno.EINVAL,
                        f"RAM block {block.name!r} ({covered[0]}) is a mapping that the kernel does not "
                        "write-protect: use memory-backend-ram, memory-backend-memfd or a file on a tmpfs",
                    )
                region = Region(block.name, block.addr, length)
                self.copied_regions.append(region)
                self._copies.append(Copy(region, covered[0], "all"))
                continue
            size = found[0].page_bytes
            if not shared and any(backing.kind == "shmem" for backing in found):
                # Guests give RAM back (balloon, free page reporting): with share=off only the event tells.
                self.events = frozenset(["EVENT_REMOVE"])
            kind = kind_of(size, shared)
            zeros = {m.inode for m, b in zip(covered, found, strict=True) if b.kind == "anonymous"} - {0}
            tracked.append(
                Region(block.name, block.addr, length, size, kind, zero_inode=max(zeros, default=0))
            )
        if not tracked:
            raise MachineError("the machine has no RAM that can be tracked")
        return tracked

    def _open_state_file(self) -> None:
        """QEMU writes the devices' state into a file of ours that it is handed, wherever it runs."""
        if not self.monitor.passes_descriptors:
            raise MachineError(f"{self.monitor.address}: the devices' state needs QMP on a Unix socket")
        self._state_fd = os.memfd_create("snapengine:devices", os.MFD_CLOEXEC)
        writable = os.open(f"/proc/self/fd/{self._state_fd}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            self._state_set = self.monitor.pass_file(writable)
        finally:
            os.close(writable)

    def _close_state_file(self) -> None:
        if self._state_fd < 0:
            return
        os.close(self._state_fd)
        self._state_fd = -1
        if self._state_set >= 0:
            with contextlib.suppress(SnapengineError):  # QEMU has ended, or hangs: nothing can be done
                self.monitor.execute("remove-fd", {"fdset-id": self._state_set})

    def _refuse_another_process(self) -> None:
        """Who opened the socket need not be QEMU: libvirt hands over one that listens already."""
        ours = os.fstat(self._state_fd)
        for number in os.listdir(f"/proc/{self.pid}/fd"):
            try:
                found = os.stat(f"/proc/{self.pid}/fd/{number}")
            except FileNotFoundError:
                continue  # closed meanwhile
            if (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino) and self.pid != os.getpid():
                return
        raise MachineError(
            f"process {self.pid} is not the QEMU that answers at {self.monitor.address}: give that one's pid"
        )

    def _check_disks(self) -> None:
        known = {disk["device"] or disk["node"] for disk in machine.disks(self.monitor)}
        for device, file in self._disks.items():
            if device not in known:
                raise MachineError(
                    f"--block-snapshot: no disk {device!r}; there are: {', '.join(sorted(known)) or 'none'}"
                )
            if os.path.exists(file):
                raise MachineError(f"--block-snapshot: {file} exists already")

    def _snapshot_disks(self) -> None:
        """All in one transaction: either every disk goes on in its new file, or none does."""
        files = [os.path.abspath(file) for file in self._disks.values()]
        nodes = {disk["node"] for disk in machine.disks(self.monitor) if not disk["device"]}
        actions = []
        for name, file in self._disks.items():
            disk = {"device": name}
            if name in nodes:
                disk = {"node-name": name, "snapshot-node-name": f"{name}-{uuid.uuid4().hex[:8]}"}
            data = disk | {"snapshot-file": os.path.abspath(file), "format": "qcow2"}
            actions.append({"type": "blockdev-snapshot-sync", "data": data})
        try:
            self.monitor.execute("transaction", {"actions": actions})
        except MachineError:
            used = {disk["file"] for disk in machine.disks(self.monitor)}  # a timeout says nothing
            for file in files:
                if file not in used:
                    Path(file).unlink(missing_ok=True)
            raise
        self.moved_disks = [
            f"disk {device} goes on in {file}; the file that it had keeps its content of T"
            for device, file in self._disks.items()
        ]

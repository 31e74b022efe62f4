"""QemuTarget: a machine of an unmodified QEMU, captured by attaching to its process.

It attaches to QEMU as to any other process (`snapengine.process.target`), and tracks the RAM blocks. T lies
between `stop` and `cont`. The device state is saved through QMP in the same stop, so it is of the same
instant as the memory. Tested with QEMU 7.2 and 10.0.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Mapping
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
from snapengine.qemu.disks import DiskSnapshots
from snapengine.qemu.guard import Guard
from snapengine.qemu.monitor import Monitor
from snapengine.qemu.ram_blocks import RamBlock, locate, ram_blocks
from snapengine.qemu.replies import ask
from snapengine.regions import PAGE_BYTES, Region, kind_of
from snapengine.result import fitted_parts
from snapengine.targets.base import AttachedTarget

ROM_BYTES = 8 << 20  # largest untrackable block; such a block is copied while the guest is stopped
TRACKED = ("anonymous", "shmem", "hugetlb")


class QemuTarget(AttachedTarget):
    """A running QEMU machine.

    Parameters
    ----------
    monitor:
        The QMP connection. The caller closes it.
    pid:
        QEMU's process; 0: the process that listens on the monitor's Unix socket.
    block_snapshots:
        Disk (the id of its ``-drive``, ``-blockdev`` or ``-device``) → new file. An external snapshot of each
        disk is taken at T: the previous file keeps its content of T, and QEMU writes to the new one.
    deadline:
        Timeout in seconds for stopping a thread of QEMU, which is done to create the userfaultfd.

    Raises (when the capture opens it)
    ----------------------------------
    MachineError
        The machine migrates or has a device whose writes cannot be tracked, or QEMU refuses a command.
    AttachError
        This user may not attach to QEMU; the message says why.
    RegisterError
        The kernel cannot write-protect a RAM block: a shared mapping of a file on a disk.
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
                f"{monitor.address}: QEMU's process is unknown (TCP, or a container): give its pid"
            )
        self.stop_parts_ns: dict[str, int] = {}
        """Durations of the phases of the guest's stop.

        ``stop``, ``block_snapshot``, ``device_state``, ``arm`` (dirty logging: the last round) and ``cont``
        are measured by our clock. ``guest`` is the time between QEMU's events STOP and RESUME, by QEMU's
        clock. Time while the guest ran is excluded (before `stop` took effect, and after `cont` did), so the
        sum of the phases does not exceed ``guest``.
        """
        self.moved_disks: list[str] = []
        """One line for each disk that uses a new file since T, even if the capture fails later."""
        self._disks = DiskSnapshots(monitor, block_snapshots or {})
        self._deadline = deadline
        self._info: permissions.ProcessInfo | None = None
        self._blocks: list[RamBlock] = []
        self._tracked: list[Region] = []
        self._copies: list[Copy] = []
        self._guard: Guard | None = None
        self._state_fd = self._state_set = -1
        self._machine: dict[str, Any] = {}
        self._changes: list[str] | None = None
        self._stopped_at = self._stopped_ns = self._part_began = 0
        self._was_running = False
        self._await_save: Callable[[], Any] | None = None

    # -- called by the capture --

    def check(self) -> None:
        """Check whether this user may attach to QEMU. Raises AttachError, TargetGoneError."""
        self._info = permissions.check_to_save(self.pid)

    def open(self, features: int) -> tuple[int, int, list[Region]]:
        """Attach to QEMU while the machine runs."""
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
        tracked = self._tracked = self._classify(read_maps(self.pid))
        self._disks.check()
        self._machine = machine.describe(self.monitor, self.pid, self._blocks, VIA_DEVICES)
        injected = inject_userfaultfd(self.pid, deadline=self._deadline, info=info)
        self.injection_ns = injected.stop_ns
        if info.ksm_pages:
            self.warnings.append(
                f"KSM has merged {info.ksm_pages} pages of QEMU: pages that it merges from now on are lost "
                "(use -machine mem-merge=off)"
            )
        return self.pid, injected.fd, tracked

    def cancelled(self) -> None:
        """The capture is being cancelled: shorten the waits for QEMU. Called on any thread."""
        self.monitor.shorten_waits()

    def registered(self, uffd: Uffd) -> list[Region]:
        """Return all RAM blocks. If the kernel refuses one, arming it raises the error."""
        return self._tracked

    def pause(self) -> None:
        """Stop the guest, unless it is stopped already."""
        self.monitor.events()  # discard earlier events
        self._was_running = ask(self.monitor, "query-status").flag("running")
        if self._was_running:
            self._guard = Guard(self.monitor.fileno(), [("cont", {})])
        self._part_began = self._stopped_at = time.monotonic_ns()
        await_stop = self.monitor.send("stop") if self._was_running else None
        if not self._disks:
            self._await_save = self._send_save()
        if await_stop is not None:
            await_stop()
        self._end_part("stop")

    def vmstate(self) -> dict[str, bytes]:
        """Wait until QEMU has saved the device state of T, and copy the untrackable blocks."""
        if self._disks:
            self.moved_disks = self._disks.take()
            self._end_part("block_snapshot")
            self._await_save = self._send_save()
        assert self._await_save is not None
        self._await_save()
        self._end_part("device_state")
        self._copied = [*copy_all(self.pid, self._copies)]
        return {}

    def resume(self) -> None:
        """Resume the guest, if it ran before `pause`."""
        if not self._stopped_at:
            return
        self._end_part("arm")
        if self._was_running:
            self.monitor.execute("cont")
        self._end_part("cont")
        self._stopped_ns = time.monotonic_ns() - self._stopped_at
        self._stopped_at = 0  # only after QEMU confirmed: after an exception close() tries again
        if self._guard is not None:
            self._guard.dismiss()
        self._record_guest_stop()

    def armed(self) -> None:
        """T has passed, and the guest runs again."""
        self._compare_again()

    def late_warnings(self) -> list[str]:
        """Return the new files of the disks. RAM blocks need no check: QEMU does not map them again."""
        return list(self.moved_disks)

    def record(self) -> dict[str, bytes]:
        """Return the blobs of the machine. Raises MachineError."""
        if self._changes is None:  # dirty logging: `armed` is not called, and T was just now
            self._compare_again()
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
        """How long the guest was stopped, in nanoseconds: by QEMU's events, or without them by our clock."""
        return self.stop_parts_ns.get("guest", self._stopped_ns)

    def close(self, status: str) -> None:
        """Resume the guest if it is stopped, and remove our descriptor from QEMU. Idempotent."""
        try:
            if self._stopped_at:
                self.resume()
        except TargetGoneError:
            self._stopped_at = 0  # QEMU has exited: nothing to resume
        finally:
            if self._guard is not None:
                if self._stopped_at:
                    self._guard.release()
                self._guard.dismiss()
            self._close_state_file()

    # -- steps --

    def _send_save(self) -> Callable[[], Any]:
        # live=false: otherwise QEMU releases the disks of a stopped machine, as after a migration.
        arguments = {"filename": f"/dev/fdset/{self._state_set}", "live": False}
        return self.monitor.send("xen-save-devices-state", arguments)

    def _compare_again(self) -> None:
        """Find blocks and devices added or removed before T. Runs after T, to keep the stop short."""
        now = machine.describe(self.monitor, self.pid, ram_blocks(self.monitor), VIA_DEVICES)
        self._changes = machine.changes(self._machine, now)

    def _end_part(self, name: str) -> None:
        now = time.monotonic_ns()
        self.stop_parts_ns[name] = now - self._part_began
        self._part_began = now

    def _record_guest_stop(self) -> None:
        duration = self.monitor.stop_duration_ns()
        if duration is not None:
            self.stop_parts_ns["guest"] = duration
            self.stop_parts_ns = fitted_parts(self.stop_parts_ns, duration)

    def _classify(self, mappings: list[MemoryMapping]) -> list[Region]:
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
                # Guests free RAM (balloon, free page reporting). With share=off only the event reports that.
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
        """Create the file for the device state, and pass it to QEMU, which may see other file systems."""
        if not self.monitor.passes_descriptors:
            raise MachineError(f"{self.monitor.address}: saving the device state needs QMP on a Unix socket")
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
            with contextlib.suppress(SnapengineError):  # QEMU has exited or hangs: nothing can be done
                self.monitor.execute("remove-fd", {"fdset-id": self._state_set})

    def _refuse_another_process(self) -> None:
        """Check that `pid` is QEMU. Another process may have opened the socket, as libvirt does."""
        ours = os.fstat(self._state_fd)
        for number in os.listdir(f"/proc/{self.pid}/fd"):
            try:
                found = os.stat(f"/proc/{self.pid}/fd/{number}")
            except FileNotFoundError:
                continue  # closed meanwhile
            if (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino) and self.pid != os.getpid():
                return
        raise MachineError(
            f"process {self.pid} is not the QEMU that answers at {self.monitor.address}: give QEMU's pid"
        )

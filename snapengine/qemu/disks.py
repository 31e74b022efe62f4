"""External snapshots of a machine's disks: at T QEMU goes over to new files, and the previous ones keep T."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from snapengine.errors import MachineError
from snapengine.qemu.monitor import Monitor
from snapengine.qemu.replies import ask_list

BASE_MAX = 22  # QEMU takes names of nodes of up to 31 characters
LIBVIRT_MONITOR = "charmonitor"  # the name that libvirt gives its monitor's character device
# What `take` appends to the name of a node, so that the next snapshot is asked for by the same name.
SUFFIX = re.compile(r"(-[0-9a-f]{8})+$")


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk with a medium, as `query-block` lists it. Names that it does not have are ""."""

    device: str
    """The id of -drive."""
    node: str
    """The top node, of -blockdev."""
    qdev: str
    """The id of -device."""
    file: str

    @property
    def base_node(self) -> str:
        """The name of the node before our snapshots."""
        return SUFFIX.sub("", self.node)

    @property
    def names(self) -> tuple[str, ...]:
        """All names that a user may give, the preferred one first."""
        names = (self.device, self.base_node, self.node, self.qdev)
        return tuple(dict.fromkeys(name for name in names if name and not name.startswith("#")))

    def is_called(self, name: str) -> bool:
        """Whether `name` is one of `names`, or the node's before a snapshot cut it off."""
        return name in self.names or (self.base_node != self.node and name[:BASE_MAX] == self.base_node)


def disks(monitor: Monitor) -> list[Disk]:
    """Return the disks with a medium."""
    found = []
    for item in ask_list(monitor, "query-block"):
        if item.has("inserted"):
            medium = item.object("inserted")
            node = medium.string("node-name") if medium.has("node-name") else ""
            qdev = item.string("qdev") if item.has("qdev") else ""
            found.append(Disk(item.string("device"), node, _device_id(qdev), medium.string("file")))
    return found


def _device_id(qdev: str) -> str:
    """The id in the object model's path of a device; devices without an id have none there."""
    named = re.match(r"/machine/peripheral/([^/]+)", qdev)
    return named[1] if named else "" if "/" in qdev else qdev


class DiskSnapshots:
    """The snapshots that one capture takes: `files` are disk (one of its `Disk.names`) → new file."""

    def __init__(self, monitor: Monitor, files: Mapping[str, str]) -> None:
        self._monitor = monitor
        self._files = {name: os.path.abspath(file) for name, file in files.items()}

    def __bool__(self) -> bool:
        return bool(self._files)

    def check(self) -> None:
        """Raise `MachineError` if a disk does not exist or is named twice, if a file exists already, or if
        libvirt runs the machine: the domain would boot from the old files next time."""
        if not self._files:
            return
        if any(item.string("label") == LIBVIRT_MONITOR for item in ask_list(self._monitor, "query-chardev")):
            raise MachineError(
                "--block-snapshot: libvirt runs this machine, and would not know of the new files: leave it "
                "out, or take the snapshot of the disks by `virsh snapshot-create-as --disk-only`"
            )
        found = disks(self._monitor)
        taken: dict[Disk, str] = {}
        for name, file in self._files.items():
            disk = _find(found, name)
            if disk in taken:
                raise MachineError(f"--block-snapshot: {taken[disk]!r} and {name!r} are one disk")
            taken[disk] = name
            if os.path.exists(file):
                raise MachineError(f"--block-snapshot: {file} exists already: give a new file")

    def take(self) -> list[str]:
        """Snapshot all disks in one transaction: either all of them use their new file, or none.

        Returns one line for each, which says where the content of T is.
        """
        found = disks(self._monitor)
        actions = []
        for name, file in self._files.items():
            disk = _find(found, name)
            data = {"device": disk.device}
            if not disk.device:
                overlay = f"{disk.base_node[:BASE_MAX]}-{uuid.uuid4().hex[:8]}"
                data = {"node-name": disk.node, "snapshot-node-name": overlay}
            data |= {"snapshot-file": file, "format": "qcow2"}
            actions.append({"type": "blockdev-snapshot-sync", "data": data})
        try:
            self._monitor.execute("transaction", {"actions": actions})
        except MachineError:
            used = {disk.file for disk in disks(self._monitor)}  # a timeout leaves the outcome open
            for file in self._files.values():
                if file not in used:
                    Path(file).unlink(missing_ok=True)
            raise
        return [
            f"disk {name} now uses {file}; its previous file keeps the content of T"
            for name, file in self._files.items()
        ]


def _find(found: list[Disk], name: str) -> Disk:
    fitting = [disk for disk in found if disk.is_called(name)]
    if len(fitting) == 1:
        return fitting[0]
    known = ", ".join(sorted("/".join(disk.names) for disk in found if disk.names)) or "none"
    what = f"{name!r} is the name of {len(fitting)} disks" if fitting else f"no disk {name!r}"
    raise MachineError(f"--block-snapshot: {what}; disks: {known}")

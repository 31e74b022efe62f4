"""What a QEMU machine is: enough to tell whether another one can go on from its snapshot.

The description is a blob of the image (FORMAT.md, "Blobs of a QEMU machine").
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from snapengine.errors import MachineError
from snapengine.qemu.blobs import VERSION
from snapengine.qemu.monitor import Monitor
from snapengine.qemu.ram_blocks import RamBlock
from snapengine.qemu.replies import ask, ask_list, ask_migration, ask_text

OWN_DMA = re.compile(r"vfio-.*|vhost-.*|.*-vhost-.*|ivshmem-.*|x-remote-object|x-pci-proxy-dev")
OWN_DMA_FILES = re.compile(r"/dev/(vhost-[\w-]+|vfio/.*)")
BUSY = ("setup", "active", "device", "cancelling", "pre-switchover", "postcopy-active", "postcopy-paused",
        "postcopy-recover", "postcopy-recover-setup", "postcopy-device", "wait-unplug", "colo")  # fmt: skip
NOT_SAVED_IN = (
    "inmigrate",
    "postmigrate",
    "finish-migrate",
    "save-vm",
    "restore-vm",
    "internal-error",
    "shutdown",
)


def version_of(monitor: Monitor) -> str:
    """``"7.2.22"``."""
    qemu = ask(monitor, "query-version").object("qemu")
    return ".".join(str(qemu.number(part, 31)) for part in ("major", "minor", "micro"))


def type_of(monitor: Monitor, path: str) -> str:
    """The type of an object in QEMU's tree."""
    return ask_text(monitor, "qom-get", {"path": path, "property": "type"})


def machine_type(monitor: Monitor) -> str:
    """The machine's type as `-machine` takes it: ``"pc-i440fx-7.2"``."""
    return type_of(monitor, "/machine").removesuffix("-machine")


def devices(monitor: Monitor) -> list[dict[str, str]]:
    """All devices: ``path`` in the tree and ``type``, in the order of the paths."""
    found = []
    for folder in ("/machine/peripheral", "/machine/peripheral-anon", "/machine/unattached"):
        for item in ask_list(monitor, "qom-list", {"path": folder}):
            kind, name = re.fullmatch(r"child<(.*)>", item.plain("type")), item.plain("name")
            if kind and (folder != "/machine/unattached" or name.startswith("device[")):
                found.append({"path": f"{folder}/{name}", "type": kind[1]})
    return sorted(found, key=lambda device: device["path"])


def disks(monitor: Monitor) -> list[dict[str, str]]:
    """The disks with a medium: the name of the ``device`` ("" if it has none), of its ``node``, and the
    ``file`` it has now."""
    found = []
    for item in ask_list(monitor, "query-block"):
        if item.has("inserted"):
            medium = item.object("inserted")
            node = medium.plain("node-name") if medium.has("node-name") else ""
            found.append({"device": item.plain("device"), "node": node, "file": medium.plain("file")})
    return found


def describe(monitor: Monitor, pid: int, blocks: Iterable[RamBlock], via: str) -> dict[str, Any]:
    """The description, in JSON types. ``via``: ``"device-state"`` or ``"migration-stream"``."""
    return {
        "version": VERSION,
        "via": via,
        "qemu": version_of(monitor),
        "machine_type": machine_type(monitor),
        "accelerator": "kvm" if uses_kvm(monitor) else "other",
        "cpus": [
            type_of(monitor, cpu.plain("qom-path")) for cpu in ask_list(monitor, "query-cpus-fast")
        ],
        "ram_blocks": [
            {"name": block.name, "used": block.used, "total": block.total, "page_size": block.page_size}
            for block in blocks
        ],
        "memory_backends": [
            {
                "id": item.plain("id") if item.has("id") else "",
                "size": item.number("size", 64),
                "share": item.flag("share") if item.has("share") else False,
            }
            for item in ask_list(monitor, "query-memdev")
        ],
        "devices": devices(monitor),
        "disks": disks(monitor),
        "command_line": command_line(pid),
    }


def uses_kvm(monitor: Monitor) -> bool:
    """Whether KVM runs the guest, and not TCG."""
    return ask(monitor, "query-kvm").flag("enabled")


def command_line(pid: int) -> list[str]:
    """The arguments that QEMU was started with; nothing if this user may not know."""
    if not pid:
        return []
    data = Path(f"/proc/{pid}/cmdline").read_bytes()
    return [part.decode("utf-8", "replace") for part in data.removesuffix(b"\0").split(b"\0")]


def refuse_busy(monitor: Monitor) -> str:
    """Raise `MachineError` if the machine migrates or is in no state to be saved; else its run state."""
    status = ask_migration(monitor).status
    if status in BUSY:
        raise MachineError(f"the machine is migrating already (its migration is {status})")
    run_state = ask(monitor, "query-status").plain("status")
    if run_state in NOT_SAVED_IN:
        # What the migration left stopped has given its disks away until `cont`.
        hint = ", after a migration of its own: let it run first (cont)" if run_state == "postmigrate" else ""
        raise MachineError(f"the machine cannot be saved: it is in the state {run_state}{hint}")
    return run_state


def refuse_missed_writes(monitor: Monitor) -> None:
    """Raise `MachineError` if QEMU's own dirty logging may miss writes of the running guest.

    Under TCG, QEMU 7.2 does: on a busy host the stream of a plain `migrate` held pages older than those of
    the guest that it had stopped in 7 of 700 runs, under KVM in 0 of 300.
    """
    if not uses_kvm(monitor):
        raise MachineError(
            "without KVM, QEMU's dirty logging misses writes of a running guest: use write tracking, attach, "
            "or stop the machine first"
        )


def refuse_blocked(monitor: Monitor) -> None:
    """Raise `MachineError` if a device of the machine blocks migration: its state cannot be saved."""
    answer = ask(monitor, "query-migrate")
    reasons = answer.plains("blocked-reasons") if answer.has("blocked-reasons") else []
    if reasons:
        raise MachineError(f"the machine cannot be saved: {reasons[0]}")


def refuse_devices(monitor: Monitor, pid: int) -> None:
    """Raise `MachineError`, with the name, for a device that writes to the machine's memory past QEMU."""
    for device in devices(monitor):
        if OWN_DMA.fullmatch(device["type"]):
            name = device["path"].rpartition("/")[2]
            raise MachineError(
                f"device {name} ({device['type']}) writes to the machine's memory past QEMU: that goes unseen"
            )
    for name in open_files(pid):
        if OWN_DMA_FILES.fullmatch(name):
            raise MachineError(
                f"the machine uses {name}: the kernel or a device writes to its memory past QEMU "
                "(for a network card: vhost=off)"
            )
    cards = monitor.human("info network")
    for kind in ("vhost-user", "vhost-vdpa"):
        if f"type={kind}" in cards:
            raise MachineError(
                f"a network card of the type {kind}: who is not QEMU writes to the machine's memory"
            )


def open_files(pid: int) -> list[str]:
    """What the descriptors of a process point to. Raises OSError."""
    names = []
    for number in os.listdir(f"/proc/{pid}/fd"):
        try:
            names.append(os.readlink(f"/proc/{pid}/fd/{number}"))
        except FileNotFoundError:
            continue  # closed meanwhile
    return names


def pack(description: Mapping[str, Any]) -> bytes:
    """The description as a blob."""
    return json.dumps(description, separators=(",", ":")).encode("ascii")


def differences(saved: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What keeps the machine `found` from going on from `saved`, one line each; nothing: it fits."""
    lines = []
    for name, word in (
        ("machine_type", "machine type"),
        ("qemu", "QEMU version"),
        ("accelerator", "accelerator"),
    ):
        if saved.get(name) is not None and saved[name] != found[name]:
            lines.append(f"{word}: {saved[name]} was saved, this is {found[name]}")
    if "cpus" in saved and saved["cpus"] != found["cpus"]:
        lines.append(f"CPUs: {_counted(saved['cpus'])} were saved, these are {_counted(found['cpus'])}")
    lines += _block_differences(saved["ram_blocks"], found["ram_blocks"])
    if "devices" in saved:
        lines += _device_differences(saved["devices"], found["devices"])
    return lines


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What became of one machine meanwhile, one line each: also of blocks that QEMU resizes by itself."""
    lines = differences(before, now)
    sizes = {block["name"]: block["used"] for block in now["ram_blocks"]}
    for block in before["ram_blocks"]:
        size = sizes.get(block["name"], block["used"])
        if size != block["used"]:
            lines.append(f"RAM block {block['name']} had {block['used']} bytes, and has {size}")
    return lines


def _block_differences(saved: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[str]:
    lines = []
    there = {block["name"]: block for block in found}
    for block in saved:
        other = there.pop(block["name"], None)
        if other is None:
            lines.append(f"RAM block {block['name']} ({block['used']} bytes) is missing")
        elif not _fits(block, other):
            lines.append(
                f"RAM block {block['name']}: {block['used']} bytes were saved, this has {other['used']}"
            )
    lines += [f"RAM block {name} ({block['used']} bytes) was not there" for name, block in there.items()]
    return lines


def _fits(saved: dict[str, Any], other: dict[str, Any]) -> bool:
    """QEMU resizes a block that it made larger than it uses (ACPI tables, for example)."""
    resized = other["total"] > other["used"] or saved.get("total", 0) > saved["used"]
    same_total = saved.get("total", other["total"]) == other["total"]
    return bool(
        saved["used"] == other["used"] or (resized and same_total and saved["used"] <= other["total"])
    )


def _device_differences(saved: list[dict[str, str]], found: list[dict[str, str]]) -> list[str]:
    before = {(item["path"], item["type"]) for item in saved}
    now = {(item["path"], item["type"]) for item in found}
    lines = [f"device {path} ({kind}) is missing" for path, kind in sorted(before - now)]
    return lines + [f"device {path} ({kind}) was not there" for path, kind in sorted(now - before)]


def _counted(names: list[str]) -> str:
    return ", ".join(f"{names.count(name)} x {name}" for name in sorted(set(names))) or "none"

"""Description of a QEMU machine, and checks whether a machine can be saved or restored.

The description is a blob of the image (FORMAT.md, "Blobs of a QEMU machine"). A restore compares it with the
new machine.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from snapengine.errors import MachineError
from snapengine.qemu.blobs import VERSION
from snapengine.qemu.disks import disks
from snapengine.qemu.monitor import Monitor
from snapengine.qemu.ram_blocks import RamBlock
from snapengine.qemu.replies import ask, ask_list, ask_migration, ask_text

EXTERNAL_DMA = re.compile(r"vfio-.*|vhost-.*|.*-vhost-.*|ivshmem-.*|x-remote-object|x-pci-proxy-dev")
EXTERNAL_DMA_FILES = re.compile(r"/dev/(vhost-[\w-]+|vfio/.*)")
UNATTACHED = "/machine/unattached/device"  # of devices that QEMU creates by itself, without the number
VERSIONED_TYPE = re.compile(r"-\d+\.\d+$")  # a machine type that QEMU keeps between versions
BUSY = ("setup", "active", "device", "cancelling", "pre-switchover", "postcopy-active", "postcopy-paused",
        "postcopy-recover", "postcopy-recover-setup", "postcopy-device", "wait-unplug", "colo")  # fmt: skip
UNSAVABLE_STATES = (
    "inmigrate",
    "postmigrate",
    "finish-migrate",
    "save-vm",
    "restore-vm",
    "internal-error",
    "shutdown",
)


def version_of(monitor: Monitor) -> str:
    """Return QEMU's version, such as ``"7.2.22"``."""
    qemu = ask(monitor, "query-version").object("qemu")
    return ".".join(str(qemu.number(part, 31)) for part in ("major", "minor", "micro"))


def type_of(monitor: Monitor, path: str) -> str:
    """Return the type of an object in QEMU's object model (QOM)."""
    return ask_text(monitor, "qom-get", {"path": path, "property": "type"})


def machine_type(monitor: Monitor) -> str:
    """Return the machine type as `-machine` takes it, such as ``"pc-i440fx-7.2"``."""
    return type_of(monitor, "/machine").removesuffix("-machine")


def devices(monitor: Monitor) -> list[dict[str, str]]:
    """Return all devices with ``path`` in the QOM tree and ``type``, sorted by path."""
    found = []
    for folder in ("/machine/peripheral", "/machine/peripheral-anon", "/machine/unattached"):
        for item in ask_list(monitor, "qom-list", {"path": folder}):
            kind, name = re.fullmatch(r"child<(.*)>", item.string("type")), item.string("name")
            if kind and (folder != "/machine/unattached" or name.startswith("device[")):
                found.append({"path": f"{folder}/{name}", "type": kind[1]})
    return sorted(found, key=lambda device: device["path"])


def describe(monitor: Monitor, pid: int, blocks: Iterable[RamBlock], via: str) -> dict[str, Any]:
    """Return the description in JSON types. ``via`` is ``"device-state"`` or ``"migration-stream"``."""
    return {
        "version": VERSION,
        "via": via,
        "qemu": version_of(monitor),
        "machine_type": machine_type(monitor),
        "accelerator": "kvm" if uses_kvm(monitor) else "other",
        "cpus": [type_of(monitor, cpu.string("qom-path")) for cpu in ask_list(monitor, "query-cpus-fast")],
        "ram_blocks": [
            {"name": block.name, "used": block.used, "total": block.total, "page_size": block.page_size}
            for block in blocks
        ],
        "memory_backends": [
            {
                "id": item.string("id") if item.has("id") else "",
                "size": item.number("size", 64),
                "share": item.flag("share") if item.has("share") else False,
            }
            for item in ask_list(monitor, "query-memdev")
        ],
        "devices": devices(monitor),
        "disks": [asdict(disk) for disk in disks(monitor)],
        "command_line": command_line(pid),
    }


def uses_kvm(monitor: Monitor) -> bool:
    """Return whether the guest runs with KVM."""
    return ask(monitor, "query-kvm").flag("enabled")


def command_line(pid: int) -> list[str]:
    """Return QEMU's command line; an empty list if `pid` is 0."""
    if not pid:
        return []
    data = Path(f"/proc/{pid}/cmdline").read_bytes()
    return [part.decode("utf-8", "replace") for part in data.removesuffix(b"\0").split(b"\0")]


def refuse_busy(monitor: Monitor) -> str:
    """Return the run state. Raises `MachineError` if the machine migrates or its state cannot be saved."""
    status = ask_migration(monitor).status
    if status in BUSY:
        raise MachineError(f"the machine is migrating already ({status}): wait, or cancel it")
    run_state = ask(monitor, "query-status").string("status")
    if run_state in UNSAVABLE_STATES:
        # After a migration QEMU has released its disks until `cont`.
        hint = ", after a migration: resume it first (cont)" if run_state == "postmigrate" else ""
        raise MachineError(f"the machine cannot be saved in the state {run_state}{hint}")
    return run_state


def refuse_missed_writes(monitor: Monitor) -> None:
    """Raise `MachineError` if QEMU's own dirty logging may miss writes of the running guest.

    QEMU 7.2 misses writes under TCG: on a busy host, in 7 of 700 runs, the stream of a plain `migrate` held
    older versions of pages than the stopped guest. Under KVM this happened in 0 of 300 runs.
    """
    if not uses_kvm(monitor):
        raise MachineError(
            "without KVM, QEMU's dirty logging misses writes of a running guest: use write tracking, attach "
            "to QEMU, or stop the machine first"
        )


def refuse_blocked(monitor: Monitor) -> None:
    """Raise `MachineError` if a device blocks migration, and with it the saving of device state."""
    reply = ask(monitor, "query-migrate")
    reasons = reply.strings("blocked-reasons") if reply.has("blocked-reasons") else []
    if reasons:
        raise MachineError(f"the machine cannot be saved: {reasons[0]}")


def refuse_devices(monitor: Monitor, pid: int) -> None:
    """Raise `MachineError` if a device writes to guest memory from outside QEMU's process."""
    for device in devices(monitor):
        if EXTERNAL_DMA.fullmatch(device["type"]):
            name = device["path"].rpartition("/")[2]
            raise MachineError(
                f"device {name} ({device['type']}) writes to guest memory from outside QEMU's process, which "
                "cannot be tracked: remove the device"
            )
    for name in open_files(pid):
        if EXTERNAL_DMA_FILES.fullmatch(name):
            raise MachineError(
                f"the machine uses {name}: the kernel or a device writes to guest memory from outside QEMU's "
                "process, which cannot be tracked (for a network card: vhost=off)"
            )
    cards = monitor.human("info network")
    for kind in ("vhost-user", "vhost-vdpa"):
        if f"type={kind}" in cards:
            raise MachineError(
                f"a network card of the type {kind}: another process or a device writes to guest memory, "
                "which cannot be tracked: use another network backend"
            )


def open_files(pid: int) -> list[str]:
    """Return the link targets of a process's descriptors. Raises OSError."""
    names = []
    for number in os.listdir(f"/proc/{pid}/fd"):
        try:
            names.append(os.readlink(f"/proc/{pid}/fd/{number}"))
        except FileNotFoundError:
            continue  # closed meanwhile
    return names


def pack(description: Mapping[str, Any]) -> bytes:
    """Encode the description as a blob."""
    return json.dumps(description, separators=(",", ":")).encode("ascii")


def differences(saved: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Return one line for each difference that keeps the machine `found` from loading `saved`.

    Another version of QEMU is none if the machine type has a version: such types are made for that. Then the
    devices that QEMU creates by itself may differ, too. See `version_warnings`.
    """
    lines = []
    for name, word in (
        ("machine_type", "machine type"),
        ("qemu", "QEMU version"),
        ("accelerator", "accelerator"),
    ):
        allowed = name == "qemu" and _other_version(saved, found)
        if saved.get(name) is not None and saved[name] != found[name] and not allowed:
            lines.append(f"{word}: {saved[name]} was saved, this is {found[name]}")
    if "cpus" in saved and saved["cpus"] != found["cpus"]:
        lines.append(f"CPUs: {_counted(saved['cpus'])} were saved, these are {_counted(found['cpus'])}")
    lines += _block_differences(saved["ram_blocks"], found["ram_blocks"])
    if "devices" in saved:
        own, internal = _device_differences(saved["devices"], found["devices"])
        lines += own if _other_version(saved, found) else own + internal
    return lines


def version_warnings(saved: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Return what may differ since `found` has the same versioned type in another version of QEMU."""
    if not _other_version(saved, found):
        return []
    lines = [f"QEMU version: {saved['qemu']} was saved, this is {found['qemu']}"]
    return lines + _device_differences(saved.get("devices", []), found["devices"])[1]


def _other_version(saved: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Whether only QEMU's version differs, and the machine type is one that QEMU keeps between versions."""
    kind = saved.get("machine_type")
    known = saved.get("qemu") is not None and saved["qemu"] != found["qemu"]
    return known and kind == found["machine_type"] and VERSIONED_TYPE.search(kind or "") is not None


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return one line for each change of one machine over time, including blocks that QEMU itself resized."""
    lines = differences(before, now)
    sizes = {block["name"]: block["used"] for block in now["ram_blocks"]}
    for block in before["ram_blocks"]:
        size = sizes.get(block["name"], block["used"])
        if size != block["used"]:
            lines.append(f"RAM block {block['name']} had {block['used']} bytes and now has {size}")
    return lines


def _block_differences(saved: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[str]:
    lines = []
    unmatched = {block["name"]: block for block in found}
    for block in saved:
        other = unmatched.pop(block["name"], None)
        if other is None:
            lines.append(f"RAM block {block['name']} ({block['used']} bytes) is missing")
        elif not _fits(block, other):
            lines.append(
                f"RAM block {block['name']}: {block['used']} bytes were saved, this has {other['used']}"
            )
    lines += [f"RAM block {name} ({block['used']} bytes) was not there" for name, block in unmatched.items()]
    return lines


def _fits(saved: dict[str, Any], other: dict[str, Any]) -> bool:
    """Sizes may differ where QEMU allocates more than it uses (ACPI tables): it resizes such blocks."""
    resized = other["total"] > other["used"] or saved.get("total", 0) > saved["used"]
    same_total = saved.get("total", other["total"]) == other["total"]
    return bool(
        saved["used"] == other["used"] or (resized and same_total and saved["used"] <= other["total"])
    )


def _device_differences(
    saved: list[dict[str, str]], found: list[dict[str, str]]
) -> tuple[list[str], list[str]]:
    """One line for each device of the command line that differs, and for those that QEMU creates by itself.

    Devices without a name are numbered in the order of creation, which differs between versions of QEMU. So
    only how many of each type there are is compared.
    """
    before, now = Counter(map(_device, saved)), Counter(map(_device, found))
    own: list[str] = []
    internal: list[str] = []
    for difference, word in ((before - now, "is missing"), (now - before, "was not there")):
        for path, kind in sorted(difference.elements()):
            lines = internal if path == UNATTACHED else own
            lines.append(f"device {path} ({kind}) {word}")
    return own, internal


def _device(item: Mapping[str, str]) -> tuple[str, str]:
    return re.sub(r"(?<=/device)\[\d+\]$", "", item["path"]), item["type"]


def _counted(names: list[str]) -> str:
    return ", ".join(f"{names.count(name)} x {name}" for name in sorted(set(names))) or "none"

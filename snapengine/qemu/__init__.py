"""QEMU machines: live snapshots, restoring machines, and conversion of migration streams to images.

>>> from snapengine.qemu import QemuTarget, ingest, restore_machine, save_by_migration
"""

from __future__ import annotations

TYPE_CHECKING = False  # type checkers treat this name as true; it saves the import of `typing`

if TYPE_CHECKING:
    from snapengine.qemu.from_stream import ingest
    from snapengine.qemu.restore import restore_machine
    from snapengine.qemu.target import QemuTarget
    from snapengine.qemu.via_migration import save_by_migration

_PLACES = {
    "QemuTarget": "target",
    "ingest": "from_stream",
    "restore_machine": "restore",
    "save_by_migration": "via_migration",
}
"""Name -> module. A module is imported on first use of its name, because most of them import asyncio."""

__all__ = ["QemuTarget", "ingest", "restore_machine", "save_by_migration"]

if not TYPE_CHECKING:  # with a `__getattr__`, type checkers would accept every misspelled name
    from snapengine.base.lazy import exports

    __getattr__, __dir__ = exports(__name__, _PLACES)

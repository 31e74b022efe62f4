"""QEMU machines: live snapshots, machines restored from them, and migration streams as images.

>>> from snapengine.qemu import QemuTarget, ingest, restore_machine, save_by_migration
"""

from __future__ import annotations

TYPE_CHECKING = False  # type checkers know the name, and the import of `typing` is saved

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
"""Name and module. Each is imported on first use: most of the modules need asyncio, some of them do not."""

__all__ = ["QemuTarget", "ingest", "restore_machine", "save_by_migration"]

if not TYPE_CHECKING:  # or every misspelled name would have a type
    from snapengine.base.lazy import exports

    __getattr__, __dir__ = exports(__name__, _PLACES)

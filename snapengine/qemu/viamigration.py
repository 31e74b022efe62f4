"""A machine saved by QEMU's own migration, its stream taken apart into our image.

For users who may not attach to QEMU. Write tracking is QEMU's background-snapshot, dirty logging its plain
`migrate`. What was set for migration before is set again afterwards, and the machine runs as before.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from snapengine.errors import CaptureCancelled, MachineError, StreamError, TargetGoneError
from snapengine.options import WRITE_TRACKING, Options
from snapengine.qemu import machine
from snapengine.qemu.blobs import MACHINE, VIA_STREAM
from snapengine.qemu.ingest import ingest
from snapengine.qemu.monitor import Monitor
from snapengine.qemu.ramblocks import ram_blocks
from snapengine.result import Result

STREAM_NAME = "snapengine-save"
BACKGROUND = "background-snapshot"
# Each makes a stream that does not hold the pages themselves, or not all of them.
UNWANTED = ("xbzrle", "compress", "multifd", "postcopy-ram", "mapped-ram", "x-ignore-shared", "dirty-bitmaps",
            "block", "release-ram", "x-colo", "return-path", "zero-copy-send",
            "postcopy-preempt")  # fmt: skip
NO_LIMIT = 1 << 40  # bytes a second
END_SECONDS = 30.0


def save_by_migration(
    monitor: Monitor, sink: Any, options: Options, *, progress: Callable[[int], None] | None = None
) -> Result:
    """Let QEMU save itself into `sink`.

    ``progress`` is called with the bytes of the stream so far, ten times a second.

    Raises
    ------
    MachineError
        The machine migrates already, a device blocks migration, or QEMU refuses; the text has the reason.
    StreamError
        The stream holds what is not understood.
    """
    machine.refuse_busy(monitor)
    machine.refuse_blocked(monitor)
    was_running = bool(monitor.execute("query-status")["running"])
    background = options.method == WRITE_TRACKING and was_running  # QEMU would let a paused one run
    description = machine.describe(monitor, monitor.peer_pid, ram_blocks(monitor), VIA_STREAM)
    migration = _Migration(monitor, options)
    with _settings(monitor, options, background):
        read_fd = migration.start()
        try:
            return ingest(
                read_fd, sink, options, direct=background, extra_blobs={MACHINE: machine.pack(description)},
                name="QEMU's stream", watch=lambda done: migration.watch(done, progress),
                finish=migration.finish,
            )  # fmt: skip
        except StreamError:
            migration.raise_failure()  # the stream was cut because the migration failed
            raise
        finally:
            os.close(read_fd)
            migration.end()
            if was_running and not monitor.execute("query-status")["running"]:
                monitor.execute("cont")


class _Migration:
    """One migration of QEMU's into a pipe."""

    def __init__(self, monitor: Monitor, options: Options) -> None:
        self._monitor = monitor
        self._options = options
        self._deadline = 0.0

    def start(self) -> int:
        """Begin; returns the pipe's end to read from."""
        read_fd, write_fd = os.pipe()
        try:
            self._monitor.pass_descriptor(write_fd, STREAM_NAME)
            self._monitor.execute("migrate", {"uri": f"fd:{STREAM_NAME}"})
        except BaseException:
            os.close(read_fd)
            raise
        finally:
            os.close(write_fd)
        self._deadline = time.monotonic() + self._options.max_seconds
        return read_fd

    def watch(self, done: int, progress: Callable[[int], None] | None) -> None:
        """Ten times a second, while the stream is read."""
        if progress is not None:
            progress(done)
        self.raise_failure()
        if self._options.method != WRITE_TRACKING and time.monotonic() > self._deadline:
            raise MachineError(
                f"QEMU's migration did not converge within {self._options.max_seconds:g} s: the guest writes "
                "faster than the sink takes it"
            )

    def raise_failure(self) -> None:
        """Raise what QEMU says of a migration that failed."""
        answer = self._answer()
        if answer.get("status") == "failed":
            raise MachineError(f"QEMU's migration failed: {answer.get('error-desc', 'it does not say why')}")
        if answer.get("status") == "cancelled":
            raise CaptureCancelled("QEMU's migration was cancelled")

    def finish(self) -> dict[str, Any]:
        """The stream has ended: what QEMU says of it, for the figures. It says so a moment later."""
        self._await_end()
        self.raise_failure()
        answer = self._answer()
        if answer.get("status") != "completed":
            raise MachineError(f"QEMU's migration is {answer.get('status')}, though its stream is complete")
        rounds = int(answer.get("ram", {}).get("dirty-sync-count", 0))
        return {"stop_ns": int(answer.get("downtime", 0)) * 10**6, "rounds": rounds}

    def end(self) -> None:
        """Whatever happened: no migration runs any more."""
        if self._answer().get("status", "none") in machine.BUSY:
            self._monitor.execute("migrate_cancel")
            self._await_end()

    def _answer(self) -> dict[str, Any]:
        return dict(self._monitor.execute("query-migrate"))

    def _await_end(self) -> None:
        deadline = time.monotonic() + END_SECONDS
        while self._answer().get("status", "none") in machine.BUSY and time.monotonic() < deadline:
            time.sleep(0.005)


@contextlib.contextmanager
def _settings(monitor: Monitor, options: Options, background: bool) -> Iterator[None]:
    """Capabilities and parameters for our stream, and back again."""
    now = {item["capability"]: item["state"] for item in monitor.execute("query-migrate-capabilities")}
    wanted = {name: False for name in UNWANTED if now.get(name)}
    if background and BACKGROUND not in now:
        raise MachineError("this QEMU has no background-snapshot (6.0 has): --method dirty-logging")
    if now.get(BACKGROUND, False) != background:
        wanted[BACKGROUND] = background
    limits = {
        "max-bandwidth": options.rate_limit or NO_LIMIT,
        "downtime-limit": int(options.downtime_limit * 1000),
    }
    before = monitor.execute("query-migrate-parameters")
    set_capabilities(monitor, wanted)
    try:
        monitor.execute("migrate-set-parameters", limits)
        yield
    finally:
        with contextlib.suppress(TargetGoneError):
            set_capabilities(monitor, {name: now[name] for name in wanted})
            monitor.execute("migrate-set-parameters", {name: before[name] for name in limits})


def set_capabilities(monitor: Monitor, states: dict[str, bool]) -> None:
    """Switch capabilities, those that exclude others first off. Raises MachineError."""
    for state in (False, True):
        items = [{"capability": name, "state": state} for name, value in states.items() if value is state]
        if items:
            monitor.execute("migrate-set-capabilities", {"capabilities": items})

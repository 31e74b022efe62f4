"""Saving a machine by QEMU's own migration, whose stream is converted to an image.

This needs no permission to attach to QEMU. Write tracking uses QEMU's background-snapshot, dirty logging its
plain `migrate`. Afterwards the previous migration settings are restored, and the machine runs as before. A
guard does that if this process is killed.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from snapengine.errors import CaptureCancelled, MachineError, StreamError, TargetGoneError
from snapengine.options import WRITE_TRACKING, Options
from snapengine.qemu import machine
from snapengine.qemu.blobs import MACHINE, VIA_STREAM
from snapengine.qemu.from_stream import drain, ingest
from snapengine.qemu.guard import Command, Guard
from snapengine.qemu.monitor import Monitor
from snapengine.qemu.ram_blocks import ram_blocks
from snapengine.qemu.replies import Migration, ask, ask_list, ask_migration
from snapengine.result import Result

STREAM_NAME = "snapengine-save"
BACKGROUND = "background-snapshot"
# Capabilities to disable: with them the stream lacks pages or their plain content, or QEMU waits for a reply.
DISABLED = ("xbzrle", "compress", "multifd", "postcopy-ram", "mapped-ram", "x-ignore-shared", "dirty-bitmaps",
            "block", "release-ram", "x-colo", "return-path", "zero-copy-send", "postcopy-preempt",
            "pause-before-switchover", "switchover-ack", "validate-uuid")  # fmt: skip
# QEMU refuses background-snapshot together with these.
DISABLED_IN_BACKGROUND = ("auto-converge", "dirty-limit", "late-block-activate", "postcopy-blocktime",
                          "rdma-pin-all")  # fmt: skip
NO_LIMIT = 1 << 40  # bytes a second
END_SECONDS = 30.0
GUARD_REPEATS = 3


def save_by_migration(
    monitor: Monitor, sink: Any, options: Options, *, progress: Callable[[int], None] | None = None
) -> Result:
    """Save the machine to `sink` by QEMU's migration.

    ``progress`` is called ten times a second with the bytes of the stream so far.

    Raises
    ------
    MachineError
        The machine migrates already, a device blocks migration, QEMU's dirty logging may miss writes (without
        KVM), or QEMU refuses a command. The message contains the reason.
    StreamError
        The stream uses an unsupported feature.
    """
    machine.refuse_busy(monitor)
    machine.refuse_blocked(monitor)
    was_running = ask(monitor, "query-status").flag("running")
    background = options.method == WRITE_TRACKING and was_running  # QEMU resumes a paused guest after it
    if was_running and not background:
        machine.refuse_missed_writes(monitor)
    description = machine.describe(monitor, monitor.peer_pid, ram_blocks(monitor), VIA_STREAM)
    settings, previous = _settings(monitor, options, background)
    with contextlib.ExitStack() as stack:
        migration = _Migration(monitor, options, was_running, background)
        stack.callback(migration.close)
        undo = [*previous, ("cont", {})] if was_running and not background else previous
        guard = Guard(monitor.fileno(), undo, repeats=GUARD_REPEATS,
                      drain_fd=migration.read_fd if background else -1)  # fmt: skip
        stack.callback(guard.dismiss)
        stack.callback(_restore_settings, monitor, previous)
        for command, arguments in settings:
            monitor.execute(command, arguments)
        stack.callback(migration.resume)
        stack.callback(migration.end)
        migration.start()
        try:
            return ingest(
                migration.read_fd, sink, options, direct=background,
                extra_blobs={MACHINE: machine.pack(description)}, name="QEMU's stream",
                watch=lambda done: migration.watch(done, progress), finish=migration.finish,
            )  # fmt: skip
        except StreamError:
            migration.raise_failure()  # the stream is truncated because the migration failed
            raise


class _Migration:
    """One migration into a pipe. Call `end`, then `close`."""

    def __init__(self, monitor: Monitor, options: Options, was_running: bool, background: bool) -> None:
        self._monitor = monitor
        self._options = options
        self._was_running = was_running
        self._background = background
        self._deadline = math.inf
        self.read_fd, self._write_fd = os.pipe()

    def start(self) -> None:
        """Start the migration."""
        self._monitor.events()  # discard earlier events
        try:
            self._monitor.pass_descriptor(self._write_fd, STREAM_NAME)
            self._monitor.execute("migrate", {"uri": f"fd:{STREAM_NAME}"})
        except BaseException:
            # A duplicate left in QEMU would keep the pipe open. `migrate` consumes it, unless QEMU refuses.
            with contextlib.suppress(MachineError, TargetGoneError):
                self._monitor.execute("closefd", {"fdname": STREAM_NAME})
            raise
        finally:
            self._close_writer()
        if not self._background:
            self._deadline = time.monotonic() + self._options.max_seconds

    def watch(self, done: int, progress: Callable[[int], None] | None) -> None:
        """Check the migration. Called ten times a second while the stream is read and the image written."""
        if progress is not None:
            progress(done)
        self.raise_failure()
        if time.monotonic() > self._deadline:
            raise MachineError(
                f"QEMU's migration did not converge within {self._options.max_seconds:g} s: the guest writes "
                "faster than the sink: use write tracking or a faster sink"
            )

    def raise_failure(self) -> None:
        """Raise QEMU's error if the migration failed or was cancelled."""
        state = self._query()
        if state.status == "failed":
            raise MachineError(f"QEMU's migration failed: {state.reason}")
        if state.status == "cancelled":
            raise CaptureCancelled("QEMU's migration was cancelled")

    def finish(self) -> dict[str, Any]:
        """Resume the guest after the end of the stream; return fields of the result that QEMU measured.

        QEMU reports the end of the migration a moment after the end of the stream.
        """
        self._deadline = math.inf
        self._await_end()
        self.raise_failure()
        state = self._query()
        if state.status != "completed":
            raise MachineError(f"QEMU's migration is {state.status}, though its stream is complete")
        self.resume()
        stop_ns = self._monitor.stop_duration_ns()
        if stop_ns is None:
            stop_ns = state.count("downtime") * 10**6
        rounds = state.object("ram").count("dirty-sync-count") if state.has("ram") else 0
        return {"stop_ns": stop_ns, "rounds": rounds}

    def resume(self) -> None:
        """Resume the guest if it ran before: a completed plain `migrate` leaves it stopped."""
        if self._was_running and not ask(self._monitor, "query-status").flag("running"):
            self._monitor.execute("cont")

    def end(self) -> None:
        """End the migration, whatever its state."""
        try:
            if self._background:
                drain(self.read_fd)
            elif self._query().status in machine.BUSY:
                self._monitor.execute("migrate_cancel")
        finally:
            self.close()  # QEMU may be blocked in write()
        self._await_end()

    def close(self) -> None:
        """Close the pipe. Idempotent."""
        self._close_writer()
        if self.read_fd >= 0:
            os.close(self.read_fd)
            self.read_fd = -1

    def _close_writer(self) -> None:
        if self._write_fd >= 0:
            os.close(self._write_fd)
            self._write_fd = -1

    def _query(self) -> Migration:
        return ask_migration(self._monitor)

    def _await_end(self) -> None:
        deadline = time.monotonic() + END_SECONDS
        while self._query().status in machine.BUSY and time.monotonic() < deadline:
            time.sleep(0.005)


def _settings(monitor: Monitor, options: Options, background: bool) -> tuple[list[Command], list[Command]]:
    """Return the commands that set capabilities and parameters for our stream, and those that undo it."""
    found = ask_list(monitor, "query-migrate-capabilities")
    now = {item.string("capability"): item.flag("state") for item in found}
    if background and BACKGROUND not in now:
        raise MachineError("this QEMU lacks background-snapshot (since 6.0): use --method dirty-logging")
    disabled = DISABLED + DISABLED_IN_BACKGROUND if background else DISABLED
    wanted = {name: False for name in disabled if now.get(name)}
    if now.get(BACKGROUND, False) != background:
        wanted[BACKGROUND] = background
    limits = {
        "max-bandwidth": options.rate_limit or NO_LIMIT,
        "downtime-limit": int(options.downtime_limit * 1000),
    }
    parameters = ask(monitor, "query-migrate-parameters")
    before = {name: parameters.number(name, 64) for name in limits}
    settings = [*_capabilities(wanted), ("migrate-set-parameters", limits)]
    previous = _capabilities({name: now[name] for name in wanted})
    return settings, [*previous, ("migrate-set-parameters", before)]


def _capabilities(states: dict[str, bool]) -> list[Command]:
    """Return commands that set capabilities. They disable first, because some exclude each other."""
    found: list[Command] = []
    for state in (False, True):
        items = [{"capability": name, "state": state} for name, value in states.items() if value is state]
        if items:
            found.append(("migrate-set-capabilities", {"capabilities": items}))
    return found


def _restore_settings(monitor: Monitor, commands: Sequence[Command]) -> None:
    """Execute all commands, even if QEMU refuses one. If QEMU has exited, there is nothing to restore."""
    with contextlib.suppress(TargetGoneError), contextlib.ExitStack() as stack:
        for command, arguments in reversed(commands):
            stack.callback(monitor.execute, command, arguments)

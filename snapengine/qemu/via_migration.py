"""A machine saved by QEMU's own migration, its stream taken apart into our image.

For users who may not attach to QEMU. Write tracking is QEMU's background-snapshot, dirty logging its plain
`migrate`. What was set for migration before is set again afterwards, and the machine runs as before: from the
first setting on a guard stands by, should we be killed.
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
# Each makes a stream that does not hold the pages themselves, or not all of them, or waits for an answer.
UNWANTED = ("xbzrle", "compress", "multifd", "postcopy-ram", "mapped-ram", "x-ignore-shared", "dirty-bitmaps",
            "block", "release-ram", "x-colo", "return-path", "zero-copy-send", "postcopy-preempt",
            "pause-before-switchover", "switchover-ack", "validate-uuid")  # fmt: skip
# QEMU refuses background-snapshot beside them.
NOT_IN_BACKGROUND = ("auto-converge", "dirty-limit", "late-block-activate", "postcopy-blocktime",
                     "rdma-pin-all")  # fmt: skip
NO_LIMIT = 1 << 40  # bytes a second
END_SECONDS = 30.0
GUARD_TURNS = 3


def save_by_migration(
    monitor: Monitor, sink: Any, options: Options, *, progress: Callable[[int], None] | None = None
) -> Result:
    """Let QEMU save itself into `sink`.

    ``progress`` is called with the bytes of the stream so far, ten times a second.

    Raises
    ------
    MachineError
        The machine migrates already, a device blocks migration, QEMU's dirty logging may miss writes (without
        KVM), or QEMU refuses; the text has the reason.
    StreamError
        The stream holds what is not understood.
    """
    machine.refuse_busy(monitor)
    machine.refuse_blocked(monitor)
    was_running = ask(monitor, "query-status").flag("running")
    background = options.method == WRITE_TRACKING and was_running  # QEMU would let a paused one run
    if was_running and not background:
        machine.refuse_missed_writes(monitor)
    description = machine.describe(monitor, monitor.peer_pid, ram_blocks(monitor), VIA_STREAM)
    ours, theirs = _settings(monitor, options, background)
    with contextlib.ExitStack() as stack:
        migration = _Migration(monitor, options, was_running, background)
        stack.callback(migration.close)
        last = [*theirs, ("cont", {})] if was_running and not background else theirs
        guard = Guard(monitor.fileno(), last, turns=GUARD_TURNS,
                      drain_fd=migration.read_fd if background else -1)  # fmt: skip
        stack.callback(guard.dismiss)
        stack.callback(_take_back, monitor, theirs)
        for command, arguments in ours:
            monitor.execute(command, arguments)
        stack.callback(migration.go_on)
        stack.callback(migration.end)
        migration.start()
        try:
            return ingest(
                migration.read_fd, sink, options, direct=background,
                extra_blobs={MACHINE: machine.pack(description)}, name="QEMU's stream",
                watch=lambda done: migration.watch(done, progress), finish=migration.finish,
            )  # fmt: skip
        except StreamError:
            migration.raise_failure()  # the stream was cut because the migration failed
            raise


class _Migration:
    """One migration of QEMU's into a pipe. `end`, then `close`."""

    def __init__(self, monitor: Monitor, options: Options, was_running: bool, background: bool) -> None:
        self._monitor = monitor
        self._options = options
        self._was_running = was_running
        self._background = background
        self._deadline = math.inf
        self.read_fd, self._write_fd = os.pipe()

    def start(self) -> None:
        """Begin to write the stream into the pipe."""
        self._monitor.events()  # forget those of before
        try:
            self._monitor.pass_descriptor(self._write_fd, STREAM_NAME)
            self._monitor.execute("migrate", {"uri": f"fd:{STREAM_NAME}"})
        except BaseException:
            # A copy that stays in QEMU would keep the pipe open. (`migrate` takes it, unless it is refused.)
            with contextlib.suppress(MachineError, TargetGoneError):
                self._monitor.execute("closefd", {"fdname": STREAM_NAME})
            raise
        finally:
            self._close_writer()
        if not self._background:
            self._deadline = time.monotonic() + self._options.max_seconds

    def watch(self, done: int, progress: Callable[[int], None] | None) -> None:
        """Ten times a second, while the stream is read and the image is written."""
        if progress is not None:
            progress(done)
        self.raise_failure()
        if time.monotonic() > self._deadline:
            raise MachineError(
                f"QEMU's migration did not converge within {self._options.max_seconds:g} s: the guest writes "
                "faster than the sink takes it"
            )

    def raise_failure(self) -> None:
        """Raise what QEMU says of a migration that failed."""
        answer = self._answer()
        if answer.status == "failed":
            raise MachineError(f"QEMU's migration failed: {answer.reason}")
        if answer.status == "cancelled":
            raise CaptureCancelled("QEMU's migration was cancelled")

    def finish(self) -> dict[str, Any]:
        """The stream has ended: let the guest go on; what QEMU says of it, for the figures.

        QEMU knows a moment later that the stream has ended.
        """
        self._deadline = math.inf
        self._await_end()
        self.raise_failure()
        answer = self._answer()
        if answer.status != "completed":
            raise MachineError(f"QEMU's migration is {answer.status}, though its stream is complete")
        self.go_on()
        stood = self._monitor.stood_ns()
        if stood is None:
            stood = answer.count("downtime") * 10**6
        rounds = answer.object("ram").count("dirty-sync-count") if answer.has("ram") else 0
        return {"stop_ns": stood, "rounds": rounds}

    def go_on(self) -> None:
        """Let the guest run if it ran: a plain `migrate` that is completed leaves it stopped."""
        if self._was_running and not ask(self._monitor, "query-status").flag("running"):
            self._monitor.execute("cont")

    def end(self) -> None:
        """Whatever happened: no migration runs any more."""
        try:
            if self._background:
                drain(self.read_fd)
            elif self._answer().status in machine.BUSY:
                self._monitor.execute("migrate_cancel")
        finally:
            self.close()  # QEMU may be waiting for somebody to read
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

    def _answer(self) -> Migration:
        return ask_migration(self._monitor)

    def _await_end(self) -> None:
        deadline = time.monotonic() + END_SECONDS
        while self._answer().status in machine.BUSY and time.monotonic() < deadline:
            time.sleep(0.005)


def _settings(monitor: Monitor, options: Options, background: bool) -> tuple[list[Command], list[Command]]:
    """The commands that set capabilities and parameters for our stream, and those that set them back."""
    found = ask_list(monitor, "query-migrate-capabilities")
    now = {item.plain("capability"): item.flag("state") for item in found}
    if background and BACKGROUND not in now:
        raise MachineError("this QEMU has no background-snapshot (6.0 has): --method dirty-logging")
    unwanted = UNWANTED + NOT_IN_BACKGROUND if background else UNWANTED
    wanted = {name: False for name in unwanted if now.get(name)}
    if now.get(BACKGROUND, False) != background:
        wanted[BACKGROUND] = background
    limits = {
        "max-bandwidth": options.rate_limit or NO_LIMIT,
        "downtime-limit": int(options.downtime_limit * 1000),
    }
    parameters = ask(monitor, "query-migrate-parameters")
    before = {name: parameters.number(name, 64) for name in limits}
    ours = [*_capabilities(wanted), ("migrate-set-parameters", limits)]
    theirs = _capabilities({name: now[name] for name in wanted})
    return ours, [*theirs, ("migrate-set-parameters", before)]


def _capabilities(states: dict[str, bool]) -> list[Command]:
    """Switch capabilities, those that exclude others first off."""
    found: list[Command] = []
    for state in (False, True):
        items = [{"capability": name, "state": state} for name, value in states.items() if value is state]
        if items:
            found.append(("migrate-set-capabilities", {"capabilities": items}))
    return found


def _take_back(monitor: Monitor, commands: Sequence[Command]) -> None:
    """Run all of them, even if one is refused; of a QEMU that has ended there is nothing to take back."""
    with contextlib.suppress(TargetGoneError), contextlib.ExitStack() as stack:
        for command, arguments in reversed(commands):
            stack.callback(monitor.execute, command, arguments)

"""A machine saved by QEMU's own migration, its stream taken apart into our image.

For users who may not attach to QEMU. Write tracking is QEMU's background-snapshot, dirty logging its plain
`migrate`. What was set for migration before is set again afterwards, and the machine runs as before.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from snapengine.errors import CaptureCancelled, MachineError, TargetGoneError
from snapengine.options import WRITE_TRACKING, Options
from snapengine.qemu import machine
from snapengine.qemu.ingest import Ingest
from snapengine.qemu.monitor import Monitor
from snapengine.qemu.ramblocks import ram_blocks
from snapengine.result import Result

STREAM_NAME = "snapengine-save"
BACKGROUND = "background-snapshot"
# Each makes a stream that does not hold the pages themselves, or not all of them.
UNWANTED = ("xbzrle", "compress", "multifd", "postcopy-ram", "mapped-ram", "x-ignore-shared", "dirty-bitmaps",
            "block", "release-ram", "x-colo", "return-path", "zero-copy-send", "postcopy-preempt")  # fmt: skip
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
    reasons = monitor.execute("query-migrate").get("blocked-reasons", [])
    if reasons:
        raise MachineError(f"a device of the machine blocks it: {reasons[0]}")
    was_running = bool(monitor.execute("query-status")["running"])
    background = options.method == WRITE_TRACKING and was_running  # QEMU would let a paused one run
    description = machine.describe(monitor, monitor.peer_pid, ram_blocks(monitor), "migration-stream")
    with _settings(monitor, options, background):
        saver = _Saver(monitor, sink, options, machine.pack(description), background)
        try:
            return saver.run(progress)
        finally:
            saver.end()
            if was_running and not monitor.execute("query-status")["running"]:
                monitor.execute("cont")


class _Saver:
    """One migration, and the thread that reads its stream."""

    def __init__(
        self, monitor: Monitor, sink: Any, options: Options, description: bytes, background: bool
    ) -> None:
        self._monitor = monitor
        self._options = options
        self._error: BaseException | None = None
        self._result: Result | None = None
        self._read_fd, write_fd = os.pipe()
        try:
            monitor.pass_descriptor(write_fd, STREAM_NAME)
        except BaseException:
            os.close(self._read_fd)
            raise
        finally:
            os.close(write_fd)
        self._ingest = Ingest(self._read_fd, sink, options, direct=background,
                              extra_blobs={machine.MACHINE_BLOB: description}, finish=self._downtime)  # fmt: skip
        self._thread = threading.Thread(target=self._read, name="snapengine-stream", daemon=True)

    def run(self, progress: Callable[[int], None] | None) -> Result:
        began = time.monotonic()
        self._thread.start()
        self._monitor.execute("migrate", {"uri": f"fd:{STREAM_NAME}"})
        limit = self._options.max_seconds
        while self._thread.is_alive():
            self._thread.join(0.1)
            if progress is not None:
                progress(self._ingest.stream_bytes)
            self._raise_failure()
            if self._options.method != WRITE_TRACKING and time.monotonic() - began > limit:
                raise MachineError(f"QEMU's migration did not converge within {limit:g} s: the guest writes too fast")
        self._raise_failure()
        assert self._result is not None
        return self._result

    def end(self) -> None:
        """Whatever happened: no migration runs any more, and the thread has ended."""
        status = self._status()
        if status in machine.BUSY:
            self._monitor.execute("migrate_cancel")
            deadline = time.monotonic() + END_SECONDS
            while self._status() in machine.BUSY and time.monotonic() < deadline:
                time.sleep(0.01)
        self._ingest.cancel()
        if self._thread.ident is not None:
            self._thread.join()
        os.close(self._read_fd)

    def _read(self) -> None:
        try:
            self._result = self._ingest.run()
        except BaseException as error:
            self._error = error

    def _status(self) -> str:
        return str(self._monitor.execute("query-migrate").get("status", "none"))

    def _raise_failure(self) -> None:
        answer = self._monitor.execute("query-migrate")
        if answer.get("status") == "failed":
            reason = answer.get("error-desc", "it does not say why")
            raise MachineError(f"QEMU's migration failed: {reason}")
        if answer.get("status") == "cancelled":
            raise CaptureCancelled("QEMU's migration was cancelled")
        if self._error is not None:
            raise self._error

    def _downtime(self) -> dict[str, Any]:
        """The stream has ended: what QEMU says of it, for the figures. It says so a moment later."""
        deadline = time.monotonic() + END_SECONDS
        while self._status() in machine.BUSY and time.monotonic() < deadline:
            time.sleep(0.005)
        answer = self._monitor.execute("query-migrate")
        if answer.get("status") != "completed":
            raise MachineError(f"QEMU's migration is {answer.get('status')}, though its stream is complete")
        rounds = int(answer.get("ram", {}).get("dirty-sync-count", 0))
        return {"stop_ns": int(answer.get("downtime", 0)) * 10**6, "rounds": rounds}


@contextlib.contextmanager
def _settings(monitor: Monitor, options: Options, background: bool) -> Iterator[None]:
    """Capabilities and parameters for our stream, and back again."""
    now = {item["capability"]: item["state"] for item in monitor.execute("query-migrate-capabilities")}
    wanted = {name: False for name in UNWANTED if now.get(name)}
    if background and BACKGROUND not in now:
        raise MachineError("this QEMU has no background-snapshot (6.0 has): --method dirty-logging")
    if now.get(BACKGROUND, False) != background:
        wanted[BACKGROUND] = background
    limits = {"max-bandwidth": options.rate_limit or NO_LIMIT, "downtime-limit": int(options.downtime_limit * 1000)}
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

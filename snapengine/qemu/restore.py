"""A machine that goes on where an image has it: QEMU is started, waits, is fed a migration stream, runs.

The stream is made from the image, so that any QEMU and any RAM backend takes it, and no right to attach is
needed. An image of an attached machine has no stream of its own; its devices' state is one but for the RAM.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from snapengine.base.workers import Crew
from snapengine.errors import CorruptImageError, ImageError, MachineError, TargetGoneError, TimeLimitError
from snapengine.image import Image
from snapengine.qemu import machine
from snapengine.qemu.blobs import DEVICES, VIA_DEVICES, VIA_STREAM, machine_of
from snapengine.qemu.monitor import COMMAND_SECONDS, Monitor
from snapengine.qemu.ram_blocks import ram_blocks
from snapengine.qemu.replies import ask, ask_migration
from snapengine.qemu.stream_parser import TAIL_MAX_BYTES
from snapengine.qemu.to_stream import Meter, make_head, stream_blobs, write_stream

START_SECONDS = 30.0
END_SECONDS = 2.0
STREAM_NAME = "snapengine-stream"
FILE_HEADER_BYTES = 8  # magic and version, which the devices' state has as every stream has
# Behind the devices QEMU expects a description of their fields, for debuggers, and warns if there is none.
NO_DESCRIPTION = struct.pack(">BI", 0x06, 2) + b"{}"
OURS = ("-incoming", "-daemonize", "-S", "-loadvm")


@dataclass(slots=True)
class Restored:
    """A machine that was restored. Times are nanoseconds."""

    pid: int
    qmp: str
    status: str
    """QEMU's run state: ``"running"``, or ``"paused"`` if that was asked for."""
    start_ns: int = 0
    """From the start of QEMU until its monitor answered."""
    load_ns: int = 0
    """From the first byte of the stream until QEMU had loaded it all."""
    stream_bytes: int = 0
    differences: list[str] = field(default_factory=list)
    """What differs from the machine that was saved (only with `force`; otherwise that is an error)."""
    process: subprocess.Popen[bytes] | None = None

    def to_json(self) -> dict[str, Any]:
        """In JSON types."""
        names = ("pid", "qmp", "status", "start_ns", "load_ns", "stream_bytes", "differences")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class Limits:
    """How long to wait: for the answer to one command; until when, and what that was, for all of it."""

    command_seconds: float = COMMAND_SECONDS
    until: float = math.inf
    timeout: float = 0.0

    def check(self) -> None:
        """Raise TimeLimitError if the time is over."""
        if time.monotonic() > self.until:
            raise TimeLimitError(f"the machine was not loaded within {self.timeout:g} s: QEMU is ended")


NO_LIMITS = Limits()


def restore_machine(
    image: Image,
    command: Sequence[str],
    *,
    qmp: str | None = None,
    run: bool = True,
    force: bool = False,
    stdio: bool = False,
    log: str | os.PathLike[str] | None = None,
    command_seconds: float = COMMAND_SECONDS,
    timeout: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> Restored:
    """Start QEMU by `command` and let it go on from `image`.

    Parameters
    ----------
    image:
        Made by `snapengine qemu save` or `snapengine ingest`.
    command:
        QEMU and its arguments, as the machine that was saved had them, without ``-S`` and ``-incoming``. Its
        disks must be as they were at T.
    qmp:
        Unix socket to make for the restored machine's monitor; None: in a new directory.
    run:
        Let the guest run; otherwise it stays paused.
    force:
        Go on though the machine differs from the one that was saved.
    stdio:
        QEMU has our standard input and output, and gets our signals; otherwise it has neither.
    log:
        The file for what QEMU prints (without `stdio`); None: it is kept until we end, for the errors' texts.
    command_seconds:
        The longest wait for the monitor's answer to one command.
    timeout:
        Seconds until the machine must be loaded; None: no limit.
    progress:
        Is called with the bytes of RAM that QEMU has taken so far, while it loads.

    Raises
    ------
    ImageError
        Not an image of a machine, or damaged. Nothing of the machine is left.
    MachineError
        QEMU does not start, is another machine, or refuses the state. It is ended.
    TimeLimitError
        It is not loaded within `timeout`. QEMU is ended.
    """
    saved = read_description(image)
    for argument in command:
        if argument.replace("--", "-") in OURS:
            raise MachineError(
                f"the command has {argument} already: how QEMU waits and loads is up to snapengine"
            )
    if not command or shutil.which(command[0]) is None:
        raise MachineError(f"there is no program {command[0] if command else ''!r}")
    with contextlib.ExitStack() as undo, contextlib.ExitStack() as stack:
        if qmp:
            path = os.path.abspath(qmp)
            if os.path.exists(path):
                raise MachineError(f"{path} exists already: another machine may listen there")
        else:
            folder = tempfile.mkdtemp(prefix="snapengine-qemu-")
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            path = f"{folder}/qmp.sock"
        # Not our standard output: who reads that would wait for the end of the machine.
        output: Any = None
        if not stdio:
            output = stack.enter_context(open(log, "w+b") if log else tempfile.TemporaryFile())  # noqa: SIM115
        limits = Limits(command_seconds, time.monotonic() + (timeout or math.inf), timeout or 0.0)
        restored = _start(image, saved, command, path, output, run, force, limits, progress)
        undo.pop_all()
        return restored


def _start(
    image: Image, saved: dict[str, Any], command: Sequence[str], path: str, output: Any, run: bool,
    force: bool, limits: Limits, progress: Callable[[int], None] | None,
) -> Restored:  # fmt: skip
    began = time.monotonic_ns()
    monitor_at = path.replace(",", ",,")  # QEMU's way to write a comma in an option
    process = subprocess.Popen(
        [*command, "-S", "-incoming", "defer", "-qmp", f"unix:{monitor_at},server=on,wait=off"],
        stdin=subprocess.DEVNULL if output else None, stdout=output, stderr=output,
        start_new_session=output is not None,
    )  # fmt: skip
    try:
        with connect(path, process, limits) as monitor:
            restored = Restored(monitor.peer_pid or process.pid, path, "", process=process)
            restored.start_ns = time.monotonic_ns() - began
            restored.differences = compare(monitor, saved, force, image.name)
            load(monitor, image, saved, restored, progress, limits)
            if run:
                monitor.execute("cont")
            restored.status = ask(monitor, "query-status").plain("status")
        return restored
    except BaseException as error:
        end(process)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        if isinstance(error, TargetGoneError):
            raise MachineError(f"QEMU ended while it was restored{said(output)}") from None
        if isinstance(error, MachineError):
            raise MachineError(f"{error}{said(output)}") from None
        raise


def said(output: Any) -> str:
    """The last line that QEMU printed, to stand behind an error."""
    if output is None:
        return ""
    output.seek(0)
    lines = output.read().decode("utf-8", "replace").strip().splitlines()
    lines = [line for line in lines if "terminating on signal" not in line]  # that was our own
    return f" ({lines[-1].strip()})" if lines else ""


def read_description(image: Image) -> dict[str, Any]:
    """The description of the machine. `ImageError`: there is none, or it is malformed."""
    saved = machine_of(image)
    if saved is None:
        raise ImageError(f"{image.name}: not an image of a QEMU machine (`snapengine info` says of what)")
    if saved["via"] not in (VIA_STREAM, VIA_DEVICES):
        raise ImageError(f"{image.name}: its machine was saved in a way that is not known: {saved['via']!r}")
    return saved


def stream_ends(image: Image, saved: dict[str, Any]) -> tuple[bytes, bytes]:
    """What comes before the RAM in the stream, and what comes behind it."""
    if saved["via"] == VIA_STREAM:
        return stream_blobs(image)
    blocks = [(block["name"], block["used"]) for block in saved["ram_blocks"]]
    size = image.vmstate.sizes().get(DEVICES, 0)
    if not FILE_HEADER_BYTES < size <= TAIL_MAX_BYTES:
        raise ImageError(f"{image.name}: the blob {DEVICES} has {size} bytes")
    state = image.vmstate[DEVICES][FILE_HEADER_BYTES:]
    try:
        head = make_head(saved["machine_type"], blocks)
    except ValueError as error:
        raise CorruptImageError(f"{image.name}: its RAM blocks: {error}") from None
    return head, state + NO_DESCRIPTION


def connect(path: str, process: subprocess.Popen[bytes], limits: Limits = NO_LIMITS) -> Monitor:
    """The monitor of a QEMU that is starting. Raises MachineError, TimeLimitError."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        limits.check()
        code = process.poll()
        if code is not None:
            raise MachineError(f"QEMU did not start (exit code {code})")
        if os.path.exists(path):
            try:
                return Monitor(path, command_seconds=limits.command_seconds)
            except MachineError:
                if time.monotonic() > deadline:
                    raise
        if time.monotonic() > deadline:
            raise MachineError(f"QEMU's monitor did not appear within {START_SECONDS:g} s")
        time.sleep(0.01)


def compare(monitor: Monitor, saved: dict[str, Any], force: bool, name: str) -> list[str]:
    """The differences. Raises MachineError if there are any, unless forced."""
    found = machine.describe(monitor, 0, ram_blocks(monitor), saved["via"])
    lines = machine.differences(saved, found)
    if lines and not force:
        raise MachineError(f"{name}: this is another machine: " + "; ".join(lines))
    return lines


def load(
    monitor: Monitor, image: Image, saved: dict[str, Any], restored: Restored,
    progress: Callable[[int], None] | None = None, limits: Limits = NO_LIMITS,
) -> None:  # fmt: skip
    """Feed QEMU the stream, and wait until it has loaded it. Raises MachineError, TargetGoneError."""
    head, tail = stream_ends(image, saved)
    began = time.monotonic_ns()
    theirs, ours = os.pipe()
    try:
        monitor.pass_descriptor(theirs, STREAM_NAME)
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    feeder = Feeder(image, ours, head, tail)
    try:
        feeder.start()
        monitor.execute("migrate-incoming", {"uri": f"fd:{STREAM_NAME}"})
        while True:
            answer = ask_migration(monitor)
            if answer.status == "completed":
                break
            if answer.status == "failed":
                raise feeder.error or MachineError(f"QEMU refuses the state: {answer.reason}")
            if feeder.error is not None and not isinstance(feeder.error, TargetGoneError):
                raise feeder.error
            limits.check()
            if progress is not None:
                progress(feeder.meter.sent_bytes)
            time.sleep(0.005)
        feeder.wait()
    except BaseException as error:
        if restored.process is not None:
            end(restored.process)  # else the feeder waits for a reader for ever
        feeder.end()  # before the image is closed
        cause = feeder.error
        if isinstance(error, TargetGoneError) and cause and not isinstance(cause, TargetGoneError):
            raise cause from None
        raise
    if feeder.error is not None:
        raise feeder.error
    restored.load_ns = time.monotonic_ns() - began
    restored.stream_bytes = feeder.written


class Feeder:
    """Writes the stream on a thread of its own, and closes the pipe. `start`, then `wait` or `end`."""

    def __init__(self, image: Image, fd: int, head: bytes, tail: bytes) -> None:
        self.written = 0
        self.meter = Meter()
        self.error: BaseException | None = None
        self._image = image
        self._fd = fd
        self._ends = head, tail
        self._thread = Crew()

    def start(self) -> None:
        """Begin to write."""
        self._thread.start("snap-feed", self._feed)

    def wait(self) -> None:
        """Wait for the end of the stream."""
        self._thread.wait()

    def end(self) -> None:
        """Nobody reads any more: afterwards nothing uses the image, and the pipe is closed."""
        if not self._thread.dismiss():
            os.close(self._fd)
        self._thread.wait()

    def _feed(self) -> None:
        try:
            self.written = write_stream(self._image, self._fd, *self._ends, meter=self.meter).stream_bytes
        except OSError as error:
            broken = error.errno == errno.EPIPE
            self.error = TargetGoneError(errno.EPIPE, "QEMU closed the stream") if broken else error
        except BaseException as error:
            self.error = error
        finally:
            os.close(self._fd)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a QEMU that we started: a machine that is restored by half is none. Idempotent.

    It is asked first: QEMU then removes its other sockets and its pid file.
    """
    if process.poll() is not None:
        return
    own_group = os.getpgid(process.pid) == process.pid  # then there may be a wrapper around QEMU
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            if own_group:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS if number == signal.SIGTERM else None)
            if not own_group:
                return

"""Restoring a machine from an image: start QEMU, send it a migration stream, let the guest run.

The stream is generated from the image. Every RAM backend accepts it, and no permission to attach is needed.
An image of an attached machine contains no stream; its device state is a stream without RAM.
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

from snapengine.base.socketpath import path_too_long
from snapengine.base.workers import Workers
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
FILE_HEADER_BYTES = 8  # magic and version, with which the device state begins like every stream
# After the devices QEMU expects a description of their fields (for debuggers), and warns if it is missing.
NO_DESCRIPTION = struct.pack(">BI", 0x06, 2) + b"{}"
RESERVED_OPTIONS = ("-incoming", "-daemonize", "-S", "-loadvm")


@dataclass(slots=True)
class Restored:
    """A restored machine. Times are in nanoseconds."""

    pid: int
    qmp: str
    status: str
    """QEMU's run state: ``"running"``, or ``"paused"`` if that was requested."""
    start_ns: int = 0
    """From the start of QEMU until its monitor replied."""
    load_ns: int = 0
    """From the first byte of the stream until QEMU had loaded all of it."""
    stream_bytes: int = 0
    differences: list[str] = field(default_factory=list)
    """Differences from the saved machine: with `force` all of them, otherwise only those of another version
    of QEMU that has the same versioned machine type. All others are an error."""
    lost_pages: int = 0
    """Pages that were lost at capture time and are zeros now: only if `image` was opened with lost="zero"."""
    process: subprocess.Popen[bytes] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a dict of JSON types."""
        names = ("pid", "qmp", "status", "start_ns", "load_ns", "stream_bytes", "differences", "lost_pages")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class Limits:
    """Timeouts: of one command, and of the whole restore as a deadline (`until`) and as given (`timeout`)."""

    command_seconds: float = COMMAND_SECONDS
    until: float = math.inf
    timeout: float = 0.0

    def check(self) -> None:
        """Raise TimeLimitError after the deadline."""
        if time.monotonic() > self.until:
            raise TimeLimitError(f"the machine was not loaded within {self.timeout:g} s: QEMU was terminated")


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
    """Start QEMU with `command` and load the state in `image`.

    Parameters
    ----------
    image:
        An image written by `snapengine qemu save` or `snapengine ingest`. If pages were lost at capture time,
        open it with ``lost="zero"``, or this is a `LostPagesError`.
    command:
        QEMU and the arguments of the saved machine, without ``-S`` and ``-incoming``. The disks must have
        their content of T.
    qmp:
        Path of the Unix socket to create for the machine's monitor; None: one in a new directory.
    run:
        Whether to resume the guest; otherwise it stays paused.
    force:
        Load the state even if the machine differs from the saved one.
    stdio:
        QEMU inherits our standard input and output, and receives our terminal's signals; otherwise neither.
    log:
        File for QEMU's output (without `stdio`); None: a temporary file, used in error messages only.
    command_seconds:
        Timeout of the monitor's reply to one command.
    timeout:
        Timeout of the whole restore in seconds; None: no limit.
    progress:
        Called while QEMU loads the state, with the bytes of RAM that it has read so far.

    Raises
    ------
    ImageError
        The image is not of a machine, or is damaged. No QEMU is left running.
    MachineError
        QEMU does not start, is a different machine, or rejects the state. It is terminated.
    TimeLimitError
        The machine was not loaded within `timeout`. QEMU is terminated.
    """
    saved = read_description(image)
    for argument in command:
        if argument.replace("--", "-") in RESERVED_OPTIONS:
            raise MachineError(
                f"the command has {argument} already: remove it, snapengine controls how QEMU starts"
            )
    if not command or shutil.which(command[0]) is None:
        raise MachineError(f"there is no program {command[0] if command else ''!r}")
    with contextlib.ExitStack() as undo, contextlib.ExitStack() as stack:
        if qmp:
            path = os.path.abspath(qmp)
            if fault := path_too_long(path):
                raise MachineError(fault)
            if os.path.exists(path):
                raise MachineError(
                    f"{path} exists already, another machine may listen there: use another path"
                )
        else:
            path = f"{_socket_folder(undo)}/qmp.sock"
        # Not our standard output: its reader would wait until the machine exits.
        output: Any = None
        if not stdio:
            output = stack.enter_context(open(log, "w+b") if log else tempfile.TemporaryFile())  # noqa: SIM115
        limits = Limits(command_seconds, time.monotonic() + (timeout or math.inf), timeout or 0.0)
        restored = _start(image, saved, command, path, output, run, force, limits, progress)
        undo.pop_all()
        return restored


def _socket_folder(undo: contextlib.ExitStack) -> str:
    """Make a directory for QEMU's socket, which `undo` removes."""
    place = tempfile.gettempdir()
    if path_too_long(f"{place}/snapengine-qemu-12345678/qmp.sock"):
        place = "/tmp"  # TMPDIR may be as long as it likes
    folder = tempfile.mkdtemp(prefix="snapengine-qemu-", dir=place)
    undo.callback(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _start(
    image: Image, saved: dict[str, Any], command: Sequence[str], path: str, output: Any, run: bool,
    force: bool, limits: Limits, progress: Callable[[int], None] | None,
) -> Restored:  # fmt: skip
    start_ns = time.monotonic_ns()
    escaped_path = path.replace(",", ",,")  # QEMU's escape for a comma in an option
    process = subprocess.Popen(
        [*command, "-S", "-incoming", "defer", "-qmp", f"unix:{escaped_path},server=on,wait=off"],
        stdin=subprocess.DEVNULL if output else None, stdout=output, stderr=output,
        start_new_session=output is not None,
    )  # fmt: skip
    try:
        with connect(path, process, limits) as monitor:
            restored = Restored(monitor.peer_pid or process.pid, path, "", process=process)
            restored.start_ns = time.monotonic_ns() - start_ns
            if image.lost == "zero":  # otherwise there are none, or the restore fails
                restored.lost_pages = image.lost_pages()
            restored.differences = compare(monitor, saved, force, image.name)
            load(monitor, image, saved, restored, progress, limits)
            if run:
                monitor.execute("cont")
            restored.status = ask(monitor, "query-status").string("status")
        return restored
    except BaseException as error:
        terminate(process)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        if isinstance(error, TargetGoneError):
            raise MachineError(f"QEMU exited during the restore{last_output(output)}") from None
        if isinstance(error, MachineError):
            raise MachineError(f"{error}{last_output(output)}") from None
        raise


def last_output(output: Any) -> str:
    """Return the last line of QEMU's output in parentheses, to append to an error message."""
    if output is None:
        return ""
    output.seek(0)
    lines = output.read().decode("utf-8", "replace").strip().splitlines()
    lines = [line for line in lines if "terminating on signal" not in line]  # caused by us
    return f" ({lines[-1].strip()})" if lines else ""


def read_description(image: Image) -> dict[str, Any]:
    """Return the machine description. Raises `ImageError` if it is missing or malformed."""
    saved = machine_of(image)
    if saved is None:
        raise ImageError(f"{image.name}: not an image of a QEMU machine (`snapengine info` says of what)")
    if saved["via"] not in (VIA_STREAM, VIA_DEVICES):
        raise ImageError(f"{image.name}: the machine was saved by an unknown method: {saved['via']!r}")
    return saved


def stream_ends(image: Image, saved: dict[str, Any]) -> tuple[bytes, bytes]:
    """Return the parts of the stream before and after the RAM."""
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
    """Connect to the monitor of a QEMU that is starting. Raises MachineError, TimeLimitError."""
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
            raise MachineError(f"QEMU did not open its monitor within {START_SECONDS:g} s")
        time.sleep(0.01)


def compare(monitor: Monitor, saved: dict[str, Any], force: bool, name: str) -> list[str]:
    """Return the differences from the saved machine that are allowed, and with `force` all differences.

    Raises MachineError if there are others.
    """
    found = machine.describe(monitor, 0, ram_blocks(monitor), saved["via"])
    lines = machine.differences(saved, found)
    if lines and not force:
        raise MachineError(f"{name}: this is another machine: " + "; ".join(lines))
    return lines + machine.version_warnings(saved, found)


def load(
    monitor: Monitor, image: Image, saved: dict[str, Any], restored: Restored,
    progress: Callable[[int], None] | None = None, limits: Limits = NO_LIMITS,
) -> None:  # fmt: skip
    """Send QEMU the stream, and wait until it has loaded it. Raises MachineError, TargetGoneError."""
    head, tail = stream_ends(image, saved)
    start_ns = time.monotonic_ns()
    read_fd, write_fd = os.pipe()
    try:
        monitor.pass_descriptor(read_fd, STREAM_NAME)
    except BaseException:
        os.close(write_fd)
        raise
    finally:
        os.close(read_fd)
    feeder = Feeder(image, write_fd, head, tail)
    try:
        feeder.start()
        monitor.execute("migrate-incoming", {"uri": f"fd:{STREAM_NAME}"})
        while True:
            state = ask_migration(monitor)
            if state.status == "completed":
                break
            if state.status == "failed":
                raise feeder.error or MachineError(f"QEMU refuses the state: {state.reason}")
            if feeder.error is not None and not isinstance(feeder.error, TargetGoneError):
                raise feeder.error
            limits.check()
            if progress is not None:
                progress(feeder.meter.sent_bytes)
            time.sleep(0.005)
        feeder.wait()
    except BaseException as error:
        if restored.process is not None:
            terminate(restored.process)  # otherwise the feeder would block in write() for ever
        feeder.stop()  # before the image is closed
        cause = feeder.error
        if isinstance(error, TargetGoneError) and cause and not isinstance(cause, TargetGoneError):
            raise cause from None
        raise
    if feeder.error is not None:
        raise feeder.error
    restored.load_ns = time.monotonic_ns() - start_ns
    restored.stream_bytes = feeder.written


class Feeder:
    """A thread that writes the stream and closes the pipe. Call `start`, then `wait` or `stop`."""

    def __init__(self, image: Image, fd: int, head: bytes, tail: bytes) -> None:
        self.written = 0
        self.meter = Meter()
        self.error: BaseException | None = None
        self._image = image
        self._fd = fd
        self._head_tail = head, tail
        self._thread = Workers()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start("snap-feed", self._feed)

    def wait(self) -> None:
        """Wait until the stream is written."""
        self._thread.wait()

    def stop(self) -> None:
        """End the thread after the pipe's reader has exited. Nothing uses the image afterwards."""
        if not self._thread.close():
            os.close(self._fd)
        self._thread.wait()

    def _feed(self) -> None:
        try:
            sent = write_stream(self._image, self._fd, *self._head_tail, meter=self.meter)
            self.written = sent.stream_bytes
        except OSError as error:
            broken = error.errno == errno.EPIPE
            self.error = TargetGoneError(errno.EPIPE, "QEMU closed the stream") if broken else error
        except BaseException as error:
            self.error = error
        finally:
            os.close(self._fd)


def terminate(process: subprocess.Popen[bytes]) -> None:
    """Terminate a QEMU that we started, because its machine is only partly restored. Idempotent.

    SIGTERM comes first: QEMU then removes its other sockets and its pid file.
    """
    if process.poll() is not None:
        return
    own_group = os.getpgid(process.pid) == process.pid  # QEMU may have been started by a wrapper
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

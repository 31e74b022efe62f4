"""A blocking client of QEMU's monitor protocol (QMP).

The package qemu.qmp implements the protocol with asyncio; its loop runs on a separate thread
(`snapengine.qemu.loop_thread`). Specification: docs/interop/qmp-spec of QEMU.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import struct
import time
from collections.abc import Callable, Coroutine
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from qemu.qmp import ConnectError, EventListener, ExecuteError, QMPClient, QMPError

from snapengine.base.socketpath import path_too_long
from snapengine.errors import MachineError, TargetGoneError
from snapengine.qemu.loop_thread import Future, LoopThread
from snapengine.qemu.replies import Reply

CONNECT_SECONDS = 5.0
SHORTENED_SECONDS = 3.0
POLL_SECONDS = 0.1
COMMAND_SECONDS = 60.0  # `stop` waits for all disk requests in flight

Value = TypeVar("Value")
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())


class Monitor:
    """A connection to a QMP socket. Call `close`, or use it in a ``with``.

    Parameters
    ----------
    address:
        The path of a Unix socket, ``unix:PATH``, ``HOST:PORT`` or ``tcp:HOST:PORT``.
    seconds, command_seconds:
        Timeouts of the greeting, and of the reply to a command.

    Raises
    ------
    MachineError
        Nothing listens at the address, or it is not QMP. Every method: QEMU refused the command; the message
        contains QEMU's reason.
    TargetGoneError
        Every method: QEMU has exited or closed the connection.
    """

    def __init__(
        self, address: str, *, seconds: float = CONNECT_SECONDS, command_seconds: float = COMMAND_SECONDS
    ) -> None:
        self.address = address
        self.command_seconds = command_seconds
        self._shortened = False
        self._client = QMPClient("snapengine")
        self._socket: socket.socket | None = None
        self._events = EventListener()
        self._client.register_listener(self._events)
        self._disconnected = False
        self._loop = LoopThread()
        try:
            self._loop.start("snap-qmp")
            self._connect(address, seconds)
            self._run(partial(self._greet, seconds), seconds + 1)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        """Disconnect, after a Ctrl-C before the caller stored the object. On any thread; does not wait."""
        if "_loop" in vars(self) and self._loop.runs and not self._disconnected:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.begin(partial(_disconnect, self._client, self._loop, end=True))

    @property
    def peer_pid(self) -> int:
        """The process that called listen() on the Unix socket (SO_PEERCRED, unix(7)); 0: a TCP socket."""
        assert self._socket is not None
        if self._socket.family != socket.AF_UNIX:
            return 0
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return int(struct.unpack("3i", credentials)[0])

    @property
    def passes_descriptors(self) -> bool:
        """Whether the connection can pass descriptors: only Unix sockets can."""
        return self._socket is not None and self._socket.family == socket.AF_UNIX

    def fileno(self) -> int:
        """The connection's descriptor."""
        assert self._socket is not None
        return self._socket.fileno()

    def execute(
        self, command: str, arguments: dict[str, Any] | None = None, *, seconds: float | None = None
    ) -> Any:
        """Execute a command, and return its result in JSON types."""
        return self._run(partial(self._execute, command, arguments), seconds, command)

    def send(
        self, command: str, arguments: dict[str, Any] | None = None, *, seconds: float | None = None
    ) -> Callable[[], Any]:
        """Send a command without waiting; calling the returned function waits for the reply.

        QEMU executes commands in the order in which they were sent, so pipelined commands cost no round trip
        between them.
        """
        future = self._loop.begin(partial(self._execute, command, arguments))
        return lambda: self._wait(future, seconds, command)

    def human(self, line: str) -> str:
        """Execute a command of the human monitor, and return its output."""
        return str(self.execute("human-monitor-command", {"command-line": line}))

    def pass_descriptor(self, fd: int, name: str) -> None:
        """Pass a duplicate of a descriptor to QEMU, which uses it as ``fd:NAME``."""
        self._run(partial(self._execute, "getfd", {"fdname": name}, fd), None, "getfd")

    def pass_file(self, fd: int) -> int:
        """Pass a duplicate of a descriptor to QEMU, which opens it as ``/dev/fdset/N``. Returns N."""
        done = self._run(partial(self._execute, "add-fd", {}, fd), None, "add-fd")
        return Reply(done, "QEMU's reply to add-fd").number("fdset-id", 63)

    def events(self) -> list[tuple[str, int]]:
        """Return the events since the last call as (name, QEMU's clock in nanoseconds)."""
        found = []
        for event in self._run(self._take_events, None):
            fields = Reply(dict(event), "an event of QEMU")
            stamp = fields.object("timestamp")
            at = stamp.number("seconds", 33) * 10**9 + stamp.number("microseconds", 20) * 1000
            found.append((fields.string("event"), at))
        return found

    def stop_duration_ns(self) -> int | None:
        """Return how long the guest was stopped, from the STOP and RESUME events since the last `events`.

        None: an event is missing, or QEMU's clock was set back between the two.
        """
        at = dict(self.events())
        duration = at.get("RESUME", -1) - at.get("STOP", 0)
        return duration if duration >= 0 and "STOP" in at else None

    def shorten_waits(self) -> None:
        """Limit the wait for each reply to a few seconds, because the operation is being cancelled.

        That is enough for the commands that undo it. May be called from any thread.
        """
        self._shortened = True

    def close(self) -> None:
        """Disconnect. QEMU keeps running. Idempotent."""
        try:
            self._close()
        except BaseException:  # a Ctrl-C: until we disconnect, the monitor serves no other client
            self._close()
            raise

    def _close(self) -> None:
        if not self._disconnected and self._loop.runs:
            # How the connection ended does not matter any more.
            with contextlib.suppress(QMPError, OSError, EOFError, TargetGoneError, MachineError):
                self._run(partial(_disconnect, self._client, self._loop), CONNECT_SECONDS)
            self._disconnected = True
        self._loop.close()
        if self._socket is not None:
            self._socket.close()

    # -- on the loop's thread --

    async def _greet(self, seconds: float) -> None:
        assert self._socket is not None
        await asyncio.wait_for(self._client.connect(self._socket), seconds)

    async def _execute(self, command: str, arguments: dict[str, Any] | None, fd: int = -1) -> Any:
        if fd >= 0:
            self._client.send_fd_scm(fd)  # sent with the first byte of the next command
        return await self._client.execute(command, arguments)

    async def _take_events(self) -> list[Any]:
        return list(self._events.clear())

    # -- on the caller's thread --

    def _connect(self, address: str, seconds: float) -> None:
        target = parse_address(address)
        if isinstance(target, str) and (fault := path_too_long(target)):
            raise MachineError(fault)
        family = socket.AF_UNIX if isinstance(target, str) else socket.AF_INET
        connection = self._socket = socket.socket(family)
        connection.settimeout(seconds)
        try:
            connection.connect(target)
        except BlockingIOError:
            text = f"{address}: another client is connected, and others wait: disconnect it"
            raise MachineError(text) from None
        except OSError as error:
            raise MachineError(f"{address}: no QEMU listens there ({error.strerror or error})") from None
        connection.setblocking(False)

    def _run(
        self, work: Callable[[], Coroutine[Any, Any, Value]], seconds: float | None, command: str = ""
    ) -> Value:
        """Run `work` on the loop and wait for it."""
        return self._wait(self._loop.begin(work), seconds, command)

    def _result(self, future: Future[Value], limit: float) -> Value:
        """Return the value of `future`. TimeoutError after `limit` seconds, or soon after `shorten_waits`."""
        until = time.monotonic() + limit
        shortened = False
        while True:
            if self._shortened and not shortened:
                shortened, until = True, min(until, time.monotonic() + SHORTENED_SECONDS)
            if future.is_filled(max(0.0, min(until - time.monotonic(), POLL_SECONDS))):
                return future.take()
            if time.monotonic() >= until:
                raise TimeoutError

    def _wait(self, future: Future[Value], seconds: float | None, command: str) -> Value:
        """Wait for the result, and translate errors to those of this package."""
        seconds = self.command_seconds if seconds is None else seconds
        try:
            return self._result(future, seconds)
        except TimeoutError:
            self._loop.cancel(future)
            what = f"{command} took more than {seconds:g} s" if command else "no greeting"
            hint = "" if command else ": it is not QMP, or another client is connected"
            raise MachineError(f"{self.address}: {what}{hint}") from None
        except ExecuteError as error:
            raise MachineError(f"QEMU refuses {command}: {error}") from None
        except ConnectError as error:
            raise MachineError(f"{self.address}: this is not QMP ({error.exc or error})") from None
        except (QMPError, EOFError, OSError, asyncio.CancelledError):  # cancelled: by our own `close`
            raise TargetGoneError(errno.ESRCH, f"{self.address}: QEMU has closed the connection") from None


async def _disconnect(client: QMPClient, loop: LoopThread, end: bool = False) -> None:
    """Disconnect, after cancelling work that an interrupted caller left running."""
    try:
        await loop.cancel_others()
        if client.runstate.name != "IDLE":
            await client.disconnect()
    finally:
        if end:
            loop.end()


def parse_address(address: str) -> str | tuple[str, int]:
    """Return a path or (host, port). Raises ValueError."""
    if address.startswith("unix:"):
        return address[5:].split(",")[0]
    text = address.removeprefix("tcp:")
    host, colon, port = text.rpartition(":")
    if colon and port.isdecimal() and "/" not in text:
        return host or "localhost", int(port)
    if text != address:
        raise ValueError(f"{address!r} is not tcp:HOST:PORT")
    return address

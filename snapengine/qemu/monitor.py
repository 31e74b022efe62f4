"""A QEMU monitor (QMP), spoken to in plain calls.

The protocol is the package qemu.qmp's, which is asynchronous: its loop runs on a thread of its own here
(`snapengine.qemu.loop_thread`).
Source: docs/interop/qmp-spec of QEMU.
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

from snapengine.errors import MachineError, TargetGoneError
from snapengine.qemu.loop_thread import Answer, LoopThread
from snapengine.qemu.replies import Reply

CONNECT_SECONDS = 5.0
SHORTENED_SECONDS = 3.0
POLL_SECONDS = 0.1
COMMAND_SECONDS = 60.0  # `stop` waits until all disk requests are done

Value = TypeVar("Value")
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())


class Monitor:
    """A connection to a QMP socket. Close it, or use it in a ``with``.

    Parameters
    ----------
    address:
        A path of a Unix socket, ``unix:PATH``, ``HOST:PORT`` or ``tcp:HOST:PORT``.
    seconds, command_seconds:
        The longest wait for the greeting, and for the answer to a command.

    Raises
    ------
    MachineError
        Nobody listens there, or what listens does not speak QMP. Every method: QEMU refused the command; the
        text has QEMU's reason.
    TargetGoneError
        Every method: QEMU has ended, or closed the connection.
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
        """A Ctrl-C may come before the caller has us in a variable. On any thread, so it does not wait."""
        if "_loop" in vars(self) and self._loop.runs and not self._disconnected:
            with contextlib.suppress(RuntimeError):  # it is closed
                self._loop.begin(partial(_disconnect, self._client, self._loop, end=True))

    @property
    def peer_pid(self) -> int:
        """The process that opened the socket for listening (unix(7), SO_PEERCRED); 0: not a Unix socket."""
        assert self._socket is not None
        if self._socket.family != socket.AF_UNIX:
            return 0
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return int(struct.unpack("3i", credentials)[0])

    @property
    def passes_descriptors(self) -> bool:
        """Whether `pass_descriptor` works: on Unix sockets."""
        return self._socket is not None and self._socket.family == socket.AF_UNIX

    def fileno(self) -> int:
        """The connection's descriptor."""
        assert self._socket is not None
        return self._socket.fileno()

    def execute(
        self, command: str, arguments: dict[str, Any] | None = None, *, seconds: float | None = None
    ) -> Any:
        """What the command returns, in JSON types."""
        return self._run(partial(self._execute, command, arguments), seconds, command)

    def send(
        self, command: str, arguments: dict[str, Any] | None = None, *, seconds: float | None = None
    ) -> Callable[[], Any]:
        """Send a command and return at once: calling what is returned waits for the answer. QEMU does what it
        was sent in this order, without the way to us and back between two commands."""
        answer = self._loop.begin(partial(self._execute, command, arguments))
        return lambda: self._wait(answer, seconds, command)

    def human(self, line: str) -> str:
        """The text that a command of the human monitor prints."""
        return str(self.execute("human-monitor-command", {"command-line": line}))

    def pass_descriptor(self, fd: int, name: str) -> None:
        """Hand a descriptor over, for QEMU to use as ``fd:NAME`` (its own copy: ours stays ours)."""
        self._run(partial(self._execute, "getfd", {"fdname": name}, fd), None, "getfd")

    def pass_file(self, fd: int) -> int:
        """Hand a descriptor over, for QEMU to open as ``/dev/fdset/N``. Returns N."""
        done = self._run(partial(self._execute, "add-fd", {}, fd), None, "add-fd")
        return Reply(done, "QEMU's answer to add-fd").number("fdset-id", 63)

    def events(self) -> list[tuple[str, int]]:
        """The events since the last call: (name, QEMU's clock in nanoseconds)."""
        found = []
        for event in self._run(self._take_events, None):
            told = Reply(dict(event), "an event of QEMU's")
            stamp = told.object("timestamp")
            at = stamp.number("seconds", 33) * 10**9 + stamp.number("microseconds", 20) * 1000
            found.append((told.plain("event"), at))
        return found

    def stood_ns(self) -> int | None:
        """How long the guest stood, by the events since the last `events`. None: they do not say, or QEMU's
        clock was set meanwhile."""
        at = dict(self.events())
        stood = at.get("RESUME", -1) - at.get("STOP", 0)
        return stood if stood >= 0 and "STOP" in at else None

    def shorten_waits(self) -> None:
        """The operation is being cancelled: from now on wait at most some seconds for each answer, which is
        enough for the commands that undo it. For any thread."""
        self._shortened = True

    def close(self) -> None:
        """Disconnect; QEMU goes on. Idempotent."""
        try:
            self._close()
        except BaseException:  # a Ctrl-C: QEMU's monitor serves nobody else until the connection is closed
            self._close()
            raise

    def _close(self) -> None:
        if not self._disconnected and self._loop.runs:
            # What the connection ended with is not news any more.
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
            self._client.send_fd_scm(fd)  # it goes with the next command's first byte
        return await self._client.execute(command, arguments)

    async def _take_events(self) -> list[Any]:
        return list(self._events.clear())

    # -- on the caller's thread --

    def _connect(self, address: str, seconds: float) -> None:
        target = parse_address(address)
        made = self._socket = socket.socket(socket.AF_UNIX if isinstance(target, str) else socket.AF_INET)
        made.settimeout(seconds)
        try:
            made.connect(target)
        except BlockingIOError:
            raise MachineError(f"{address}: another client holds the connection, and others wait") from None
        except OSError as error:
            raise MachineError(f"{address}: no QEMU listens there ({error.strerror or error})") from None
        made.setblocking(False)

    def _run(
        self, work: Callable[[], Coroutine[Any, Any, Value]], seconds: float | None, command: str = ""
    ) -> Value:
        """Do `work` on the loop and wait for it."""
        return self._wait(self._loop.begin(work), seconds, command)

    def _result(self, answer: Answer[Value], limit: float) -> Value:
        """The value of `answer`. TimeoutError after `limit` seconds, or soon after `shorten_waits`."""
        until = time.monotonic() + limit
        shortened = False
        while True:
            if self._shortened and not shortened:
                shortened, until = True, min(until, time.monotonic() + SHORTENED_SECONDS)
            if answer.is_filled(max(0.0, min(until - time.monotonic(), POLL_SECONDS))):
                return answer.take()
            if time.monotonic() >= until:
                raise TimeoutError

    def _wait(self, answer: Answer[Value], seconds: float | None, command: str) -> Value:
        """The answer; what can go wrong becomes an error of ours."""
        seconds = self.command_seconds if seconds is None else seconds
        try:
            return self._result(answer, seconds)
        except TimeoutError:
            self._loop.cancel(answer)
            what = f"{command} took more than {seconds:g} s" if command else "no greeting"
            hint = "" if command else ": it is not QMP, or another client holds the connection"
            raise MachineError(f"{self.address}: {what}{hint}") from None
        except ExecuteError as error:
            raise MachineError(f"QEMU refuses {command}: {error}") from None
        except ConnectError as error:
            raise MachineError(f"{self.address}: this is not QMP ({error.exc or error})") from None
        except (QMPError, EOFError, OSError, asyncio.CancelledError):  # cancelled: by our own `close`
            raise TargetGoneError(errno.ESRCH, f"{self.address}: QEMU has closed the connection") from None



async def _disconnect(client: QMPClient, loop: LoopThread, end: bool = False) -> None:
    """After what was begun and is not waited for any more, by an interrupted caller."""
    try:
        await loop.cancel_others()
        if client.runstate.name != "IDLE":
            await client.disconnect()
    finally:
        if end:
            loop.end()


def parse_address(address: str) -> str | tuple[str, int]:
    """A path, or (host, port). Raises ValueError."""
    if address.startswith("unix:"):
        return address[5:].split(",")[0]
    text = address.removeprefix("tcp:")
    host, colon, port = text.rpartition(":")
    if colon and port.isdecimal() and "/" not in text:
        return host or "localhost", int(port)
    if text != address:
        raise ValueError(f"{address!r} is not tcp:HOST:PORT")
    return address

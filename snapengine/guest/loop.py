"""The control thread of the embedded guest: one event loop for engines, the parent, signals and timeouts.

This thread reads the writers' counters but never touches the guest's RAM, which may be write-protected at any
time. So it answers an engine and the parent even while every writer is blocked in a page fault.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import selectors
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from snapengine.errors import HandoverError, SnapengineError
from snapengine.guest.memory import GuestMemory
from snapengine.guest.params import GuestParams
from snapengine.guest.signals import EndSignals
from snapengine.guest.writers import GuestWriters
from snapengine.handover.message import CONTROLS, encode_offer, strict_json
from snapengine.kernel.uffd import Uffd, supported_features
from snapengine.regions import PAGE_BYTES, Region, kind_of

REGION = "ram"
BLOB = "guest"
RETRY_SECONDS = 0.01
SEND_SECONDS = 5.0
PAUSE_SECONDS = 4.0
MAX_LINE_BYTES = 1 << 16
FORK_WRITE_BYTES = 1 << 20


class Guest:
    """RAM, its writers, and the commands that act on them."""

    def __init__(self, params: GuestParams, rate: int | None) -> None:
        self.params = params
        self.memory = GuestMemory(params)
        self.writers = GuestWriters(self.memory, rate)
        self.handovers = 0
        self.ended: dict[str, int] = {}
        """Number of snapshots by their final status; "lost" counts engines that disconnected."""

    def region(self) -> Region:
        """The RAM as a region of this process."""
        shared = self.memory.memfd >= 0
        huge = self.params.pages == "2m"
        return Region(
            name=REGION,
            addr=self.memory.addr,
            length=self.memory.length,
            page_size=512 * PAGE_BYTES if huge else PAGE_BYTES,
            kind=kind_of(512 * PAGE_BYTES if huge else PAGE_BYTES, shared),
            memfd=self.memory.memfd,
        )

    def stats(self) -> dict[str, Any]:
        """Counters since the start. Times are nanoseconds of CLOCK_MONOTONIC."""
        return {
            "pid": os.getpid(),
            "started_ns": self.writers.started_ns,
            "now_ns": time.monotonic_ns(),
            "paused": self.writers.paused,
            "writes": self.writers.counts(),
            "stalls": self.writers.stalls(),
            "handovers": self.handovers,
            "ended": self.ended,
        }

    def vmstate(self) -> bytes:
        """The state that `check_image` needs: the parameters and the current write counts."""
        state = {
            "params": self.params.to_json(),
            "rate": self.writers.rate,
            "paused": self.writers.paused,
            "writes": self.writers.counts(),
        }
        return json.dumps(state).encode()

    def fork(self, path: str) -> int:
        """Save by fork and copy-on-write: a forked child writes the RAM into a file and exits.

        Returns the child's process id. The child is reaped at the next fork, or when the guest ends.
        """
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        child = os.fork()
        if child:
            return child
        try:
            with open(path, "wb", buffering=0) as file, memoryview(self.memory) as ram:
                for start in range(0, len(ram), FORK_WRITE_BYTES):
                    file.write(ram[start : start + FORK_WRITE_BYTES])
            os._exit(0)
        finally:
            os._exit(1)

    def answer(self, line: bytes, *, parent: bool = False) -> dict[str, Any]:
        """Execute a control line. Only the `parent` may ``fork``, because that writes a file."""
        try:
            request = strict_json(line, "command")
            command = request.get("cmd") if isinstance(request, dict) else None
            if command == "pause":
                self.writers.pause(PAUSE_SECONDS)
                return {"ok": True, "writes": self.writers.counts()}
            if command == "resume":
                self.writers.resume()
                return {"ok": True}
            if command == "vmstate":
                return {"ok": True, "vmstate": {BLOB: base64.b64encode(self.vmstate()).decode()}}
            if command == "stats":
                return {"ok": True, "stats": self.stats()}
            if command == "fork" and parent:
                return {"ok": True, "child": self.fork(str(request["path"]))}
            if command == "bins":
                return {"ok": True, "bins": self.writers.bins(int(request.get("since_ns", 0)))}
            return {"ok": False, "error": f"unknown command {command!r}"}
        except (SnapengineError, OSError, ValueError, TypeError, OverflowError) as error:
            return {"ok": False, "error": str(error)}


class GuestLoop:
    """Runs a guest until a signal arrives, its parent ends, or `duration` seconds have passed.

    With `stdio` the parent writes control lines to stdin and reads the answers from stdout. End of file on
    stdin ends the guest.
    """

    def __init__(
        self, guest: Guest, path: str, signals: EndSignals, stdio: bool = False, duration: float = 0.0
    ) -> None:
        self.guest = guest
        self._signals = signals
        self._path = path
        self._stdio = stdio
        self._deadline = time.monotonic() + duration if duration else float("inf")
        self._selector = selectors.DefaultSelector()
        self._stopping = False
        self._engine: socket.socket | None = None
        self._handed_over = False
        self._paused = False
        self._buffers: dict[str, bytearray] = {"engine": bytearray(), "stdin": bytearray()}
        self._next_connect = 0.0
        self._last_error = ""

    def run(self) -> None:
        """Run the event loop."""
        self._selector.register(self._signals.fd, selectors.EVENT_READ, self._signals.drain)
        if self._stdio:
            self._selector.register(0, selectors.EVENT_READ, self._read_stdin)
        self.guest.writers.resume()
        while not (self._stopping or self._signals.received) and time.monotonic() < self._deadline:
            self._connect()
            for key, _ in self._selector.select(self._select_timeout()):
                handler: Callable[[], None] = key.data
                handler()
        self._disconnect("lost")
        self._selector.close()

    def _select_timeout(self) -> float | None:
        until = self._deadline
        if self._engine is None:
            until = min(until, self._next_connect)
        return None if until == float("inf") else max(0.0, until - time.monotonic())

    def _connect(self) -> None:
        if self._engine is not None or time.monotonic() < self._next_connect:
            return
        self._next_connect = time.monotonic() + RETRY_SECONDS
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.connect(self._path)
        except OSError:  # no engine is listening, the socket is stale, or its backlog is full
            sock.close()
            return
        sock.settimeout(SEND_SECONDS)
        self._engine, self._handed_over, self._paused = sock, False, False
        self._buffers["engine"].clear()
        self._selector.register(sock, selectors.EVENT_READ, self._read_engine)

    def _disconnect(self, status: str) -> None:
        """Disconnect the engine. Resume the writers if it left them paused."""
        sock, self._engine = self._engine, None
        if sock is None:
            return
        self._selector.unregister(sock)
        sock.close()
        if self._handed_over:
            self.guest.ended[status] = self.guest.ended.get(status, 0) + 1
        if self._paused:
            self.guest.writers.resume()

    def _read_engine(self) -> None:
        assert self._engine is not None
        try:
            data = self._engine.recv(MAX_LINE_BYTES)
            lines = self._lines("engine", data)
            for line in lines:
                if not self._handed_over:
                    self._hand_over(line)
                elif not self._handle_command(line):
                    return
        except (ConnectionError, TimeoutError):
            data = b""
        except (OSError, SnapengineError) as error:
            data = b""
            self._print_error(str(error))
        if not data:
            self._disconnect("lost")

    def _print_error(self, text: str) -> None:
        """Print to stderr, but not the same error again: the next engine may connect within milliseconds."""
        if text != self._last_error:
            print(f"snapengine guest: {text}", file=sys.stderr, flush=True)
        self._last_error = text

    def _hand_over(self, greeting: bytes) -> None:
        assert self._engine is not None
        message = strict_json(greeting, "greeting")
        features = message.get("features") if isinstance(message, dict) else None
        if type(features) is not int or not 0 <= features < 1 << 64:
            raise HandoverError("greeting: features: not an integer of 64 bits")
        region = self.guest.region()
        memfds = [region.memfd] if region.memfd >= 0 else []
        # Close our copy at once: the RAM stays protected after the engine's death while any copy is open.
        with Uffd(features & supported_features()) as uffd:
            offer = encode_offer([region], memfds, CONTROLS)
            socket.send_fds(self._engine, [offer], [uffd.fd, *memfds])
        self._handed_over = True
        self.guest.handovers += 1

    def _handle_command(self, line: bytes) -> bool:
        assert self._engine is not None
        request = strict_json(line, "command")
        command = request.get("cmd") if isinstance(request, dict) else None
        if command == "done":
            self._disconnect(str(request.get("status", ""))[:40])
            return False
        answer = self.guest.answer(line)
        if command in ("pause", "resume"):
            self._paused = command == "pause" and answer["ok"]
        self._engine.sendall(json.dumps(answer).encode() + b"\n")
        return True

    def _read_stdin(self) -> None:
        data = os.read(0, MAX_LINE_BYTES)
        if not data:
            self._stopping = True
        for line in self._lines("stdin", data):
            write_line(self.guest.answer(line, parent=True))

    def _lines(self, source: str, data: bytes) -> list[bytes]:
        buffer = self._buffers[source]
        buffer += data
        *lines, rest = bytes(buffer).split(b"\n")
        buffer[:] = rest
        if len(rest) > MAX_LINE_BYTES:
            raise SnapengineError(f"{source}: a line longer than {MAX_LINE_BYTES} bytes")
        return lines


def write_line(message: dict[str, Any]) -> None:
    """Write one line of JSON to stdout, completely."""
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(1, data) :]

"""A QMP client that waits for each answer, for tests and benches: one socket, one command at a time."""

import json
import socket
import time

from waitkit import PATIENCE_S


class QmpError(Exception):
    """QEMU refused a command: `kind` is its error class, the text its description."""

    def __init__(self, kind, text):
        super().__init__(text)
        self.kind = kind


class Qmp:
    """A connection to QEMU's monitor at the Unix socket `path`; ``qmp("query-status")``.

    A monitor serves one client at a time, so the machine needs another socket for the code under test.
    `events` holds all received events, oldest first.
    """

    def __init__(self, path, deadline_s=PATIENCE_S):
        self.events = []
        self.deadline_s = deadline_s
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(deadline_s)
        self._rest = b""
        try:
            self._socket.connect(str(path))
            self.greeting = self._message()["QMP"]
            self("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def __call__(self, command, **arguments):
        """Run `command`; "_" in the names of `arguments` becomes "-"."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        request = {"execute": command, "arguments": named} if named else {"execute": command}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            message = self._message()
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise QmpError(message["error"]["class"], message["error"]["desc"])
            self.events.append(message)

    def hmp(self, line):
        """The output of the human monitor for `line`."""
        return self("human-monitor-command", command_line=line)

    def wait_for(self, event, since=0):
        """The first event of that name; the first `since` events are skipped."""
        end = time.monotonic() + self.deadline_s
        while True:
            for message in self.events[since:]:
                if message["event"] == event:
                    return message
            assert time.monotonic() < end, f"no event {event} in {self.deadline_s} s"
            message = self._message()
            assert "event" in message, f"an answer that nobody waits for: {message}"
            self.events.append(message)

    def close(self):
        self._socket.close()

    def _message(self):
        """The next line that QEMU sends; ConnectionError when it is gone."""
        while b"\n" not in self._rest:
            received = self._socket.recv(65536)
            if not received:
                raise ConnectionError("QEMU closed its monitor")
            self._rest += received
        line, self._rest = self._rest.split(b"\n", 1)
        return json.loads(line)

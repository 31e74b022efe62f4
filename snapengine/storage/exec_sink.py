"""A sink that pipes the image to a shell command."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import subprocess

from snapengine.base.descriptor import Descriptor
from snapengine.errors import SinkError
from snapengine.storage.pipes import enlarge_pipe
from snapengine.storage.sink import OwningSink, sink_error

GRACE_S = 2.0  # between SIGTERM and SIGKILL


class ExecSink(OwningSink):
    """Runs a shell command, which reads the image from its standard input."""

    def __init__(self, command: str) -> None:
        super().__init__(f"exec:{command}")
        self._cancelled = False
        reader, self._pipe = Descriptor.pipe()
        self.fd = self._pipe.fd
        os.set_blocking(self.fd, False)  # not shared: the command has the other end of the pipe
        enlarge_pipe(self.fd)
        # A new session: abort signals the shell and its children, and Ctrl-C does not reach them.
        shell = ["/bin/sh", "-c", command]
        try:
            with reader as stdin:
                self._process = subprocess.Popen(shell, stdin=stdin, start_new_session=True)
        except OSError as error:
            self._pipe.close()
            raise sink_error(self.name, error) from None
        self._take_ownership()

    def explain(self, err: int) -> str:
        if err != errno.EPIPE:
            return os.strerror(err)
        try:
            return f"the command stopped reading ({_exit_text(self._process.wait(GRACE_S))})"
        except subprocess.TimeoutExpired:
            return "the command stopped reading"

    def cancel(self) -> None:
        self._cancelled = True

    def _commit(self) -> None:
        self._pipe.close()
        try:
            code = self._wait_for_end()
        except BaseException:
            self._stop()
            raise
        if code:
            raise SinkError(errno.EIO, f"{self.name}: {_exit_text(code)}")

    def _wait_for_end(self) -> int:
        with Descriptor.pidfd(self._process.pid) as pidfd:
            while not select.select([pidfd], [], [], 0.1)[0]:
                if self._cancelled:
                    text = f"{self.name}: the command was terminated before it finished"
                    raise SinkError(errno.ECANCELED, text)
        return self._process.wait()

    def _abort(self) -> None:
        self._stop()  # before the pipe is closed: the command would take the end of file for a complete image
        self._pipe.close()

    def _stop(self) -> None:
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_S)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def _exit_text(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit status {code}"

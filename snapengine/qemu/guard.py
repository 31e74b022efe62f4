"""A helper that resumes the machine, and resets its migration settings, if this process dies.

The machine depends on this process between `stop` and `cont`, while its migration has our settings, and while
QEMU 7.2 makes a background-snapshot (see `snapengine.qemu.from_stream.drain`). During these times a shell
reads from a pipe of ours. If the pipe closes without a message, as it does when we are killed, the shell
sends the commands that we would have sent.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Sequence
from typing import Any

Command = tuple[str, dict[str, Any]]
"""A QMP command and its arguments."""

# In the shell, descriptor 0 is the pipe, whose end makes `read` fail, 1 is QMP, and 2 is the stream to drain,
# or /dev/null. QEMU refuses settings until shortly after the end of the stream, so the commands repeat.
# The connection stays open for a while, since QEMU discards unread commands when it is closed.
SCRIPT = """read word || {
    repeats=$1
    shift
    cat <&2 >/dev/null
    while [ $repeats -gt 0 ]; do
        printf '%s\\n' "$@"
        sleep 1
        repeats=$((repeats - 1))
    done
    sleep 4
}"""


class Guard:
    """Watches from `__init__` until `dismiss` or `release`.

    Parameters
    ----------
    fd:
        A connection to QMP after `qmp_capabilities`; -1: none. Each of our commands is one send(), so a
        command of the guard cannot fall into the middle of one.
    commands:
        The commands that QEMU gets if we die.
    drain_fd:
        The read end of a pipe into which QEMU writes; it is drained first. -1: none.
    repeats:
        How often the commands are sent, one second apart.
    """

    _pipe = -1

    def __init__(self, fd: int, commands: Sequence[Command], *, drain_fd: int = -1, repeats: int = 1) -> None:
        lines = [json.dumps({"execute": name, "arguments": values}) for name, values in commands]
        ours, self._pipe = os.pipe()
        try:
            # A session of its own: a Ctrl-C or a kill of our process group must not end it.
            self._shell = subprocess.Popen(
                ["/bin/sh", "-c", SCRIPT, "sh", str(repeats if lines else 0), *lines],
                stdin=ours,
                stdout=fd if fd >= 0 else subprocess.DEVNULL,
                stderr=drain_fd if drain_fd >= 0 else subprocess.DEVNULL,
                start_new_session=True,
            )
        except BaseException:
            os.close(self._pipe)
            self._pipe = -1
            raise
        finally:
            os.close(ours)

    def __del__(self) -> None:
        """For a Ctrl-C before the caller has the object in a variable. The commands do no harm then."""
        self.release()

    def dismiss(self) -> None:
        """End the guard without sending anything. Idempotent."""
        if self._pipe < 0:
            return
        with contextlib.suppress(BrokenPipeError):  # the shell was killed
            os.write(self._pipe, b"done\n")
        self.release()
        self._shell.wait()

    def release(self) -> None:
        """Make the shell send its commands now. Idempotent."""
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1

"""A machine must not stand still, or keep settings of ours, because we died.

It depends on us between `stop` and `cont`, while its migration has our settings, and while QEMU 7.2 makes a
background-snapshot (see `snapengine.qemu.ingest.drain`). Then a shell waits beside us at a pipe; when that
closes without a word, as it does when we are killed, the shell does what we would have done.
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

# In the shell descriptor 0 is the pipe, whose end makes `read` fail, 1 is QMP, and 2 is the stream to drain,
# or /dev/null. A migration ends a moment after its stream, and only then takes settings: hence the turns.
# The connection stays open for a while: QEMU drops what it has not read of one that is closed.
SCRIPT = """read word || {
    turns=$1
    shift
    cat <&2 >/dev/null
    while [ $turns -gt 0 ]; do
        printf '%s\\n' "$@"
        sleep 1
        turns=$((turns - 1))
    done
    sleep 4
}"""


class Guard:
    """Watches from `__init__` until `dismiss` or `release`.

    Parameters
    ----------
    fd:
        A connection to QMP that has said `qmp_capabilities`: QEMU takes whole commands from it, whoever
        writes them; each of ours is one send(), so the guard's cannot fall into the middle of one. -1: none.
    commands:
        What QEMU is told when we have died.
    drain_fd:
        The end of a pipe that QEMU writes into, to be read to its end before; -1: none.
    turns:
        How often the commands are sent, a second apart.
    """

    _pipe = -1

    def __init__(self, fd: int, commands: Sequence[Command], *, drain_fd: int = -1, turns: int = 1) -> None:
        lines = [json.dumps({"execute": name, "arguments": values}) for name, values in commands]
        ours, self._pipe = os.pipe()
        try:
            # A session of its own: a Ctrl-C or a kill of our process group must not end it.
            self._shell = subprocess.Popen(
                ["/bin/sh", "-c", SCRIPT, "sh", str(turns if lines else 0), *lines],
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
        """A Ctrl-C may come before the caller has us in a variable. The commands do no harm then."""
        self.release()

    def dismiss(self) -> None:
        """The danger is over. Idempotent."""
        if self._pipe < 0:
            return
        with contextlib.suppress(BrokenPipeError):  # somebody has ended the shell
            os.write(self._pipe, b"done\n")
        self.release()
        self._shell.wait()

    def release(self) -> None:
        """Let the shell do its work now. Idempotent."""
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1

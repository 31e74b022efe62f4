"""A machine must not stand still because we died.

Twice it depends on us for a while: between `stop` and `cont`, and while QEMU 7.2 makes a
background-snapshot (see `snapengine.qemu.ingest.drain`). Then a shell waits beside us at a pipe; when that
closes without a word, as it does when we are killed, the shell does what we would have done.
"""

from __future__ import annotations

import os
import subprocess

# In the shell descriptor 0 is the pipe, whose end makes `read` fail, and 1 is the guarded descriptor.
# The connection stays open for a while: QEMU drops what it has not read of one that is closed.
GO_ON = """read word || { printf '{"execute":"cont"}\\n'; sleep 5; }"""
DRAIN = "read word || cat <&1 >/dev/null"


class Guard:
    """Watches from `__init__` until `dismiss`.

    Parameters
    ----------
    fd:
        For `GO_ON` a connection to QMP that has said `qmp_capabilities`: QEMU takes whole commands from it,
        whoever writes them; each of ours is one send(), so the guard's cannot fall into the middle of one.
        For `DRAIN` the end of a pipe that QEMU writes into.
    script:
        `GO_ON` or `DRAIN`.
    """

    def __init__(self, fd: int, script: str) -> None:
        ours, self._pipe = os.pipe()
        try:
            # A session of its own: a Ctrl-C or a kill of our process group must not end it.
            self._shell = subprocess.Popen(
                ["/bin/sh", "-c", script], stdin=ours, stdout=fd, stderr=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        except BaseException:
            os.close(self._pipe)
            raise
        finally:
            os.close(ours)

    def dismiss(self) -> None:
        """The danger is over. Idempotent."""
        if self._pipe < 0:
            return
        os.write(self._pipe, b"done\n")
        os.close(self._pipe)
        self._pipe = -1
        self._shell.wait()

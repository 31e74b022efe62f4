"""A machine that we have stopped goes on if we die.

The few milliseconds in which a machine stands are the only ones in which a SIGKILL of ours could leave it
standing. So a shell waits beside us at a pipe: when the pipe closes without a word, it tells QEMU to go on.
"""

from __future__ import annotations

import os
import subprocess

CONT = '{"execute":"cont"}\\n'
# Descriptor 0 is the pipe, 1 the connection to QEMU. `read` fails at the pipe's end. Then the connection stays
# open for a while: QEMU drops what it has not read of one that is closed.
SCRIPT = f"read word || {{ printf '{CONT}'; sleep 5; }}"


class Guard:
    """Watches from `__init__` until `dismiss`.

    ``socket_fd``: a connection to QMP that has said `qmp_capabilities`. QEMU takes whole commands from it,
    whoever writes them; each of ours is one send(), so the guard's cannot fall into the middle of one.
    """

    def __init__(self, socket_fd: int) -> None:
        ours, self._pipe = os.pipe()
        try:
            # A session of its own: a Ctrl-C or a kill of our process group must not end it.
            self._shell = subprocess.Popen(
                ["/bin/sh", "-c", SCRIPT], stdin=ours, stdout=socket_fd, stderr=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        except BaseException:
            os.close(self._pipe)
            raise
        finally:
            os.close(ours)

    def dismiss(self) -> None:
        """The machine runs. Idempotent."""
        if self._pipe < 0:
            return
        os.write(self._pipe, b"done\n")
        os.close(self._pipe)
        self._pipe = -1
        self._shell.wait()

"""Runs a command, and ends it with all that it has started when its own standard input ends, or after a time.

``supervise.py SECONDS COMMAND...`` prints the command's process id. Who started it keeps the other end of the
pipe: however that process ends, nothing of the command stays. Only the standard library.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys

PR_SET_CHILD_SUBREAPER = 36


def end_all_children():
    """Who is orphaned becomes a child of this process, and is ended in the next turn."""
    while True:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
            for child in file.read().split():
                os.kill(int(child), signal.SIGKILL)  # it is not reaped yet: the number is its own
        try:
            os.wait()
        except ChildProcessError:
            return


def main(seconds, *command):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for who started this
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    print(process.pid, flush=True)
    select.select([sys.stdin], [], [], float(seconds))
    end_all_children()


if __name__ == "__main__":
    main(*sys.argv[1:])

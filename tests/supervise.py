"""Run a command, and end it and all its descendants when standard input ends, or after a time.

``supervise.py SECONDS COMMAND...`` prints the command's process id. The caller keeps the other end of the
pipe: however the caller ends, no process of the command remains. It uses the standard library only.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys

PR_SET_CHILD_SUBREAPER = 36


def end_all_children():
    """Orphaned descendants become children of this process, and are ended in the next iteration."""
    while True:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
            for child in file.read().split():
                os.kill(int(child), signal.SIGKILL)  # not reaped yet, so the pid cannot have been reused
        try:
            os.wait()
        except ChildProcessError:
            return


def main(seconds, *command):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the caller
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    print(process.pid, flush=True)
    select.select([sys.stdin], [], [], float(seconds))
    end_all_children()


if __name__ == "__main__":
    main(*sys.argv[1:])

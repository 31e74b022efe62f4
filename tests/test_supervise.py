"""Programs that realkit starts do not outlive the test run, however it ends."""

import signal
import subprocess
import sys
from pathlib import Path

from realkit import Running, children
from waitkit import until

FAMILY = ["sh", "-c", "setsid sleep 600 & sleep 600 & echo started; wait"]
STARTER = """
import sys
from realkit import Running
running = Running(sys.argv[2:], sys.argv[1])
print(running.pid, flush=True)
sys.stdin.read()
"""


def family_of(pid):
    """The command's process and the two that it starts."""
    until(lambda: len(children(pid)) == 2, "it starts nothing")
    return [pid, *children(pid)]


def gone(pids):
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_all_of_it_ends_with_the_block(tmp_path):
    with Running(FAMILY, tmp_path / "log") as running:
        running.until(lambda: "started" in running.said(), "it says nothing")
        pids = family_of(running.pid)
        assert not running.ended()
    assert gone(pids)


def test_all_of_it_ends_with_who_started_it(tmp_path):
    command = [sys.executable, "-c", STARTER, str(tmp_path / "log"), *FAMILY]
    folder = str(Path(__file__).parent)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=folder, **pipes) as starter:
        pids = family_of(int(starter.stdout.readline()))
        starter.send_signal(signal.SIGKILL)
    until(lambda: gone(pids), "something lives on")

"""Small C programs to attach to, and the words that they share with the test."""

import contextlib
import functools
import mmap
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from waitkit import PATIENCE_S, until

from snapengine.errors import AttachError
from snapengine.process.inject import inject_userfaultfd

SOURCES = Path(__file__).parent / "targets"
READY, ERRORS, MEMORY, PAGES, VALUES, COUNTERS = 0, 1, 2, 3, 4, 8  # targets/target.h

# The calls of targets/blocking.c that a stop could end early.
CALLS = [
    *("epoll_wait", "epoll_wait_timeout", "epoll_pwait", "epoll_pwait2", "recv_timeout"),
    *("read_socket_timeout", "accept_timeout", "semtimedop", "sigtimedwait", "io_getevents"),
    *("io_uring_enter", "msgrcv", "nanosleep", "futex", "poll", "pselect", "pause", "sigsuspend"),
    *("read_pipe", "read_eventfd"),
]


@functools.cache
def _room():
    """Accessible to every user: some targets run as another user."""
    room = Path(tempfile.mkdtemp(prefix="snapengine-targets-"))
    room.chmod(0o755)
    return room


def remove_programs():
    if _room.cache_info().currsize:
        shutil.rmtree(_room())


@functools.cache
def program(name, *flags):
    """The path of targets/NAME.c, compiled."""
    path = _room() / "".join([name, *flags])
    command = ["gcc", "-O2", "-Wall", "-Werror", *flags, "-o", str(path), str(SOURCES / f"{name}.c")]
    built = subprocess.run([*command, "-pthread"], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    path.chmod(0o755)
    return str(path)


def state_of(pid, tid=None):
    """The state letter of a thread (proc(5)); "" if it is gone."""
    try:
        text = Path(f"/proc/{pid}/task/{tid or pid}/stat").read_text()
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[0]


def thread_names(pid="self"):
    """The thread ids, as the kernel lists them."""
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError):  # it has ended
            found.append(Path(f"/proc/{pid}/task/{task}/comm").read_text().rstrip("\n"))
    return found


def status_line(pid, name):
    """One line of /proc/PID/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return line.split(":", 1)[1].strip()
    raise KeyError(name)


def descriptors(pid):
    found = {}
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found[fd] = os.readlink(f"/proc/{pid}/fd/{fd}")
    return found


class Target:
    """A running program: ``with Target("compute", 3) as target``. ``words[i]`` are its words.

    `wrapper`: a command that ends in executing it. `flags`: for the compiler.
    """

    def __init__(self, name, *arguments, ready=1, wrapper=(), flags=(), **popen):
        self._memfd = os.memfd_create("words")
        os.fchmod(self._memfd, 0o666)
        os.ftruncate(self._memfd, 4096)
        self._mapped = mmap.mmap(self._memfd, 4096)
        self.words = memoryview(self._mapped).cast("Q")
        command = [*wrapper, program(name, *flags), str(self._memfd), *map(str, arguments)]
        self.process = subprocess.Popen(command, pass_fds=[self._memfd], **popen)
        self.pid = self.process.pid
        until(lambda: self.words[READY] >= ready or self.process.poll() is not None, "not ready")
        assert self.process.poll() is None, f"{command} ended with {self.process.returncode}"

    @property
    def tids(self):
        return sorted(map(int, os.listdir(f"/proc/{self.pid}/task")))

    def counters(self, n):
        return list(self.words[COUNTERS : COUNTERS + n])

    def check_running(self, n=1):
        """The target lives, has reported no error, and each of its `n` counters increases."""
        before = self.counters(n)
        until(
            lambda: (
                self.process.poll() is not None
                or all(now > then for now, then in zip(self.counters(n), before, strict=True))
            ),
            f"it makes no progress: {state_of(self.pid)}",
        )
        assert self.process.poll() is None, f"it ended: {self.process.returncode}"
        assert self.words[ERRORS] == 0

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.words.release()
        self._mapped.close()
        os.close(self._memfd)


def refuse_in(call, kind=AttachError):
    """The error that `call` raises; it must be one line."""
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return caught.value


def inject(pid, **options):
    """Inject, close the descriptor at once, and return the `Injected`."""
    injected = inject_userfaultfd(pid, **({"deadline": PATIENCE_S} | options))
    os.close(injected.fd)
    return injected


def refusal(pid, kind=AttachError, **options):
    return refuse_in(lambda: inject(pid, **options), kind)


@contextlib.contextmanager
def traced(pid):
    """Have another process trace it, and yield the pid of that tracer once it has attached."""
    script = (
        "import ctypes, sys; libc = ctypes.CDLL(None);"
        "libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p];"
        f"assert libc.ptrace(0x4206, {pid}, None, None) == 0;"
        "print(flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as tracer:
        assert tracer.stdout.readline() == b"\n"
        yield tracer.pid
        tracer.stdin.close()

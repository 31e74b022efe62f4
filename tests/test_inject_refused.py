"""Refused injections, and processes of another user: what cannot be attached to, and the messages."""

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from targetkit import (
    MEMORY,
    SOURCES,
    VALUES,
    Target,
    descriptors,
    inject,
    refusal,
    state_of,
    status_line,
    traced,
    until,
)
from waitkit import PATIENCE_S

import snapengine
from snapengine.errors import AttachError, TargetGoneError, UffdPermissionError
from snapengine.kernel.uffd import FEATURES, Uffd
from snapengine.process import permissions
from snapengine.process.inject import inject_userfaultfd

pytestmark = pytest.mark.usefixtures("requires_uffd", "programs")

PAGE = 4096
NOBODY = 65534


def test_no_such_process():
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert refusal(ended.pid).errno == errno.ESRCH
    assert "not a process id" in str(refusal(0))
    assert "not a process id" in str(refusal(-1))


def test_a_thread_is_not_a_process():
    with Target("compute", 2) as target:
        assert f"thread of process {target.pid}" in str(refusal(target.tids[-1]))


def test_our_own_process():
    assert "BufferTarget" in str(refusal(os.getpid()))


@pytest.mark.usefixtures("as_root")
def test_a_kernel_thread():
    if Path("/proc/2/comm").read_text() != "kthreadd\n":
        pytest.skip("pid 2 is not kthreadd: a pid namespace")
    assert "kernel thread" in str(refusal(2))


def test_a_zombie():
    with Target("odd", "zombie") as target:
        assert "has ended" in str(refusal(target.words[VALUES], TargetGoneError))


@pytest.mark.host_optional
def test_a_32_bit_program(tmp_path):
    path = tmp_path / "plain32"
    flags = ["-m32", "-nostdlib", "-static", "-ffreestanding", "-fno-pie", "-no-pie"]
    command = ["gcc", *flags, "-o", path, SOURCES / "plain32.c"]
    built = subprocess.run(command, check=False, capture_output=True)
    if built.returncode:
        pytest.skip("this gcc makes no 32-bit programs")
    try:
        process = subprocess.Popen([path])
    except OSError as error:
        pytest.skip(f"this kernel runs no 32-bit programs: {error}")
    try:
        assert "32-bit" in str(refusal(process.pid))
    finally:
        process.kill()
        process.wait()


def test_a_traced_process():
    with Target("compute", 1) as target:
        with traced(target.pid) as tracer:
            error = refusal(target.pid)
            assert error.errno == errno.EBUSY
            assert f"traced by {tracer} (python" in str(error)
        target.check_running()
        inject(target.pid)


def test_a_traced_process_found_too_late(monkeypatch):
    """It was not traced when it was checked: the kernel's EPERM is explained."""
    monkeypatch.setattr(permissions, "refuse_reason", lambda info: None)
    with Target("compute", 1) as target, traced(target.pid) as tracer:
        assert f"traced by {tracer}" in str(refusal(target.pid))


def test_the_parent_of_a_vfork():
    with Target("odd", "vfork") as target:
        until(lambda: state_of(target.pid) == "D")
        began = time.monotonic()
        error = refusal(target.pid, deadline=0.2)
        assert time.monotonic() - began >= 0.2
        assert error.errno == errno.ETIMEDOUT
        assert "uninterruptible sleep" in str(error)
        assert status_line(target.pid, "TracerPid") == "0"
        target.words[MEMORY] = 1
        target.check_running()
        inject(target.pid)


def test_it_dies_meanwhile():
    for _ in range(15):
        with Target("compute", 2) as target:
            killer = threading.Timer(random.uniform(0, 0.004), os.kill, (target.pid, signal.SIGKILL))
            killer.start()
            with contextlib.suppress(TargetGoneError, AttachError):
                while True:
                    inject(target.pid)
            killer.join()
            assert target.process.wait(PATIENCE_S) == -signal.SIGKILL


@pytest.mark.usefixtures("as_root")
def test_a_seccomp_filter_is_suspended():
    with Target("odd", "seccomp") as target:
        assert status_line(target.pid, "Seccomp") == "2"
        for _ in range(3):
            inject(target.pid)
        target.check_running()
        assert status_line(target.pid, "Seccomp") == "2"


def test_a_seccomp_filter_that_may_not_be_suspended(monkeypatch):
    monkeypatch.setattr(permissions, "has_capability", lambda bit: False)
    with Target("odd", "seccomp") as target:
        assert "seccomp filter" in str(refusal(target.pid))
        target.check_running()


# Another user's process


@pytest.mark.usefixtures("as_root")
def test_another_user_is_handed_the_device():
    with Target("compute", 1, user=NOBODY, group=NOBODY, extra_groups=[]) as target:
        before = descriptors(target.pid)
        injected = inject_userfaultfd(target.pid)
        with Uffd(FEATURES["PAGEFAULT_FLAG_WP"], fd=injected.fd) as uffd:
            uffd.register(target.words[MEMORY], PAGE)
        assert descriptors(target.pid) == before
        target.check_running()


@pytest.mark.usefixtures("as_root")
def test_a_device_that_cannot_be_opened():
    with Target("compute", 1) as target:
        inject(target.pid, device="/dev/userfaultfd")
        target.check_running()
        assert "No such file" in str(refusal(target.pid, UffdPermissionError, device="/dev/no-such-device"))


@pytest.mark.usefixtures("as_root")
def test_a_device_that_is_another():
    with Target("compute", 1) as target:
        before = descriptors(target.pid)
        error = refusal(target.pid, UffdPermissionError, device="/dev/null")
        assert error.errno == errno.ENOTTY
        assert "/dev/null" in str(error)
        assert descriptors(target.pid) == before
        target.check_running()


@pytest.mark.usefixtures("as_root")
def test_we_may_not_trace_another_users_process():
    script = (
        "import os, sys\n"
        "from snapengine.errors import AttachError\n"
        "from snapengine.process.inject import inject_userfaultfd\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: inject_userfaultfd(int(sys.argv[1]))\n"
        "except AttachError as error: print(error.errno, error)\n"
    )
    with Target("compute", 1) as target:
        done = run_engine(script, target.pid)
        assert done.stdout.startswith("1 "), done.stderr
        assert "belongs to uid 0: attaching needs root or CAP_SYS_PTRACE" in done.stdout


def run_engine(script, *arguments):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    room = Path(snapengine.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(room), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

"""The checks of a process before it is attached to."""

import dataclasses
import errno
import os
import shutil
import subprocess

import pytest
from targetkit import VALUES, Target, state_of, status_line, until

from snapengine.errors import AttachError, TargetGoneError, UffdPermissionError, UnsupportedError
from snapengine.kernel import procfs
from snapengine.process import inject_policy, permissions
from snapengine.process.permissions import describe, mergeable_mappings, refuse_reason, threads_to_stop

pytestmark = pytest.mark.usefixtures("programs")


def test_describe():
    with Target("compute", 3) as target:
        info = describe(target.pid)
        assert (info.pid, info.name, info.threads, info.bits) == (target.pid, "compute", 3, 64)
        assert info.state in "RS"
        assert (info.uid, info.fsuid) == (os.getuid(), os.geteuid())
        assert (info.tracer, info.tracer_name, info.seccomp) == (0, "", int(status_line("self", "Seccomp")))
        assert (info.same_mount_namespace, info.same_user_namespace) == (True, True)
        assert not info.kernel_thread
        assert not info.ended
        assert list(info.thread_ids) == target.tids
        assert refuse_reason(info) is None
        assert mergeable_mappings(target.pid) == 0


def test_describe_an_ended_leader():
    with Target("compute", 2, "leave") as target:
        until(lambda: state_of(target.pid) == "Z")
        info = describe(target.pid)
        assert info.state == "Z"
        assert not info.ended
        assert info.bits == 64
        assert target.pid not in info.thread_ids
        assert refuse_reason(info) is None


@pytest.mark.parametrize("name", ["a) S (b", ") (", "x y"])
def test_a_name_with_parentheses(name, tmp_path):
    path = shutil.copy(shutil.which("sleep"), tmp_path / name)
    with subprocess.Popen([path, "60"]) as process:
        until(lambda: state_of(process.pid) == "S")
        stat = permissions.thread_stat(process.pid, process.pid)
        process.kill()
    assert (stat.name, stat.state, stat.alive) == (name, "S", True)


def test_the_thread_that_bears_it_best():
    """Threads in calls that the kernel restarts unnoticed come before threads in calls that end early."""
    with Target("blocking", "epoll_wait", "futex", "semtimedop", ready=3) as target:
        until(lambda: all(state_of(target.pid, tid) == "S" for tid in target.tids))
        leader, epoll, futex, semaphore = target.tids
        assert threads_to_stop(target.pid) == [leader, futex, epoll, semaphore]
    with Target("odd", "vfork") as target:
        until(lambda: state_of(target.pid) == "D")
        assert threads_to_stop(target.pid) == [target.pid]


@pytest.fixture
def info():
    """The description of a process that can be attached to."""
    with Target("odd") as target:
        yield describe(target.pid)


@pytest.mark.parametrize(
    ("change", "number", "words"),
    [
        ({"pid": os.getpid()}, errno.EINVAL, "BufferTarget"),
        ({"kernel_thread": True}, errno.EOPNOTSUPP, "kernel thread"),
        ({"bits": 32}, errno.EOPNOTSUPP, "32-bit"),
        ({"tracer": 77, "tracer_name": "gdb"}, errno.EBUSY, "77 (gdb)"),
    ],
    ids=lambda value: "",
)
def test_reasons(info, change, number, words):
    error = refuse_reason(dataclasses.replace(info, **change))
    assert isinstance(error, AttachError)
    assert error.errno == number
    assert words in str(error)


def test_an_ended_process(info):
    assert isinstance(refuse_reason(dataclasses.replace(info, thread_ids=())), TargetGoneError)


def test_a_zombie():
    with Target("odd", "zombie") as target:
        assert describe(target.words[VALUES]).ended


def test_seccomp_that_cannot_be_suspended(info, monkeypatch):
    filtered = dataclasses.replace(info, seccomp=2)
    monkeypatch.setattr(permissions, "has_capability", lambda bit: bit != permissions.CAP_SYS_ADMIN)
    assert "CAP_SYS_ADMIN" in str(refuse_reason(filtered))
    monkeypatch.setattr(permissions, "has_capability", lambda bit: True)
    assert refuse_reason(filtered) is None


def test_why_it_is_denied(info, monkeypatch):
    other = dataclasses.replace(info, uid=os.geteuid() + 1)
    assert f"belongs to uid {other.uid}" in permissions.denied_because(other)
    apart = dataclasses.replace(info, same_user_namespace=False)
    assert "another user namespace" in permissions.denied_because(apart)
    read = procfs.read
    for scope, words in (("1", "ptrace_scope is 1"), ("3", "until the next boot"), ("0", "not dumpable")):
        fake = {"/proc/sys/kernel/yama/ptrace_scope": scope}
        monkeypatch.setattr(procfs, "read", lambda path, fake=fake: fake.get(path) or read(path))
        assert words in permissions.denied_because(info)


def test_not_a_process():
    for pid in (0, -5, 2**22 + 1):
        with pytest.raises(AttachError) as caught:
            describe(pid)
        assert caught.value.errno == errno.ESRCH
        assert isinstance(caught.value, OSError)


def test_the_syscall_instruction(info):
    address = inject_policy.syscall_instruction(info.pid)
    with open(f"/proc/{info.pid}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        assert memory.read(2) == b"\x0f\x05"


@pytest.mark.parametrize(
    ("step", "number", "kind", "words"),
    [
        ("call", errno.EPERM, UffdPermissionError, "vm.unprivileged_userfaultfd"),
        ("pass", errno.EACCES, UffdPermissionError, "/dev/userfaultfd"),
        ("call", errno.ENOSYS, UnsupportedError, "CONFIG_USERFAULTFD"),
        ("call", errno.EMFILE, AttachError, "no free descriptor"),
        ("call", errno.ETIMEDOUT, AttachError, "frozen"),
        ("compat", errno.EOPNOTSUPP, AttachError, "32-bit"),
        ("page", errno.ENOMEM, AttachError, "vm.max_map_count"),
        ("pass", errno.EMFILE, AttachError, "no free descriptor"),
        ("close", errno.ESRCH, TargetGoneError, "ended"),
        ("seize", errno.EINVAL, AttachError, "PTRACE_SEIZE"),
    ],
)
def test_failed_steps(info, step, number, kind, words):
    error = inject_policy.explain(info, info.pid, step, number, None)
    assert type(error) is kind
    assert words in str(error)
    assert "\n" not in str(error)

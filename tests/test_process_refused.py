"""Processes that cannot be saved, and failures during a capture: one line, the right exception and exit code.

Nothing is left behind, neither of the image nor in the target.
"""

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from gatekit import GatedFile
from orderkit import MIB, OrderTarget, check_order
from patientkit import ProcessTarget
from targetkit import VALUES, Target, descriptors, program, state_of, status_line, traced, until
from test_process import check_untouched
from waitkit import PATIENCE_S

import snapengine
from snapengine.doctor.preflight import examine_process
from snapengine.errors import (
    AlreadyTrackedError,
    AttachError,
    SnapengineError,
    TargetGoneError,
)

pytestmark = pytest.mark.usefixtures("requires_uffd", "programs")

CLI = "import sys; from snapengine.cli import main; sys.exit(main())"
AS_NOBODY = (  # this user may be unable to read the modules of this Python
    "import importlib, os, pkgutil, snapengine;"
    "names = [m.name for m in pkgutil.walk_packages(snapengine.__path__, 'snapengine.')];"
    "[importlib.import_module(name) for name in names if not name.endswith('__main__')];"
    "os.setgroups([]); os.setgid(65534); os.setuid(65534); " + CLI
)
NOBODY = 65534
EXECUTE = 7  # targets/order.c


def environment():
    room = Path(snapengine.__file__).parent.parent
    return {**os.environ, "PYTHONPATH": str(room), "PYTHONDONTWRITEBYTECODE": "1"}


def save(*arguments, script=CLI, **options):
    """Run `snapengine save`: its exit code and the lines that it printed."""
    command = [sys.executable, "-c", script, "save", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(), **options)
    return done.returncode, done.stderr.splitlines()


def refused(tmp_path, pid, *arguments, **options):
    """The single line of a refusal by `save --pid`; nothing is left of the image."""
    room = tmp_path / "room"
    room.mkdir(mode=0o777, exist_ok=True)
    code, lines = save("--pid", pid, *arguments, "--quiet", room / "image", **options)
    assert code == 1, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("snapengine: error: ")
    assert os.listdir(room) == []
    return lines[0]


def fails(pid, kind, regions="all", **options):
    """The exception of a snapshot to `null:`."""
    with (
        pytest.raises(kind) as caught,
        snapengine.snapshot(ProcessTarget(pid, regions, **options), "null:"),
    ):
        pass
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, SnapengineError | ValueError)
    return str(caught.value)


def test_no_such_process(tmp_path):
    with subprocess.Popen(["true"]) as ended:
        pass
    assert f"no such process: {ended.pid}" in refused(tmp_path, ended.pid)
    assert "not a process id" in refused(tmp_path, 0)
    assert "not a process id" in refused(tmp_path, "-3")
    assert "no such process" in fails(ended.pid, AttachError)


def test_our_own_process():
    assert "BufferTarget" in fails(os.getpid(), AttachError)


def test_a_kernel_thread(tmp_path):
    if Path("/proc/2/comm").read_text() != "kthreadd\n":
        pytest.skip("pid 2 is not kthreadd: a pid namespace")
    assert "kernel thread" in refused(tmp_path, 2)
    assert "kernel thread" in fails(2, AttachError)


def test_a_zombie(tmp_path):
    with Target("odd", "zombie") as target:
        assert "has ended" in refused(tmp_path, target.words[VALUES])
        assert "has ended" in fails(target.words[VALUES], TargetGoneError)
        target.check_running()


@pytest.mark.parametrize("cut", ["soft", "stop"])
def test_a_process_without_its_first_thread(tmp_path, cut):
    """The process still lives, so no message may say that it has ended."""
    with Target("compute", 2, "leave") as target:
        until(lambda: state_of(target.pid) == "Z")
        assert "first thread has ended" in refused(tmp_path, target.pid, "--cut", cut)
        assert "first thread has ended" in fails(target.pid, AttachError, cut=cut)
        with pytest.raises(AttachError, match="first thread has ended"):
            examine_process(target.pid)
        target.check_running(2)


@pytest.mark.parametrize("cut", ["soft", "stop"])
def test_a_traced_process(tmp_path, cut):
    with Target("compute", 1) as target:
        before = descriptors(target.pid)
        with traced(target.pid) as tracer:
            assert f"being traced by {tracer} (python" in refused(tmp_path, target.pid, "--cut", cut)
            assert "one tracer at a time" in fails(target.pid, AttachError, cut=cut)
            target.check_running()
            assert status_line(target.pid, "TracerPid") == str(tracer)
        check_untouched(target, before)


@pytest.mark.host_optional
def test_a_process_under_strace(tmp_path):
    words = Path(tmp_path / "words")
    words.write_bytes(bytes(4096))
    with open(words, "r+b") as file:
        command = ["strace", "-o", tmp_path / "log", program("odd"), str(file.fileno()), "none"]
        try:
            tracer = subprocess.Popen(command, pass_fds=[file.fileno()])
        except FileNotFoundError:
            pytest.skip("no strace here")
        with tracer:
            try:
                until(lambda: words.read_bytes()[0] == 1, "the traced program is not ready")
                children = Path(f"/proc/{tracer.pid}/task/{tracer.pid}/children").read_text().split()
                assert f"being traced by {tracer.pid} (strace)" in refused(tmp_path, children[0])
            finally:
                tracer.kill()


def test_another_users_process(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root")
    room = tmp_path / "room"
    room.mkdir()
    os.chown(room, NOBODY, NOBODY)
    for folder in (tmp_path, *tmp_path.parents):  # as many of pytest's as there are
        if not folder.stat().st_mode & 0o001:
            folder.chmod(0o755)
    with Target("compute", 1) as target:
        before = descriptors(target.pid)
        line = refused(tmp_path, target.pid, script=AS_NOBODY)
        assert "belongs to uid 0: attaching needs root or CAP_SYS_PTRACE" in line
        check_untouched(target, before)


def test_a_seccomp_filter_is_no_obstacle(tmp_path):
    """Root suspends it; the filter would kill the process for a call of userfaultfd."""
    with Target("odd", "seccomp") as target:
        code, lines = save("--pid", target.pid, "--quiet", tmp_path / "image")
        assert code == 0, lines
        assert status_line(target.pid, "Seccomp") == "2"
        target.check_running()


@pytest.mark.parametrize(
    "regions", ["", "heap,stak", "10-", "20-10", "0x10-0x10", "anon;heap", "10-20-30", "g0-h0"]
)
def test_malformed_regions(tmp_path, regions):
    code, lines = save("--pid", os.getpid(), f"--regions={regions}", tmp_path / "image")
    assert code == 2
    assert "argument --regions: regions:" in lines[0]
    with pytest.raises(ValueError, match="regions: "):
        ProcessTarget(os.getpid(), regions)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("cut", ["soft", "stop"])
@pytest.mark.parametrize("regions", ["1000-2000", "7fffffff0000-7fffffff1000"])
def test_regions_that_are_not_there(tmp_path, regions, cut):
    with Target("compute", 1) as target:
        before = descriptors(target.pid)
        assert "no memory that can be tracked" in refused(
            tmp_path, target.pid, "--regions", regions, "--cut", cut
        )
        check_untouched(target, before)


def test_regions_that_select_nothing(tmp_path):
    with Target("compute", 1) as target:
        before = descriptors(target.pid)
        assert "no memory that can be tracked" in refused(tmp_path, target.pid, "--regions", "files")
        check_untouched(target, before)


@pytest.mark.parametrize(
    "arguments", [["--cut", "hard"], ["--socket", "x"], ["--cut", "soft", "--method", "dirty-logging"]]
)
def test_usage_errors(tmp_path, arguments):
    code, lines = save("--pid", os.getpid(), *arguments, tmp_path / "image")
    assert code == 2
    assert lines[0].startswith("snapengine save: error: ")
    assert len(lines) == 2
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("cut", ["soft", "stop"])
def test_a_second_engine(tmp_path, cut):
    """The second capture is refused, and the image of the first one is correct."""
    with OrderTarget("anon", 1, 40503, 32 * MIB) as target:
        before = descriptors(target.pid)
        sink = GatedFile(tmp_path / "image")
        with snapengine.snapshot(ProcessTarget(target.pid, cut=cut), sink, memory_limit=16 * MIB):
            try:
                assert "already being tracked" in fails(target.pid, AlreadyTrackedError, cut=cut)
                assert "already being tracked" in refused(tmp_path, target.pid, "--cut", cut)
            finally:
                sink.gate.set()
        (tmp_path / "room").rmdir()
        assert os.listdir(tmp_path) == ["image"]
        check_order(tmp_path / "image", target)
        check_untouched(target, before)


def save_while(target, sink, cut, end):
    """A snapshot whose target ends while its pages are saved."""
    with snapengine.snapshot(ProcessTarget(target.pid, cut=cut), sink, memory_limit=16 * MIB):
        try:
            if end == "death":
                os.kill(target.pid, signal.SIGKILL)
                until(lambda: state_of(target.pid) == "Z", "it lives")  # or all is saved before it ends
            else:
                target.words[EXECUTE] = 1
                until(lambda: os.readlink(f"/proc/{target.pid}/exe").endswith("sleep"), "no exec")
        finally:
            sink.gate.set()


@pytest.mark.parametrize("cut", ["soft", "stop"])
@pytest.mark.parametrize("end", ["death", "exec"])
def test_the_target_goes(tmp_path, end, cut):
    with OrderTarget("anon", 1, 40503, 32 * MIB) as target:
        with pytest.raises(TargetGoneError, match="ended"):
            save_while(target, GatedFile(tmp_path / "image"), cut, end)
        assert os.listdir(tmp_path) == []
        if end == "exec":
            until(lambda: status_line(target.pid, "TracerPid") == "0", "it is still traced")
            assert target.process.poll() is None


def save_for_ever(target, path, cut):
    while True:
        with snapengine.snapshot(ProcessTarget(target.pid, cut=cut), path):
            pass
        path.unlink()


@pytest.mark.parametrize("cut", ["soft", "stop"])
def test_death_at_any_moment(tmp_path, cut):
    for _ in range(12):
        with OrderTarget("anon", 3, 1, 8 * MIB) as target:
            killer = threading.Timer(random.uniform(0, 0.03), os.kill, (target.pid, signal.SIGKILL))
            killer.start()
            with pytest.raises((TargetGoneError, AttachError)) as caught:
                save_for_ever(target, tmp_path / "image", cut)
            killer.join()
            assert "\n" not in str(caught.value)
            assert os.listdir(tmp_path) == []


# The engine is killed


def start_save(target, path, *arguments):
    command = [sys.executable, "-c", CLI, "save", "--pid", str(target.pid), "--quiet", *arguments, str(path)]
    return subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE)


@pytest.mark.parametrize("mode", ["soft", "stop", "dirty"])
def test_the_engine_is_killed_at_any_moment(tmp_path, mode):
    """The target keeps running, its writes are complete, and the next snapshot of it is correct."""
    arguments = {"soft": [], "stop": ["--cut", "stop"], "dirty": ["--method", "dirty-logging"]}[mode]
    with OrderTarget("anon", 3, 40503) as target:
        before = descriptors(target.pid)
        for number in range(14):
            with start_save(target, tmp_path / "image", "--rate-limit", "64M", *arguments) as engine:
                # It attaches at about the time when its partial file appears.
                until(lambda engine=engine: os.listdir(tmp_path) or engine.poll() is not None)
                pause = threading.Event()
                pause.wait(random.uniform(0, 0.15) if number else 0)
                engine.kill()
            for name in os.listdir(tmp_path):  # partial files of killed engines; not images
                (tmp_path / name).unlink()
            check_untouched(target, before)
        code, lines = save("--pid", target.pid, "--quiet", *arguments, tmp_path / "image")
        assert code == 0, lines
        check_order(tmp_path / "image", target)


@pytest.mark.parametrize("cut", ["soft", "stop"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_engine_is_interrupted(tmp_path, number, cut):
    with OrderTarget("anon", 1, 40503) as target:
        before = descriptors(target.pid)
        with start_save(target, tmp_path / "image", "--rate-limit", "1M", "--cut", cut) as engine:
            until(lambda: os.listdir(tmp_path) or engine.poll() is not None)
            engine.send_signal(number)
            assert engine.wait(PATIENCE_S) == 128 + number
            assert engine.stderr.read().decode().splitlines() == [f"snapengine: cancelled by {number.name}"]
        assert os.listdir(tmp_path) == []
        check_untouched(target, before)

"""Time limits: when one expires, the target is released, nothing is left behind, and one line says so."""

import contextlib
import errno
import json
import os
import signal
import socket
import stat
import subprocess
import threading
import time

import pytest
from clikit import COMMAND, one_error, run
from image_kit import HOLE, sample
from streamkit import head as stream_head
from targetkit import Target, descriptors, refusal, state_of, status_line
from waitkit import PATIENCE_S, until

import snapengine
from snapengine.errors import CaptureCancelled, SinkError, TimeLimitError
from snapengine.image.writer import Writer
from snapengine.kernel import cgroups, procfs
from snapengine.process import inject_policy, permissions
from snapengine.process.target import ProcessTarget
from snapengine.qemu.from_stream import ingest
from snapengine.regions import Region
from snapengine.storage.sinks import ExecSink, FileSink, open_sink

pytestmark = pytest.mark.usefixtures("requires_uffd", "programs")
LIMIT = "not done within 0.5 s (--timeout)"
MIB = 1 << 20


def is_free(target):
    """The target lives, and has no descriptor or tracer of ours."""
    assert target.process.poll() is None
    assert status_line(target.pid, "TracerPid") == "0"
    assert not [name for name in descriptors(target.pid).values() if "userfaultfd" in name]
    assert state_of(target.pid) not in ("t", "T")
    target.check_running()


@pytest.fixture
def busy():
    """A process that computes and writes to 1 MiB, and more of memory."""
    with Target("compute", 1) as target:
        yield target


@pytest.fixture
def room(tmp_path):
    """A directory that must be empty in the end."""
    folder = tmp_path / "room"
    folder.mkdir()
    yield folder
    assert os.listdir(folder) == []


def expired(done, *words):
    assert done.returncode == 124, done.stderr
    one_error(done, *(words or (LIMIT,)))


# --- of commands ----------------------------------------------------------------------------------------


def test_a_peer_that_does_not_come(room):
    done = run("save", "--quiet", "--socket", room / "s", "--timeout", "0.5", room / "x.img")
    expired(done)


@pytest.mark.parametrize("cut", ["soft", "stop"])
def test_a_sink_that_is_too_slow(busy, room, cut):
    slow = ("--rate-limit", "64K", "--timeout", "0.5")
    expired(run("save", "--pid", busy.pid, "--cut", cut, *slow, room / "x"))
    is_free(busy)


ENDLESS = ["sleep 1000", "cat >/dev/null; sleep 1000", "trap '' TERM; sleep 1000 & wait"]


@pytest.mark.parametrize("command", ENDLESS)
def test_a_command_that_does_not_end(busy, command):
    expired(run("save", "--pid", busy.pid, "--timeout", "0.5", f"exec:{command}"))
    is_free(busy)


def test_a_pipe_that_nobody_reads(busy):
    reader, writer = os.pipe()
    try:
        streams = {"capture_output": False, "stdout": writer, "stderr": subprocess.PIPE}
        expired(run("save", "--pid", busy.pid, "--timeout", "0.5", "-", **streams))
        is_free(busy)
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize(
    "arguments",
    [("info", "-"), ("verify", "-"), ("restore", "-", "-o", "OUT"), ("export", "-", "OUT"),
     ("ingest", "-", "OUT"), ("ingest", "--compress", "zstd", "-", "OUT"), ("qemu", "analyze", "-")],
)  # fmt: skip
@pytest.mark.parametrize("sent", ["nothing", "a part"])
def test_an_input_that_does_not_end(room, arguments, sent):
    parts = {"info": sample().data[:5000], "ingest": stream_head(), "qemu": stream_head()}
    part = parts.get(arguments[0], parts["info"]) if sent == "a part" else b""
    reader, writer = os.pipe()
    try:
        os.write(writer, part)
        given = [room / "out" if word == "OUT" else word for word in arguments]
        expired(run(*given, "--timeout", "0.5", stdin=reader))
    finally:
        os.close(reader)
        os.close(writer)


def test_an_output_that_is_not_read(tmp_path):
    path = tmp_path / "x.img"
    path.write_bytes(sample().data)
    reader, writer = os.pipe()
    try:
        with contextlib.suppress(BlockingIOError):
            os.set_blocking(writer, False)
            while True:
                os.write(writer, bytes(4096))
        os.set_blocking(writer, True)
        streams = {"capture_output": False, "stdout": writer, "stderr": subprocess.PIPE}
        commands = ("restore", path, "ram", "-o", "-"), ("export", path, "-"), ("export", path, "fd:1")
        for arguments in commands:
            expired(run(*arguments, "--timeout", "0.5", **streams))
    finally:
        os.close(reader)
        os.close(writer)


@contextlib.contextmanager
def silent_monitor(path):
    """A Unix socket whose listener sends nothing."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        yield


def test_a_monitor_that_says_nothing(tmp_path, room):
    with silent_monitor(tmp_path / "qmp"):
        for more in ((), ("--via-migration",)):
            given = ("--qmp", tmp_path / "qmp", "--timeout", "0.5", room / "x")
            expired(run("qemu", "save", *more, *given))


def test_the_limit_does_not_wait_for_what_it_ended(tmp_path, room, busy):
    """A second signal and a limit that is not reached change nothing."""
    done = run("save", "--pid", busy.pid, "--quiet", "--timeout", "1000", tmp_path / "x.img")
    assert (done.returncode, done.stderr) == (0, b"")
    is_free(busy)
    command = [*COMMAND, "save", "--pid", str(busy.pid), "--timeout", "1000", "--rate-limit", "64K"]
    with subprocess.Popen([*command, str(room / "x.img")], stderr=subprocess.PIPE) as save:
        until(lambda: os.listdir(room))
        save.send_signal(signal.SIGHUP)
        save.send_signal(signal.SIGTERM)
        assert save.wait(PATIENCE_S) in (129, 143)
    is_free(busy)


# --- of the library -------------------------------------------------------------------------------------


def test_a_capture_with_a_limit(busy, room):
    capture = snapengine.snapshot(ProcessTarget(busy.pid), room / "x", timeout=0.3, rate_limit=65536)
    with pytest.raises(TimeLimitError, match=r"not done within 0\.3 s") as caught, capture:
        pass
    assert isinstance(caught.value, TimeoutError)
    assert isinstance(caught.value, CaptureCancelled)
    is_free(busy)


def test_a_limit_while_a_peer_is_waited_for(room):
    peer = snapengine.PeerTarget(room / "s", timeout=None)
    with pytest.raises(TimeLimitError):
        snapengine.snapshot(peer, room / "x", timeout=0.3).start()


def test_a_limit_that_is_not_reached(tmp_path):
    memory = bytearray(MIB)
    capture = snapengine.snapshot(memory, tmp_path / "x", timeout=1000.0)
    with capture:
        pass
    assert capture.result.status == "completed"
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


@pytest.mark.parametrize("bad", [-1.0, float("inf"), float("nan")])
def test_limits_that_are_none(bad):
    with pytest.raises(ValueError, match="timeout:"):
        snapengine.Options(timeout=bad)


def test_cancelling_ends_a_command_that_does_not(tmp_path):
    capture = snapengine.snapshot(bytearray(MIB), "exec:cat >/dev/null; sleep 1000")
    capture.start()
    capture.cancel()
    assert capture.wait(PATIENCE_S)
    with pytest.raises(CaptureCancelled):
        capture.result  # noqa: B018


def test_a_cancelled_command_is_no_image():
    sink = ExecSink("cat >/dev/null; sleep 1000")
    waiter = threading.Timer(0.2, sink.cancel)
    waiter.start()
    with pytest.raises(SinkError, match="terminated before it finished"):
        sink.commit()
    waiter.join()
    assert sink._process.poll() is not None
    open_sink("null:").cancel()


def test_a_stream_that_does_not_end(room):
    reader, writer = os.pipe()
    try:
        os.write(writer, stream_head())
        with pytest.raises(TimeLimitError):
            ingest(reader, room / "x", snapengine.Options(timeout=0.3))
    finally:
        os.close(reader)
        os.close(writer)


# --- of QEMU --------------------------------------------------------------------------------------------


def test_a_machine_that_does_not_start(tmp_path):
    """The program is not QEMU, so its monitor never appears. The program is ended."""
    path, program = tmp_path / "x.img", tmp_path / "no-qemu"
    blocks = [{"name": "r", "used": 4096}]
    members = {"version": 1, "via": "device-state", "machine_type": None, "ram_blocks": blocks}
    description = json.dumps(members).encode()
    sink = FileSink(path)
    writer = Writer(sink)
    writer.begin([(Region("r", 0x10000, 4096), 0)])
    writer.py_chunk([(0, 1, HOLE)], b"")
    writer.vmstate("qemu.machine", description)
    writer.finish({})
    sink.commit()
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 1000\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    done = run("qemu", "restore", path, "--timeout", "1.5", "--", program)
    expired(done, "not done within 1.5 s")
    pid = int((tmp_path / "pid").read_text())
    until(lambda: state_of(pid) in ("", "Z"))


def test_how_long_qemu_may_take_for_an_answer(tmp_path, room):
    """A monitor that sends its greeting, negotiates, and then answers nothing."""
    path = tmp_path / "qmp"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        answerer = threading.Thread(target=greet, args=(server,))
        answerer.start()
        done = run("qemu", "save", "--qmp", path, "--monitor-timeout", "0.5", room / "x")
        assert done.returncode == 1
        one_error(done, "took more than 0.5 s")
        answerer.join()


def greet(server):
    client, _ = server.accept()
    with client:
        version = {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}
        client.sendall(json.dumps({"QMP": {"version": version, "capabilities": []}}).encode() + b"\r\n")
        asked = b""
        while not asked.endswith(b"}"):  # one object, without a line feed at its end
            asked = (asked + client.recv(4096)).rstrip()
        answer = {"return": {}} | {name: json.loads(asked)[name] for name in ("id",) if b'"id"' in asked}
        client.sendall(json.dumps(answer).encode() + b"\r\n")
        while client.recv(4096):
            pass


# --- of stopping ----------------------------------------------------------------------------------------


def test_how_long_threads_may_take_to_stop(room):
    with Target("odd", "vfork") as target:
        for cut in ("soft", "stop"):
            limit = ("--stop-timeout", "0.2")
            done = run("save", "--pid", target.pid, "--cut", cut, *limit, room / "x")
            assert done.returncode == 1
            one_error(done, "did not stop within 0.2 s", "uninterruptible sleep")


def test_a_thread_that_does_not_run_is_tried_once():
    for step in ("call", "open"):
        assert not inject_policy.is_for_another_way(step, errno.ETIMEDOUT)


CGROUPS = {
    "cgroup2": ("cgroup.freeze", "1", "0"),
    "freezer": ("freezer.state", "FROZEN", "THAWED"),
}


@contextlib.contextmanager
def frozen(kind, pid):
    """Put the process into a frozen cgroup of its own; yields the cgroup's directory. Skips if the cgroup
    cannot be made."""
    name, freeze, thaw = CGROUPS[kind]
    mounted = [line.split() for line in procfs.lines("/proc/self/mounts")]
    places = [m[1] for m in mounted if m[2] == kind or (m[2] == "cgroup" and kind in m[3].split(","))]
    if not places:
        pytest.skip(f"no {kind} here")
    folder = os.path.join(places[0], f"snapengine-test-{os.getpid()}")
    home = os.path.join(places[0], "cgroup.procs")
    try:
        os.mkdir(folder)
        write(f"{folder}/cgroup.procs", str(pid))
        os.stat(f"{folder}/{name}")
    except OSError as error:
        with contextlib.suppress(OSError):
            os.rmdir(folder)
        pytest.skip(f"no {kind} of our own: {error}")
    try:
        write(f"{folder}/{name}", freeze)
        until(lambda: cgroups.frozen_by(pid))
        yield folder
    finally:
        write(f"{folder}/{name}", thaw)
        write(home, str(pid))
        until(lambda: removed(folder))


def removed(folder):
    try:
        os.rmdir(folder)
    except OSError:
        return not os.path.exists(folder)
    return True


def write(path, text):
    with open(path, "w") as file:
        file.write(text)


@pytest.mark.host_optional
@pytest.mark.parametrize("kind", CGROUPS)
def test_a_frozen_cgroup_is_the_reason(busy, room, kind):
    with frozen(kind, busy.pid) as folder:
        for cut in ("soft", "stop"):
            done = run("save", "--pid", busy.pid, "--cut", cut, room / "x.img")
            assert done.returncode == 1
            one_error(done, "frozen by its cgroup", folder)
        assert run("doctor", "--pid", busy.pid).returncode == 1
        assert folder in str(refusal(busy.pid))
    is_free(busy)
    assert cgroups.frozen_by(busy.pid) is None


@pytest.mark.host_optional
@pytest.mark.parametrize("kind", CGROUPS)
def test_a_process_that_is_frozen_unseen_is_tried_once(busy, kind, monkeypatch):
    """It is frozen after the check, or in a cgroup that cannot be seen: one time limit holds for all ways."""
    with frozen(kind, busy.pid):
        monkeypatch.setattr(permissions, "frozen_by", lambda pid: None)
        began = time.monotonic()
        error = refusal(busy.pid, deadline=1.0)
        assert time.monotonic() - began < 7  # one call's 2 s, or one stop's 1 s, on a loaded machine
        assert "cgroup" in str(error) or "did not stop" in str(error)
    is_free(busy)


def test_a_stopped_process_is_no_frozen_one(tmp_path, busy):
    os.kill(busy.pid, signal.SIGSTOP)
    until(lambda: state_of(busy.pid) == "T")
    assert cgroups.frozen_by(busy.pid) is None
    assert run("save", "--pid", busy.pid, "--quiet", tmp_path / "x.img").returncode == 0
    assert state_of(busy.pid) == "T"
    os.kill(busy.pid, signal.SIGCONT)
    is_free(busy)


def test_cgroup_paths_that_cannot_be_seen_from_here(monkeypatch):
    files = {"/proc/5/cgroup": ["0::/../other", "4:freezer:/../../x"], "/proc/self/mountinfo": []}
    monkeypatch.setattr(cgroups.procfs, "lines", lambda path: iter(files[path]))
    assert cgroups.frozen_by(5) is None

"""A target that is killed at any moment of a capture: TargetGoneError, whichever call fails first."""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from handoverkit import connect, fds_before, open_fds
from targetkit import Target, until
from waitkit import PATIENCE_S

import snapengine
from snapengine.capture.capture import Capture
from snapengine.errors import AttachError, HandoverError, SnapengineError, TargetGoneError
from snapengine.handover.peer import PeerTarget
from snapengine.kernel import threads
from snapengine.kernel.uffd import Uffd
from snapengine.options import DIRTY_LOGGING, WRITE_TRACKING, Options
from snapengine.process import permissions
from snapengine.process.target import ProcessTarget

pytestmark = pytest.mark.usefixtures("requires_uffd")
KILLS = int(os.environ.get("KILLS", "12"))
CUTS = [("soft", WRITE_TRACKING), ("stop", WRITE_TRACKING), ("stop", DIRTY_LOGGING)]


def outcome(target, method) -> str:
    """How a capture ended: "saved", or the name of the error."""
    try:
        with snapengine.snapshot(target, "null:", method=method, max_seconds=2.0):
            pass
    except Exception as error:
        return type(error).__name__ + ("" if isinstance(error, TargetGoneError) else f": {error}")
    return "saved"


@contextlib.contextmanager
def killed_after(process: subprocess.Popen, seconds: float):
    """Kill the process after that many seconds, from another thread."""

    def kill():
        time.sleep(seconds)
        process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield
    finally:
        killer.join()
        process.wait()


@pytest.mark.parametrize(("cut", "method"), CUTS)
def test_a_process_killed_at_any_moment(cut, method):
    draw = random.Random(f"{cut} {method}")
    before = fds_before()
    found = set()
    longest = 0.05
    for _ in range(KILLS):
        with Target("compute", 3) as target:
            attached = ProcessTarget(target.pid, cut=cut, method=method)
            began = time.monotonic()
            with killed_after(target.process, draw.uniform(0, longest)):
                found.add(outcome(attached, method))
            longest = max(longest, min(0.3, time.monotonic() - began))
    assert found <= {"TargetGoneError", "saved"}
    assert "TargetGoneError" in found
    assert open_fds() == before


@pytest.mark.parametrize("method", [WRITE_TRACKING, DIRTY_LOGGING])
def test_a_peer_killed_at_any_moment(method, tmp_path):
    draw = random.Random(method)
    before = fds_before()
    found = set()
    longest = 0.05
    for _ in range(KILLS):
        path = tmp_path / "peer.sock"
        command = [sys.executable, "-m", "snapengine.cli", "guest", "--socket", str(path), "--size", "32M"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as peer:
            target = PeerTarget(path, method=method)
            opened = threading.Event()
            pause = draw.uniform(0, longest)

            def kill(target=target, peer=peer, opened=opened, seconds=pause):
                until(lambda: target.pid or opened.is_set())
                time.sleep(seconds)
                peer.kill()

            killer = threading.Thread(target=kill)
            killer.start()
            began = time.monotonic()
            found.add(outcome(target, method))
            opened.set()
            killer.join()
            longest = max(longest, min(0.3, time.monotonic() - began))
    assert found <= {"TargetGoneError", "saved"}
    assert "TargetGoneError" in found
    assert open_fds() == before


@pytest.mark.parametrize("reaped", [True, False])
def test_a_process_that_ended_before_it_is_attached_to(reaped):
    with Target("compute", 3) as target:
        attached = ProcessTarget(target.pid)
        target.process.kill()
        if reaped:
            target.process.wait()
        assert outcome(attached, WRITE_TRACKING) == "TargetGoneError"
        if not reaped:
            assert threads.ends(target.pid)


class KilledBeforeItIsArmed(Capture):
    """Its target ends between two steps: all resources are allocated, and nothing is registered."""

    def _kill(self):
        os.kill(self._target.pid, signal.SIGKILL)
        os.waitid(os.P_PID, self._target.pid, os.WEXITED | os.WNOWAIT)

    def _make_engine(self):
        self._kill()
        super()._make_engine()


@pytest.mark.parametrize(("cut", "method"), CUTS)
def test_a_process_with_a_large_reservation_that_ends(cut, method):
    """The end is noticed at the first call, not by a check for each page of 20 TiB."""
    with Target("reserve", "space", "private", 20 << 40) as target:
        attached = ProcessTarget(target.pid, cut=cut, method=method)
        with pytest.raises(TargetGoneError), KilledBeforeItIsArmed(
            attached, "null:", Options(method=method), {}
        ):
            pass


def test_a_process_that_never_was():
    with subprocess.Popen(["true"]) as process:
        process.wait()
    with pytest.raises(AttachError, match="no such process"), snapengine.snapshot(
        ProcessTarget(process.pid), "null:"
    ):
        pass


def test_a_first_thread_that_ended_is_no_end():
    with Target("compute", 3, "leave") as target:
        until(lambda: permissions.describe(target.pid).state == "Z")
        assert not threads.ends(target.pid)
        with pytest.raises(AttachError, match="first thread has ended"):
            ProcessTarget(target.pid).check()
        target.process.kill()
        assert threads.ends(target.pid)


def test_dirty_logging_of_a_peer_that_cannot_pause(tmp_path):
    """The engine raises an error and closes the userfaultfd: the peer's writers must not wait for ever."""
    before = fds_before()
    path = tmp_path / "peer.sock"
    peer = FakePeer(path, controls=[])
    with peer, pytest.raises(HandoverError, match="pause"), snapengine.snapshot(
        PeerTarget(path), "null:", method=DIRTY_LOGGING
    ):
        pass
    assert open_fds() == before


class FakePeer:
    """This process as a peer, in a thread. It sends one message and a userfaultfd, with the test's changes
    and additions, answers each command by `answer`, and ends with the connection."""

    def __init__(self, path, *, controls=("pause", "resume"), change=None, fds=(), answer=None):
        self.memory = mmap.mmap(-1, 1 << 20)
        self._path = path
        self._controls = list(controls)
        self._change = change or (lambda text: text)
        self._fds = list(fds)
        self._answer = answer or (lambda command: b'{"ok": true}\n')
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        self.memory.close()

    def _message(self) -> bytes:
        addr = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        mapping = {"base_host_virt_addr": addr, "size": 1 << 20, "offset": 0, "page_size": 4096}
        if self._controls:
            mapping["snapengine"] = {"version": 1, "controls": self._controls}
        return self._change(json.dumps([mapping]).encode())

    def _run(self) -> None:
        with contextlib.suppress(OSError), connect(self._path) as sock:
            sock.settimeout(10)
            with Uffd(1) as uffd:
                sock.recv(1 << 16)
                socket.send_fds(sock, [self._message()], [uffd.fd, *self._fds])
            pending = b""
            while data := sock.recv(1 << 16):
                pending += data
                while b"\n" in pending:
                    line, _, pending = pending.partition(b"\n")
                    answer = self._answer(line)
                    if answer is None:
                        return
                    sock.sendall(answer)


ANSWERS = [
    b'{"ok": true}\n', b'{"ok": false, "error": "no"}\n', b'{"ok": 1}\n', b"[]\n", b"\xff\n", b"{" * 999,
    b'{"ok": true, "vmstate": {"a": 5}}\n', b'{"ok": true, "vmstate": {"a": "AAAA"}}\n', b"", None,
]  # fmt: skip


def damaged(draw: random.Random, text: bytes) -> bytes:
    """Change a field, a byte, or the length of a message."""
    what = draw.randrange(5)
    if what == 0:
        return text[: draw.randrange(len(text))]
    if what == 1:
        at = draw.randrange(len(text))
        return text[:at] + bytes([draw.randrange(256)]) + text[at + 1 :]
    items = json.loads(text)
    key = draw.choice([*items[0], "memfd", "name", "kind"])
    items[0][key] = draw.choice([None, -1, 0, 1, 2, 63, 64, 4096, 1 << 47, 1 << 64, "x", [], {}, True, 1.5])
    return json.dumps(items * draw.choice([1, 1, 2])).encode()


def test_hostile_peers_leave_nothing(tmp_path):
    draw = random.Random(5)
    before = fds_before()
    odd = os.memfd_create("odd", os.MFD_CLOEXEC)
    errors = set()
    try:
        for number in range(60):
            path = tmp_path / f"{number}.sock"
            seed = draw.randrange(1 << 30)
            keep, answer = draw.randrange(2), draw.choice(ANSWERS)
            peer = FakePeer(
                path,
                controls=draw.sample(["pause", "resume", "vmstate", "stats"], draw.randrange(5)),
                change=None if keep else lambda text, seed=seed: damaged(random.Random(seed), text),
                fds=[odd] * draw.choice([0, 0, 1, 3, 70]),
                answer=lambda command, answer=answer: answer,
            )
            method = draw.choice([WRITE_TRACKING, DIRTY_LOGGING])
            began = time.monotonic()
            with peer:
                target = PeerTarget(path, step_timeout=0.3, method=method)
                try:
                    with snapengine.snapshot(target, "null:", method=method, max_seconds=2.0):
                        pass
                except SnapengineError as error:
                    errors.add(type(error).__name__)
            assert time.monotonic() - began < PATIENCE_S
            assert {entry.partition(" ")[2] for entry in open_fds() - before} <= {"/memfd:odd (deleted)"}
    finally:
        os.close(odd)
    assert "HandoverError" in errors
    assert open_fds() == before

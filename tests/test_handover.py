"""The hand-over: valid, late, split and invalid messages; nothing leaks, and every value is checked."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from handoverkit import connect, fds_before, open_fds
from waitkit import PATIENCE_S, until

from snapengine.errors import CaptureCancelled, HandoverError, TargetGoneError
from snapengine.guest.memory import GuestMemory
from snapengine.guest.params import GuestParams
from snapengine.handover.peer import PeerTarget
from snapengine.kernel.uffd import Uffd
from snapengine.regions import Region
from snapengine.targets.base import Target

MIB = 1 << 20
FEATURES = 1  # PAGEFAULT_FLAG_WP


# As Firecracker writes it: see its documentation of snapshot loading with a page-fault handler.


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    before = fds_before()
    yield
    assert open_fds() == before


class Peer:
    """This process as the peer, controlled by the test; the target runs in a thread."""

    def __init__(self, path: Path, step_timeout: float = PATIENCE_S) -> None:
        self.memory = GuestMemory(GuestParams(size=MIB, backing="memfd"))
        with Uffd(FEATURES) as uffd:
            self.uffd = os.dup(uffd.fd)
        self.target = PeerTarget(path, timeout=PATIENCE_S, step_timeout=step_timeout)
        self._pool = ThreadPoolExecutor(1)
        self.opened: Future[tuple[int, int, list[Region]]] = self._pool.submit(self.target.open, FEATURES)
        self.sock = connect(path)
        self.greeting = b""
        while not self.greeting.endswith(b"\n"):
            self.greeting += self.sock.recv(1)
        self._results: list[int] = []

    @property
    def mapping(self) -> dict[str, Any]:
        """A valid mapping."""
        return {"base_host_virt_addr": self.memory.addr, "size": MIB, "offset": 0, "page_size": 4096}

    def message(self, **changes: Any) -> bytes:
        """The message of one mapping with some fields changed; None leaves a field out."""
        mapping = {**self.mapping, **changes}
        return json.dumps([{key: value for key, value in mapping.items() if value is not None}]).encode()

    def send(self, data: bytes, fds: list[int] | None = None) -> None:
        socket.send_fds(self.sock, [data], [self.uffd] if fds is None else fds)

    def result(self) -> tuple[int, list[Region]]:
        pid, uffd, regions = self.opened.result(PATIENCE_S)
        self._results.append(uffd)
        assert os.readlink(f"/proc/self/fd/{uffd}") == "anon_inode:[userfaultfd]"
        assert not os.get_inheritable(uffd)
        return pid, regions

    def refused(self) -> str:
        """The error of the refused hand-over; it must be one line."""
        with pytest.raises(HandoverError) as caught:
            self.opened.result(PATIENCE_S)
        text = str(caught.value)
        assert "\n" not in text
        assert len(text) < 300
        return text

    def call(self, method: Callable[..., Any], *answers: bytes) -> Any:
        """Run a control of the target while this side reads its line and sends `answers`."""
        call = self._pool.submit(method)
        line = b""
        while not line.endswith(b"\n"):
            line += self.sock.recv(1)
        for answer in answers:
            self.sock.sendall(answer)
        return json.loads(line), call

    def close(self) -> None:
        self.sock.close()
        for uffd in self._results:
            os.close(uffd)
        with contextlib.suppress(Exception):
            self.opened.result(PATIENCE_S)
        self.target.close("failed")
        self._pool.shutdown()
        os.close(self.uffd)
        self.memory.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "engine.sock"


@pytest.fixture
def peer(path: Path, no_leaks: None) -> Iterator[Peer]:
    peer = Peer(path)
    yield peer
    peer.close()
    assert not path.exists()


@pytest.fixture
def hasty(path: Path, no_leaks: None) -> Iterator[Peer]:
    """A peer of an engine that waits only 0.2 s."""
    peer = Peer(path, step_timeout=0.2)
    yield peer
    peer.close()


# --- over the socket


def test_hand_over(peer: Peer) -> None:
    peer.send(peer.message(name="ram"))
    pid, regions = peer.result()
    assert pid == os.getpid()
    assert regions == [Region("ram", peer.memory.addr, MIB, 4096, "shared", -1, 0)]
    assert json.loads(peer.greeting) == {"snapengine": 1, "features": FEATURES, "method": ""}
    assert not peer.target.can_pause
    assert peer.target.vmstate() == {}
    with pytest.raises(HandoverError, match="pause: the peer did not announce it"):
        peer.target.pause()
    assert isinstance(peer.target, Target)
    assert not os.get_inheritable(peer.target.pidfd)


def test_memfd_is_kept_until_close(peer: Peer) -> None:
    peer.send(peer.message(memfd=1, kind="shared"), [peer.uffd, peer.memory.memfd])
    _, regions = peer.result()
    assert os.fstat(regions[0].memfd).st_ino == os.fstat(peer.memory.memfd).st_ino
    peer.target.close("completed")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(regions[0].memfd)


def test_message_split_into_bytes(peer: Peer) -> None:
    data = peer.message()
    for at in range(len(data) - 1):
        peer.sock.sendall(data[at : at + 1])
    peer.send(data[-1:])
    peer.result()


@pytest.mark.parametrize("late", [b" ", b"\n", b"\0", b"x", b" \r\n"])
def test_late_descriptor(peer: Peer, late: bytes) -> None:
    peer.sock.sendall(peer.message())
    peer.send(late)
    peer.result()


def test_early_descriptor(peer: Peer) -> None:
    peer.send(b" ")
    peer.sock.sendall(peer.message())
    peer.result()


def test_descriptors_one_by_one(peer: Peer) -> None:
    data = peer.message(memfd=1)
    peer.send(data[:10])
    peer.sock.sendall(data[10:])
    peer.send(b"\0", [peer.memory.memfd])
    assert peer.result()[1][0].memfd >= 0


def test_more_descriptors_than_needed(peer: Peer) -> None:
    peer.send(peer.message(), [peer.uffd, *[peer.memory.memfd] * 63])
    peer.result()


@pytest.mark.parametrize("count", [65, 200])
def test_too_many_descriptors(peer: Peer, count: int) -> None:
    peer.send(peer.message(), [peer.uffd] * count)
    assert "more than 64 descriptors" in peer.refused()


def test_too_many_descriptors_in_many_messages(peer: Peer) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for _ in range(70):
            peer.send(b" ")
    assert "more than 64 descriptors" in peer.refused()


def test_not_a_userfaultfd(peer: Peer) -> None:
    peer.send(peer.message(), [peer.memory.memfd])
    assert "not a userfaultfd" in peer.refused()


def test_data_after_the_array(peer: Peer) -> None:
    peer.send(peer.message() + b"[]")
    assert "other data after" in peer.refused()


@pytest.mark.parametrize("data", [b"hello", b'{"x": 1}', b"[" * 20, b"[1]", b"[]", b"[" + b" " * MIB])
def test_bad_message_closes_its_descriptors(peer: Peer, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        peer.send(data)
    assert "hand-over message" in peer.refused() or "mapping 0" in peer.refused()


def test_range_that_is_not_mapped(peer: Peer) -> None:
    with mmap.mmap(-1, MIB):
        pass
    peer.send(peer.message(base_host_virt_addr=1 << 20, name="low"))
    assert "mapping low: 0x100000 is not mapped in process" in peer.refused()


def test_range_with_a_gap(peer: Peer) -> None:
    peer.send(peer.message(size=64 << 30))
    text = peer.refused()
    # The kernel decides what lies between the memory and the end of the address space.
    assert any(reason in text for reason in ("is not mapped", "different kinds", "beyond the address space"))


def test_beyond_everything(peer: Peer) -> None:
    peer.send(peer.message(base_host_virt_addr=(1 << 47) - MIB))
    assert "is not mapped" in peer.refused()


def test_wrong_kind(peer: Peer) -> None:
    peer.send(peer.message(kind="anon"))
    assert "kind: anon, but it is shared" in peer.refused()


def test_wrong_page_size(peer: Peer) -> None:
    with GuestMemory(GuestParams(size=4 * MIB, backing="memfd", pages="thp")) as memory:
        peer.send(peer.message(base_host_virt_addr=memory.addr, page_size=2 * MIB, size=4 * MIB))
        assert "page_size: 2097152, but its pages have 4096 bytes" in peer.refused()


def test_memfd_index_without_descriptor(path: Path) -> None:
    for seconds in (0.2, 1.0, 5.0, PATIENCE_S / 2):  # this side must have sent the rest within it
        peer = Peer(path, step_timeout=seconds)
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                peer.send(peer.message(memfd=2), [peer.uffd, peer.memory.memfd])
            text = peer.refused()
        finally:
            peer.close()
        assert "not complete in time" in text
        if "descriptor 2 of the hand-over message" in text:
            return
    raise AssertionError(text)


@pytest.mark.parametrize("kind", ["pipe", "small", "other", "unsealed", "offset"])
def test_bad_memfd(peer: Peer, kind: str) -> None:
    expected = {
        "pipe": "not a regular file",
        "small": "too few",
        "other": "another file is mapped there",
        "unsealed": "not sealed",
        "offset": "offset: the mapping begins elsewhere",
    }[kind]
    with contextlib.ExitStack() as stack:
        change: dict[str, Any] = {}
        if kind == "pipe":
            fds = os.pipe()
            for fd in fds:
                stack.callback(os.close, fd)
            memfd = fds[0]
        elif kind == "small":
            memfd = stack.enter_context(GuestMemory(GuestParams(size=4096, backing="memfd"))).memfd
        elif kind == "other":
            memfd = stack.enter_context(GuestMemory(GuestParams(size=MIB, backing="memfd"))).memfd
        elif kind == "unsealed":
            memfd = os.memfd_create("x", os.MFD_CLOEXEC)
            stack.callback(os.close, memfd)
            os.ftruncate(memfd, MIB)
        else:
            memfd = peer.memory.memfd
            change = {"base_host_virt_addr": peer.memory.addr + 4096, "size": 4096, "offset": 8192}
        peer.send(peer.message(memfd=1, **change), [peer.uffd, memfd])
        assert expected in peer.refused()


def test_part_of_a_mapping(peer: Peer) -> None:
    change = {"base_host_virt_addr": peer.memory.addr + 8192, "size": 4096, "offset": 8192, "memfd": 1}
    peer.send(peer.message(**change), [peer.uffd, peer.memory.memfd])
    (region,) = peer.result()[1]
    assert (region.addr, region.length, region.memfd_offset) == (peer.memory.addr + 8192, 4096, 8192)


def test_private_memory(peer: Peer) -> None:
    with GuestMemory(GuestParams(size=MIB)) as memory:
        peer.send(peer.message(base_host_virt_addr=memory.addr))
        assert peer.result()[1][0].kind == "anon"


def test_private_memory_with_memfd(peer: Peer) -> None:
    with GuestMemory(GuestParams(size=MIB)) as memory:
        peer.send(peer.message(base_host_virt_addr=memory.addr, memfd=1), [peer.uffd, peer.memory.memfd])
        assert "the mapping is private, so its content is not the memfd's" in peer.refused()


def test_peer_closes_early(peer: Peer) -> None:
    peer.send(peer.message()[:20])
    peer.sock.close()
    assert "the peer closed the connection" in peer.refused()


def test_peer_says_nothing(hasty: Peer) -> None:
    assert "not complete in time" in hasty.refused()


def test_peer_drips(hasty: Peer) -> None:
    """A byte every few milliseconds does not prolong the wait."""
    stop = threading.Event()

    def drip() -> None:
        with contextlib.suppress(OSError):
            while not stop.wait(0.005):
                hasty.sock.sendall(b" ")

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        assert "not complete in time" in hasty.refused()
    finally:
        stop.set()
        thread.join()


def controls(peer: Peer, *names: str) -> None:
    peer.send(peer.message(snapengine={"version": 1, "controls": list(names)}))
    peer.result()


def test_controls(peer: Peer) -> None:
    controls(peer, "pause", "resume", "vmstate", "stats", "later")
    assert peer.target.can_pause
    line, call = peer.call(peer.target.pause, b'{"ok": true}\n')
    assert line == {"cmd": "pause"}
    call.result(PATIENCE_S)
    line, call = peer.call(peer.target.vmstate, b'{"ok": true, "vmstate": ', b'{"cpu": "AAH/"}}\n')
    assert line == {"cmd": "vmstate"}
    assert call.result(PATIENCE_S) == {"cpu": b"\x00\x01\xff"}
    _, call = peer.call(peer.target.stats, b'{"ok": true, "stats": {"n": 1}}\n')
    assert call.result(PATIENCE_S) == {"n": 1}
    _, call = peer.call(peer.target.resume, b'{"ok": true}\n')
    call.result(PATIENCE_S)
    peer.target.close("completed")
    assert json.loads(peer.sock.recv(1000)) == {"cmd": "done", "status": "completed"}
    assert peer.sock.recv(1000) == b""


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b'{"ok": false, "error": "no\\nway"}\n', "vmstate: the peer refused: no way"),
        (b'{"ok": 1}\n', "not an object with ok"),
        (b"[]\n", "not an object with ok"),
        (b"{\n", "not valid JSON"),
        (b'{"ok": true}\n', "vmstate: not an object"),
        (b'{"ok": true, "vmstate": {"a": 1}}\n', "vmstate: a: not a string"),
        (b'{"ok": true, "vmstate": {"a": "A"}}\n', "vmstate: a: not base64"),
        (b'{"ok": true, "vmstate": {"a": "AAAA*"}}\n', "vmstate: a: not base64"),
        (b'{"ok": true, "vmstate": {"": ""}}\n', "a name is not a printable"),
        ("{}".encode("utf-16") + b"\n", "not valid JSON"),
    ],
)
def test_bad_answers(peer: Peer, answer: bytes, reason: str) -> None:
    controls(peer, "vmstate")
    _, call = peer.call(peer.target.vmstate, answer)
    with pytest.raises(HandoverError) as caught:
        call.result(PATIENCE_S)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pause_alone_is_not_enough(peer: Peer) -> None:
    controls(peer, "pause")
    assert not peer.target.can_pause


def test_no_answer(peer: Peer) -> None:
    controls(peer, "pause", "resume")
    peer.target._step_timeout = 0.2
    _, call = peer.call(peer.target.pause)
    with pytest.raises(HandoverError, match="pause: not complete in time"):
        call.result(PATIENCE_S)


def test_descriptors_in_an_answer_are_dropped(peer: Peer) -> None:
    controls(peer, "stats")
    _, call = peer.call(peer.target.stats)
    peer.send(b'{"ok": true}\n', [peer.uffd] * 5)
    assert call.result(PATIENCE_S) == {}


def test_peer_closes_instead_of_an_answer(peer: Peer) -> None:
    controls(peer, "stats")
    _, call = peer.call(peer.target.stats)
    peer.sock.close()
    with pytest.raises(HandoverError, match="stats: the peer closed the connection"):
        call.result(PATIENCE_S)


def test_peer_process_ends(path: Path) -> None:
    code = f"import socket; s = socket.socket(1); s.connect({os.fspath(path)!r}); s.recv(1)"
    target = PeerTarget(path)
    with ThreadPoolExecutor(1) as pool:
        opened = pool.submit(target.open, FEATURES)
        until(path.exists)
        subprocess.run([sys.executable, "-c", code], check=True)
        with pytest.raises(TargetGoneError, match="ended"):
            opened.result(PATIENCE_S)


def test_cancel_while_waiting(path: Path) -> None:
    target = PeerTarget(path, timeout=None)
    with ThreadPoolExecutor(1) as pool:
        opened = pool.submit(target.open, FEATURES)
        until(path.exists)
        target.cancel()
        with pytest.raises(CaptureCancelled):
            opened.result(PATIENCE_S)
    assert not path.exists()


def test_cancel_during_the_message(peer: Peer) -> None:
    peer.target.cancel()
    with pytest.raises(CaptureCancelled):
        peer.opened.result(PATIENCE_S)


def test_nobody_comes(path: Path) -> None:
    with pytest.raises(HandoverError, match="no peer connected in time"):
        PeerTarget(path, timeout=0.05).open(FEATURES)
    assert not path.exists()


def test_unopened_target_closes() -> None:
    target = PeerTarget("/nowhere/x")
    target.close("cancelled")
    target.close("cancelled")
    with pytest.raises(FileNotFoundError):
        PeerTarget("/nowhere/x").open(FEATURES)

"""The hand-over: messages good, late, split and bad; nothing leaks and nothing is believed."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapengine.errors import CaptureCancelled, HandoverError, TargetGoneError, UnsupportedError
from snapengine.guestmem import GuestMemory
from snapengine.guestparams import GuestParams
from snapengine.handover import MAX_MAPPINGS, ArrayScanner, encode_offer, parse_offer, strict_json
from snapengine.listener import Listener
from snapengine.peer import PeerTarget
from snapengine.targets import Region, Target
from snapengine.uffd import Uffd

MIB = 1 << 20
FEATURES = 1  # PAGEFAULT_FLAG_WP

# As Firecracker writes it: see its documentation of snapshot loading with a page-fault handler.
FIRECRACKER = (
    b'[{"base_host_virt_addr":140000000000000,"size":67108864,"offset":0,"page_size":4096,'
    b'"page_size_kib":4096},{"base_host_virt_addr":140000134217728,"size":33554432,"offset":67108864,'
    b'"page_size":4096,"page_size_kib":4096}]'
)


def open_fds() -> set[str]:
    """What this process has open, by content, so that a swap of one for another shows too."""
    result = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            result.add(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
    return {entry for entry in result if "/proc/" not in entry}


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    before = open_fds()
    yield
    assert open_fds() == before


class Peer:
    """This process as the peer, in the hands of the test; the target runs in a thread."""

    def __init__(self, path: Path, step_timeout: float = 5.0) -> None:
        self.memory = GuestMemory(GuestParams(size=MIB, backing="memfd"))
        with Uffd(FEATURES) as uffd:
            self.uffd = os.dup(uffd.fd)
        self.target = PeerTarget(path, timeout=10.0, step_timeout=step_timeout)
        self._pool = ThreadPoolExecutor(1)
        self.opened: Future[tuple[int, int, list[Region]]] = self._pool.submit(self.target.open, FEATURES)
        self.sock = connect(path)
        self.greeting = b""
        while not self.greeting.endswith(b"\n"):
            self.greeting += self.sock.recv(1)
        self._results: list[int] = []

    @property
    def mapping(self) -> dict[str, Any]:
        """A mapping that is as it should be."""
        return {"base_host_virt_addr": self.memory.addr, "size": MIB, "offset": 0, "page_size": 4096}

    def message(self, **changes: Any) -> bytes:
        """The message of one mapping with some fields changed; None leaves a field out."""
        mapping = {**self.mapping, **changes}
        return json.dumps([{key: value for key, value in mapping.items() if value is not None}]).encode()

    def send(self, data: bytes, fds: list[int] | None = None) -> None:
        socket.send_fds(self.sock, [data], [self.uffd] if fds is None else fds)

    def result(self) -> tuple[int, list[Region]]:
        pid, uffd, regions = self.opened.result(10)
        self._results.append(uffd)
        assert os.readlink(f"/proc/self/fd/{uffd}") == "anon_inode:[userfaultfd]"
        assert not os.get_inheritable(uffd)
        return pid, regions

    def refused(self) -> str:
        """The one line with which the hand-over was refused."""
        with pytest.raises(HandoverError) as caught:
            self.opened.result(10)
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
            self.opened.result(10)
        self.target.close("failed")
        self._pool.shutdown()
        os.close(self.uffd)
        self.memory.close()


def connect(path: Path) -> socket.socket:
    deadline = time.monotonic() + 10
    while True:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(os.fspath(path))
            return sock
        except OSError:
            sock.close()
            assert time.monotonic() < deadline
            time.sleep(0.001)


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
    """A peer of an engine that waits for 0.2 s only."""
    peer = Peer(path, step_timeout=0.2)
    yield peer
    peer.close()


# --- the message alone


def test_firecracker_message() -> None:
    offer = parse_offer(FIRECRACKER)
    assert [(m.addr, m.length, m.offset, m.page_size) for m in offer.mappings] == [
        (140000000000000, 64 * MIB, 0, 4096),
        (140000134217728, 32 * MIB, 64 * MIB, 4096),
    ]
    assert [m.name for m in offer.mappings] == ["region0", "region1"]
    assert offer.controls == frozenset()
    assert offer.fds_needed == 1


@pytest.mark.parametrize(
    ("fields", "page_size"),
    [
        ({}, 4096),
        ({"page_size": 2 * MIB}, 2 * MIB),
        ({"page_size_kib": 2 * MIB}, 2 * MIB),
        ({"page_size_kib": 4096, "page_size": 2 * MIB}, 2 * MIB),
        ({"page_size": 1 << 30, "size": 1 << 30}, 1 << 30),
    ],
)
def test_page_size_has_two_names(fields: dict[str, int], page_size: int) -> None:
    mapping = {"base_host_virt_addr": 1 << 40, "size": 2 * MIB, "offset": 0, **fields}
    assert parse_offer(json.dumps([mapping]).encode()).mappings[0].page_size == page_size


def test_what_the_guest_sends_is_understood() -> None:
    regions = [
        Region("ram", 1 << 30, MIB, kind="shared", memfd=77, memfd_offset=MIB),
        Region("rom", 1 << 31, MIB),
    ]
    offer = parse_offer(encode_offer(regions, [77], ["pause", "resume", "fly"]))
    assert [(m.name, m.kind, m.memfd, m.offset) for m in offer.mappings] == [
        ("ram", "shared", 1, MIB),
        ("rom", "anon", -1, 0),
    ]
    assert offer.controls == {"pause", "resume"}
    assert offer.fds_needed == 2


GOOD: dict[str, Any] = {"base_host_virt_addr": 1 << 30, "size": MIB, "offset": 0, "page_size": 4096}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"size": 0}, "size: zero"),
        ({"size": -4096}, "size: negative"),
        ({"size": 4097}, "size: 0x1001 is not a multiple"),
        ({"size": True}, "size: not an integer"),
        ({"size": 4096.0}, "size: not an integer"),
        ({"size": "4096"}, "size: not an integer"),
        ({"size": None}, "size: not an integer"),
        ({"size": 1 << 48}, "size: beyond"),
        ({"size": 1 << 200}, "size: beyond"),
        ({"base_host_virt_addr": -1}, "base_host_virt_addr: negative"),
        ({"base_host_virt_addr": 1}, "base_host_virt_addr: 0x1 is not a multiple"),
        ({"base_host_virt_addr": [1]}, "base_host_virt_addr: not an integer"),
        ({"base_host_virt_addr": (1 << 47) - 4096}, "beyond the address space"),
        ({"base_host_virt_addr": 1 << 64}, "beyond the address space"),
        ({"offset": -1}, "offset: negative"),
        ({"offset": 1}, "offset: 0x1 is not a multiple"),
        ({"offset": False}, "offset: not an integer"),
        ({"page_size": 0}, "page_size: 0 is none of"),
        ({"page_size": 8192}, "page_size: 8192 is none of"),
        ({"page_size": 2 * MIB}, "size: 0x100000 is not a multiple of 2097152"),
        ({"page_size_kib": -1}, "page_size_kib: negative"),
        ({"name": ""}, "name: not a printable"),
        ({"name": "a\nb"}, "name: not a printable"),
        ({"name": "é" * 128}, "name: not a printable"),
        ({"name": "\ud800"}, "name: not a printable"),
        ({"name": 5}, "name: not a printable"),
        ({"kind": "disk"}, "kind: none of"),
        ({"kind": None}, "kind: none of"),
        ({"memfd": 0}, "memfd: index 0"),
        ({"memfd": 64}, "memfd: index 64"),
        ({"memfd": True}, "memfd: not an integer"),
        ({"memfd": 1, "kind": "anon"}, "memfd: a private mapping"),
        ({"snapengine": 1}, "snapengine: not an object"),
        ({"snapengine": {"version": 2}}, "snapengine: version 2"),
        ({"snapengine": {"version": 1, "controls": "pause"}}, "controls: not an array"),
        ({"snapengine": {"version": 1, "controls": [1]}}, "controls: not an array"),
    ],
)
def test_bad_mapping(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(HandoverError) as caught:
        parse_offer(json.dumps([{**GOOD, **change}]).encode())
    assert reason in str(caught.value)
    assert str(caught.value).startswith(("mapping 0", "snapengine"))


@pytest.mark.parametrize("key", ["base_host_virt_addr", "size"])
def test_missing_field(key: str) -> None:
    mapping = {name: value for name, value in GOOD.items() if name != key}
    with pytest.raises(HandoverError, match=f"mapping 0 .region0.: {key}: missing"):
        parse_offer(json.dumps([mapping]).encode())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"[]", "no mappings"),
        (b"[1]", "mapping 0: not an object"),
        (b"[null]", "mapping 0: not an object"),
        (b"[[]]", "mapping 0: not an object"),
        (b"[{},]", "not valid JSON"),
        (b'[{"size": NaN}]', "NaN is not a number"),
        (b'[{"size": Infinity}]', "Infinity is not a number"),
        (b'[{"size": 1, "size": 2}]', "a key is repeated"),
        (b'[{"size": 1' + b"0" * 5000 + b"}]", "not valid JSON"),
        (b'[{"\xff": 1}]', "not valid JSON"),
        (b"{}", "not a JSON array"),
    ],
)
def test_bad_message(data: bytes, reason: str) -> None:
    with pytest.raises(HandoverError, match=reason):
        parse_offer(data)


def test_too_many_mappings() -> None:
    many = [{**GOOD, "base_host_virt_addr": (1 << 30) + at * MIB} for at in range(MAX_MAPPINGS + 1)]
    assert len(parse_offer(json.dumps(many[:-1]).encode()).mappings) == MAX_MAPPINGS
    with pytest.raises(HandoverError, match="4097 mappings"):
        parse_offer(json.dumps(many).encode())


def test_overlap_and_repeated_name() -> None:
    with pytest.raises(HandoverError, match="region1: overlaps mapping region0"):
        parse_offer(json.dumps([GOOD, {**GOOD, "base_host_virt_addr": (1 << 30) + MIB - 4096}]).encode())
    with pytest.raises(HandoverError, match="the name is used twice"):
        parse_offer(json.dumps([{**GOOD, "name": "a"}, {**GOOD, "name": "a"}]).encode())
    beside = parse_offer(json.dumps([GOOD, {**GOOD, "base_host_virt_addr": (1 << 30) + MIB}]).encode())
    assert len(beside.mappings) == 2


def test_scanner_finds_the_end_in_pieces_of_any_size() -> None:
    data = rb' [{"name": "]}\"[\\", "x": [1, {"y": "\\\\"}]}]'
    for size in range(1, len(data) + 1):
        scanner = ArrayScanner()
        rest = b"".join(scanner.feed((data + b"\n!")[at : at + size]) for at in range(0, len(data) + 2, size))
        assert scanner.complete
        assert bytes(scanner.data) == data.lstrip() or bytes(scanner.data) == data
        assert rest == b"\n!"
    assert strict_json(data, "x")[0]["name"] == ']}"[\\'


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"x", "not a JSON array"),
        (b'{"a": 1}', "not a JSON array"),
        (b"[" * 9, "nested deeper than 8"),
        (b"[" * 100000, "nested deeper than 8"),
        (b'[{"a":' * 5, "nested deeper than 8"),
        (b"[" + b" " * MIB, "longer than 1048576 bytes"),
        (b" " * (MIB + 1), "longer than 1048576 bytes"),
    ],
)
def test_scanner_refuses(data: bytes, reason: str) -> None:
    with pytest.raises(HandoverError, match=reason):
        ArrayScanner().feed(data)


def test_bottomless_answer() -> None:
    with pytest.raises(HandoverError, match="not valid JSON"):
        strict_json(b"[" * 1000000, "answer")


JSON = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.just([]), st.just({}), st.just({"version": 1, "controls": []}),
    st.sampled_from([0, 1, 4096, MIB, 1 << 30]),
)  # fmt: skip
FIELDS = st.sampled_from([*GOOD, "name", "kind", "memfd", "page_size_kib", "snapengine"])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.dictionaries(FIELDS, JSON, max_size=3), max_size=3))
def test_any_json_is_refused_or_sound(changes: list[dict[str, Any]]) -> None:
    data = json.dumps([{**GOOD, **change} for change in changes]).encode()
    with contextlib.suppress(HandoverError):
        for mapping in parse_offer(data).mappings:
            assert 0 < mapping.length <= 1 << 47
            assert mapping.addr % mapping.page_size == mapping.length % mapping.page_size == 0
            assert -1 <= mapping.memfd < 64


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64) | st.text("[]{}\",:0 \\", max_size=64).map(str.encode))
def test_any_bytes_are_refused_or_wait_for_more(data: bytes) -> None:
    scanner = ArrayScanner()
    with contextlib.suppress(HandoverError):
        scanner.feed(data)
        if scanner.complete:
            parse_offer(scanner.data)


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
    # What lies behind the memory, up to the end of the address space, is up to the kernel.
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


def test_memfd_index_without_descriptor(hasty: Peer) -> None:
    hasty.send(hasty.message(memfd=2), [hasty.uffd, hasty.memory.memfd])
    assert "descriptor 2 of the hand-over message: not complete in time" in hasty.refused()


@pytest.mark.parametrize("kind", ["pipe", "small", "other", "unsealed", "offset"])
def test_bad_memfd(peer: Peer, kind: str) -> None:
    expected = {
        "pipe": "not a regular file",
        "small": "too few",
        "other": "not what is mapped there",
        "unsealed": "not sealed",
        "offset": "offset: not where the mapping begins",
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
        assert "a private mapping is not what the memfd holds" in peer.refused()


def test_peer_closes_early(peer: Peer) -> None:
    peer.send(peer.message()[:20])
    peer.sock.close()
    assert "the peer closed the connection" in peer.refused()


def test_peer_says_nothing(hasty: Peer) -> None:
    begin = time.monotonic()
    assert "not complete in time" in hasty.refused()
    assert time.monotonic() - begin < 5


def test_peer_drips(hasty: Peer) -> None:
    """A byte every few milliseconds does not prolong the wait."""
    begin = time.monotonic()
    stop = threading.Event()

    def drip() -> None:
        with contextlib.suppress(OSError):
            while not stop.wait(0.005):
                hasty.sock.sendall(b" ")

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        assert "not complete in time" in hasty.refused()
        assert time.monotonic() - begin < 5
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
    call.result(10)
    line, call = peer.call(peer.target.vmstate, b'{"ok": true, "vmstate": ', b'{"cpu": "AAH/"}}\n')
    assert line == {"cmd": "vmstate"}
    assert call.result(10) == {"cpu": b"\x00\x01\xff"}
    _, call = peer.call(peer.target.stats, b'{"ok": true, "stats": {"n": 1}}\n')
    assert call.result(10) == {"n": 1}
    _, call = peer.call(peer.target.resume, b'{"ok": true}\n')
    call.result(10)
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
        call.result(10)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pause_alone_is_not_enough(peer: Peer) -> None:
    controls(peer, "pause")
    assert not peer.target.can_pause


def test_no_answer(hasty: Peer) -> None:
    controls(hasty, "pause", "resume")
    _, call = hasty.call(hasty.target.pause)
    with pytest.raises(HandoverError, match="pause: not complete in time"):
        call.result(10)


def test_descriptors_in_an_answer_are_dropped(peer: Peer) -> None:
    controls(peer, "stats")
    _, call = peer.call(peer.target.stats)
    peer.send(b'{"ok": true}\n', [peer.uffd] * 5)
    assert call.result(10) == {}


def test_peer_closes_instead_of_an_answer(peer: Peer) -> None:
    controls(peer, "stats")
    _, call = peer.call(peer.target.stats)
    peer.sock.close()
    with pytest.raises(HandoverError, match="stats: the peer closed the connection"):
        call.result(10)


def test_peer_process_ends(path: Path) -> None:
    code = f"import socket; s = socket.socket(1); s.connect({os.fspath(path)!r}); s.recv(1)"
    target = PeerTarget(path)
    with ThreadPoolExecutor(1) as pool:
        opened = pool.submit(target.open, FEATURES)
        wait_for(path.exists)
        subprocess.run([sys.executable, "-c", code], check=True)
        with pytest.raises(TargetGoneError, match="ended"):
            opened.result(10)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_cancel_while_waiting(path: Path) -> None:
    target = PeerTarget(path, timeout=None)
    with ThreadPoolExecutor(1) as pool:
        opened = pool.submit(target.open, FEATURES)
        wait_for(path.exists)
        target.cancel()
        with pytest.raises(CaptureCancelled):
            opened.result(10)
    assert not path.exists()


def test_cancel_during_the_message(peer: Peer) -> None:
    peer.target.cancel()
    with pytest.raises(CaptureCancelled):
        peer.opened.result(10)


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


# --- the socket file


def test_socket_is_private_and_goes_away(path: Path) -> None:
    old = os.umask(0)
    try:
        listener = Listener(path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    listener.close()
    listener.close()
    assert not path.exists()


def test_stale_socket_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(os.fspath(path))
    listener = Listener(path)
    connect(path).close()
    listener.close()


def test_live_listener_is_refused_and_not_disturbed(path: Path) -> None:
    first = Listener(path)
    with pytest.raises(UnsupportedError, match="somebody listens there already") as caught:
        Listener(path)
    assert caught.value.errno == 98
    with pytest.raises(HandoverError, match="no peer connected"):
        first.accept(time.monotonic() + 0.05)
    first.close()
    assert not path.exists()


def test_a_file_is_not_replaced(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(UnsupportedError, match="exists and is not a socket"):
        Listener(path)
    assert path.read_text() == "precious"


def test_a_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsupportedError, match="not a socket"):
        Listener(path)


def test_long_path(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="at most 107 bytes"):
        Listener(tmp_path / ("x" * 108))


def test_successor_keeps_its_socket(path: Path) -> None:
    first = Listener(path)
    path.unlink()
    second = Listener(path)
    first.close()
    assert path.exists()
    second.close()

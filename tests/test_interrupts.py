"""A Ctrl-C at any moment: the memory is released, and no thread, descriptor or file is left behind.

More seeds than these two: ``SNAPENGINE_SEEDS=100 pytest tests/test_interrupts.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading

import pytest
import streamkit
from scarcekit import run
from targetkit import thread_names
from waitkit import until

from snapengine.qemu.monitor import Monitor

pytestmark = pytest.mark.usefixtures("requires_uffd")
SEEDS = range(int(os.environ.get("SNAPENGINE_SEEDS", "2")))
PAGES = 1500
ROUNDS = """
    def interrupt(*_):
        if awaited:
            raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    outcomes = set()
    longest = 0.02
    for _ in range(40):
        began = time.monotonic()
        try:
            awaited = True
            signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.0002, longest))
            work()
            outcomes.add("done")
            awaited = False                         # within the `try`: behind it, it would end the test
        except KeyboardInterrupt:
            outcomes.add("interrupted")
        signal.setitimer(signal.ITIMER_REAL, 0)
        longest = max(0.02, min(0.3, 1.2 * (time.monotonic() - began)))
        check(before)
    print(sorted(outcomes))
    """


@pytest.mark.parametrize("method", ["write-tracking", "dirty-logging"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_capture(method, seed, tmp_path):
    work = f"""
    def work():
        capture({method!r}, rate_limit=draw.choice((0, 200 * MIB)))
    """
    assert "interrupted" in run(work + ROUNDS, tmp_path, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_restore_by_several_threads(seed, tmp_path):
    work = f"""
    saved = {str(tmp_path)!r} + ".image"
    capture(sink=saved)
    buffer[:] = bytes(len(buffer))
    image = open_image(saved)
    before = open_files()

    def work():
        memory = mmap.mmap(-1, 8 * MIB)
        complete = False
        with contextlib.suppress(KeyboardInterrupt):
            image.restore_into("ram", memory, threads=4)
            complete = True
        memory[:] = bytes(len(memory))
        time.sleep(0.002)
        assert memory[:] == bytes(len(memory))
        memory.close()                              # BufferError: it is still in use
        if not complete:
            raise KeyboardInterrupt
    """
    assert "interrupted" in run(work + ROUNDS, tmp_path, seed)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_an_ingest(direct, seed, tmp_path):
    pages = [("pc.ram", number, streamkit.filled(number)) for number in range(PAGES)]
    stream = tmp_path / "stream"
    stream.write_bytes(streamkit.stream(pages, blocks=[("pc.ram", PAGES * 4096)]))
    folder = tmp_path / "room"
    folder.mkdir()
    work = f"""
    from snapengine.qemu.from_stream import ingest
    stream = open({str(stream)!r}, "rb")
    before = open_files()

    def work():
        stream.seek(0)
        ingest(stream.fileno(), os.path.join(folder, "image"), direct={direct})
    """
    assert "interrupted" in run(work + ROUNDS, folder, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_talk_with_a_monitor(seed, tmp_path):
    path = tmp_path / "qmp"
    folder = tmp_path / "room"
    folder.mkdir()
    work = f"""
    from snapengine.qemu.monitor import Monitor

    def work():
        with Monitor({str(path)!r}) as monitor:
            answer = monitor.send("query-status")
            for _ in range(5):
                assert monitor.execute("query-status") == {{}}
            assert answer() == {{}}
            assert monitor.events() == []
    """
    with answering(path):
        assert "interrupted" in run(work + ROUNDS, folder, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_wait_for_a_peer(seed, tmp_path):
    """The socket's file is removed, even if the caller has not received the listener yet."""
    work = """
    from snapengine.errors import HandoverError
    from snapengine.handover.listener import Listener

    def work():
        for _ in range(20):
            listener = Listener(os.path.join(folder, "peer.sock"))
            try:
                with contextlib.suppress(HandoverError):
                    listener.accept(time.monotonic() + 0.0002)
            finally:
                listener.close()
    """
    assert "interrupted" in run(work + ROUNDS, tmp_path, seed)


def test_a_monitor_that_is_dropped(tmp_path):
    """As if the Ctrl-C had come before the caller had the object."""
    path = tmp_path / "qmp"
    with answering(path):
        assert Monitor(str(path)).execute("query-status") == {}
    until(lambda: "snap-qmp" not in thread_names())


@contextlib.contextmanager
def answering(path):
    """A monitor that serves one client after the other, and answers each command."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        thread = threading.Thread(target=answer_all, args=(server,))
        thread.start()
        try:
            yield
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def answer_all(server):
    while True:
        try:
            client, _ = server.accept()
        except OSError:  # the test is over
            return
        with client, contextlib.suppress(ConnectionError):
            answer_one(client)


def answer_one(client):
    version = {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}
    client.sendall(json.dumps({"QMP": {"version": version, "capabilities": []}}).encode() + b"\r\n")
    asked = ""
    while data := client.recv(4096):
        asked += data.decode()
        with contextlib.suppress(json.JSONDecodeError):  # incomplete so far
            while asked := asked.lstrip():
                command, end = json.JSONDecoder().raw_decode(asked)
                asked = asked[end:]
                answer = {"return": {}} | {name: command[name] for name in ("id",) if name in command}
                client.sendall(json.dumps(answer).encode() + b"\r\n")

"""The socket file of the listener: which existing files it replaces, and that it is removed."""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from handoverkit import connect, fds_before, open_fds

from snapengine.errors import HandoverError, UnsupportedError
from snapengine.handover.listener import Listener


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    before = fds_before()
    yield
    assert open_fds() == before


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "engine.sock"


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


def test_one_that_is_dropped_goes_away_but_not_with_a_forked_child(path: Path) -> None:
    listener = Listener(path)
    child = os.fork()
    if child == 0:
        del listener
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert path.exists()
    del listener
    assert not path.exists()


def test_stale_socket_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(os.fspath(path))
    listener = Listener(path)
    connect(path).close()
    listener.close()


def test_live_listener_is_refused_and_not_disturbed(path: Path) -> None:
    first = Listener(path)
    with pytest.raises(UnsupportedError, match="another process is listening there") as caught:
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

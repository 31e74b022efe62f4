"""Sinks: when a file appears and under which name; nothing is left after a failure."""

import errno
import io
import os
import socket
import stat

import pytest

from snapengine.base.descriptor import Descriptor
from snapengine.errors import SinkError
from snapengine.storage import file_sink
from snapengine.storage.sinks import (
    ExecSink,
    FdSink,
    FileSink,
    MemorySink,
    NullSink,
    PyFileSink,
    Sink,
    open_sink,
)


def put(sink: Sink, data: bytes) -> None:
    if sink.fd >= 0:
        assert os.write(sink.fd, data) == len(data)
    else:
        sink.write(data)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_a_file_appears_complete_on_commit(tmp_path):
    path = tmp_path / "a.snap"
    sink = open_sink(str(path))
    put(sink, b"image")
    (partial,) = tmp_path.iterdir()
    assert partial.name.startswith(".a.snap.")
    assert partial.name.endswith(".partial")
    sink.commit()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.snap"]
    assert path.read_bytes() == b"image"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_abort_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.snap"
    path.write_bytes(b"old")
    sink = FileSink(path)
    put(sink, b"new")
    sink.abort()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.snap"]
    assert path.read_bytes() == b"old"


def test_commit_replaces_the_target_of_a_symbolic_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real/a.snap")
    sink = FileSink(tmp_path / "link")
    put(sink, b"image")
    sink.commit()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a.snap").read_bytes() == b"image"


def test_a_failed_commit_removes_the_file(tmp_path, monkeypatch):
    def fail(fd):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    sink = FileSink(tmp_path / "a.snap")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SinkError, match=r"a\.snap: Input/output error") as caught:
        sink.commit()
    assert caught.value.errno == errno.EIO
    assert list(tmp_path.iterdir()) == []
    assert not is_open(sink.fd)


@pytest.mark.parametrize(
    ("name", "err", "text"),
    [
        ("", errno.EISDIR, "is a directory"),
        ("missing/a.snap", errno.ENOENT, "there is no directory"),
        ("pipe", errno.EINVAL, "not a regular file"),
    ],
)
def test_what_cannot_be_a_file_is_refused(tmp_path, name, err, text):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SinkError, match=text) as caught:
        open_sink(f"file:{tmp_path}/{name}")
    assert caught.value.errno == err
    assert "\n" not in str(caught.value)


def test_a_command_gets_the_image(tmp_path):
    sink = open_sink(f"exec:cat > {tmp_path}/out")
    assert isinstance(sink, ExecSink)
    put(sink, b"image")
    sink.commit()
    assert (tmp_path / "out").read_bytes() == b"image"


def test_a_failing_command_is_an_error():
    sink = open_sink("exec:cat > /dev/null; exit 7")
    with pytest.raises(SinkError, match=r"exec:cat > /dev/null; exit 7: exit status 7"):
        sink.commit()
    assert not is_open(sink.fd)


def test_abort_ends_the_command_and_its_children(tmp_path):
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    # The grandchild has the pipe's write end open: end of file tells that it has ended.
    sink = ExecSink(f"sleep 1000 > /proc/{os.getpid()}/fd/{write_end} & wait")
    pid = sink._process.pid
    sink.abort()
    os.close(write_end)
    assert os.read(read_end, 1) == b""
    os.close(read_end)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_descriptor_of_the_callers_stays_open_and_unchanged(tmp_path):
    with open(tmp_path / "out", "wb") as file:
        sink = open_sink(f"fd:{file.fileno()}")
        put(sink, b"image")
        sink.commit()
        assert is_open(file.fileno())
    assert (tmp_path / "out").read_bytes() == b"image"
    read_end, write_end = os.pipe()
    sink = FdSink(write_end)
    assert not os.get_blocking(sink.fd)
    assert os.get_blocking(write_end)
    put(sink, b"image")
    sink.abort()
    assert is_open(write_end)
    assert os.read(read_end, 10) == b"image"
    os.close(read_end)
    os.close(write_end)


def test_a_socket_is_a_descriptor():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sink = FdSink(ours.fileno())
        put(sink, b"image")
        sink.commit()
        assert theirs.recv(10) == b"image"
        assert ours.getblocking()


def test_a_closed_descriptor_is_an_error():
    read_end, write_end = os.pipe()
    os.close(read_end)
    os.close(write_end)
    with pytest.raises(SinkError, match=f"fd:{write_end}: dup: Bad file descriptor"):
        open_sink(f"fd:{write_end}")


def test_memory_and_null():
    memory, null = open_sink(MemorySink()), open_sink("null:")
    for sink in (memory, null):
        sink.write(b"im")
        sink.write(memoryview(b"age"))
        sink.commit()
    assert memory.getvalue() == b"image"
    assert isinstance(null, NullSink)
    dropped = MemorySink()
    dropped.write(b"image")
    dropped.abort()
    assert dropped.getvalue() == b""


class Trickle(io.RawIOBase):
    """A raw file that accepts three bytes per write."""

    def __init__(self):
        self.taken = b""

    def writable(self):
        return True

    def write(self, data):
        self.taken += bytes(data[:3])
        return min(3, len(data))


def test_a_file_object_gets_all_bytes_and_stays_open():
    file = Trickle()
    sink = open_sink(file)
    assert isinstance(sink, PyFileSink)
    sink.write(b"0123456789")
    sink.commit()
    assert file.taken == b"0123456789"
    assert not file.closed


@pytest.mark.parametrize("make", [MemorySink, NullSink, lambda: ExecSink("cat > /dev/null")])
def test_only_the_first_of_commit_and_abort_counts(make):
    for first, second in (("commit", "abort"), ("abort", "commit"), ("commit", "commit")):
        sink = make()
        getattr(sink, first)()
        getattr(sink, second)()
        assert sink._open is False


@pytest.mark.parametrize("spec", ["exec:", "file:", "fd:x", "fd:-1", ""])
def test_what_names_no_sink(spec):
    with pytest.raises(ValueError, match=r"colon|descriptor|empty"):
        open_sink(spec)
    with pytest.raises(TypeError, match="not a sink"):
        open_sink(3)


def test_an_interrupt_while_the_file_is_made_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*arguments):
        Descriptor(*arguments)
        made.extend(os.listdir(tmp_path))
        raise KeyboardInterrupt

    made = []
    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(file_sink, "Descriptor", interrupted)
    with pytest.raises(KeyboardInterrupt):
        FileSink(tmp_path / "image")
    assert len(made) == 1
    assert os.listdir(tmp_path) == []
    assert os.listdir("/proc/self/fd") == before


def test_a_sink_that_is_dropped_leaves_nothing(tmp_path):
    """As if an interrupt had come before the caller had the object."""
    before = os.listdir("/proc/self/fd")
    FileSink(tmp_path / "image")
    open_sink("exec:cat >/dev/null")
    assert os.listdir(tmp_path) == []
    assert os.listdir("/proc/self/fd") == before


def test_a_forked_child_that_drops_a_sink(tmp_path):
    sink = FileSink(tmp_path / "image")
    child = os.fork()
    if not child:
        del sink
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    sink.commit()
    assert os.listdir(tmp_path) == ["image"]

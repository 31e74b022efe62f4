"""Bytes out: where an image goes. A sink knows nothing of records; a writer knows nothing of files.

Life cycle of every sink: bytes go in (through `fd` without the GIL, or `write`), then exactly one of
`commit` and `abort` takes effect; calling either again does nothing. Until `commit` has returned
there is no image.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import select
import signal
import stat
import subprocess
from collections.abc import Iterator
from typing import Any, BinaryIO

from snapengine.base.descriptor import Descriptor
from snapengine.errors import SinkError, SnapengineError

DISCARD = -1
PYTHON_LEVEL = -2
PIPE_BYTES = 1 << 20  # what an unprivileged process may set (fs.pipe-max-size)
PARTIAL = ".partial"
GRACE_S = 2.0  # between SIGTERM and SIGKILL


class Sink:
    """What all sinks share. ``fd`` is a descriptor to write to, `DISCARD`, or `PYTHON_LEVEL`."""

    name: str
    fd: int = PYTHON_LEVEL

    def __init__(self, name: str) -> None:
        self.name = name
        self._open = True

    def write(self, data: memoryview | bytes) -> None:
        """All of `data` (a sink without a descriptor). ``OSError`` if it cannot be taken."""
        raise NotImplementedError

    def explain(self, err: int) -> str:
        """What the errno of a failed write means here, in one line."""
        return os.strerror(err)

    def commit(self) -> None:
        """Make the image complete and durable. ``SinkError``: it is not, and nothing is left of it."""
        if self._open:
            self._open = False
            self._commit()

    def abort(self) -> None:
        """Leave nothing of the image behind."""
        if self._open:
            self._open = False
            self._abort()

    def cancel(self) -> None:
        """From any thread: a `commit` that waits for somebody fails. The others go on; `abort` is to
        follow."""

    def _commit(self) -> None:
        pass

    def _abort(self) -> None:
        pass


class _OwnSink(Sink):
    """One with a descriptor of its own. It aborts when it is dropped before its end: an interrupt may come as
    the call that made it returns, when nobody has it yet. A forked child's copy does nothing."""

    _owner = 0

    def _own(self) -> None:
        """It is there from now on."""
        self._owner = os.getpid()

    def __del__(self) -> None:
        if self._owner == os.getpid():
            self.abort()


class FileSink(_OwnSink):
    """A file that appears, complete, under its name on commit.

    Until then it is ``.NAME.XXXXXXXX.partial`` in the same directory, locked (flock(2)) by who writes it. A
    killed process leaves it behind; it has no trailer, so no reader takes it for an image, and the next sink
    of that name removes it, since nobody holds its lock. Mode 0600: memory holds secrets.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(os.fspath(path))
        self._path = os.path.realpath(self.name)  # a symbolic link stays one
        directory, base = os.path.split(self._path)
        _check_destination(self.name, self._path, directory)
        prefix = _partial_prefix(directory, base)
        _remove_stale(directory, prefix)
        while not self._make(os.path.join(directory, f"{prefix}{secrets.token_hex(4)}{PARTIAL}")):
            pass

    def _make(self, path: str) -> bool:
        """Create the file and lock it; False: somebody took it for stale before it was locked."""
        self._temporary = path
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self.fd = os.open(path, flags, 0o600)
            if _lock(self.fd) and os.fstat(self.fd).st_nlink:
                self._own()
                return True
            os.close(self.fd)
            return False
        except OSError as error:
            raise _sink_error(self.name, error) from None
        except BaseException:  # a Ctrl-C is raised as the call returns: the file is there, and not ours yet
            _close_named(path)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            raise

    def _commit(self) -> None:
        try:
            os.fsync(self.fd)
            os.replace(self._temporary, self._path)
            _fsync_directory(os.path.dirname(self._path))
        except OSError as error:
            self._abort()
            raise _sink_error(self.name, error) from None
        os.close(self.fd)

    def _abort(self) -> None:
        os.close(self.fd)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._temporary)


def _close_named(path: str) -> None:
    """Close the descriptor of a file of ours, by a name that nobody else has: its number was lost."""
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{number}") == path:
                os.close(int(number))


@contextlib.contextmanager
def whole(out: str | os.PathLike[str] | Sink) -> Iterator[Sink]:
    """A sink, or a file by its path, that is there, complete, after the block.

    `SinkError`: it cannot be written. Nothing is left of it after an error.
    """
    sink = out if isinstance(out, Sink) else FileSink(out)
    try:
        yield sink
    except OSError as error:
        sink.abort()
        if isinstance(error, SnapengineError):
            raise
        raise _sink_error(sink.name, error) from None
    except BaseException:
        sink.abort()
        raise
    sink.commit()


def put(sink: Sink, data: bytes | bytearray | memoryview) -> None:
    """All of `data` behind what the sink has got so far. Raises OSError."""
    view = memoryview(data)
    if sink.fd == PYTHON_LEVEL:
        sink.write(view)
    while sink.fd >= 0 and view:
        try:
            view = view[os.write(sink.fd, view) :]
        except BlockingIOError:  # a pipe of ours that is full
            select.select([], [sink.fd], [])
        except OSError as error:
            number = error.errno or errno.EIO
            raise SinkError(number, f"{sink.name}: {sink.explain(number)}") from None


class ExecSink(_OwnSink):
    """A shell command that reads the image from its standard input."""

    def __init__(self, command: str) -> None:
        super().__init__(f"exec:{command}")
        self._cancelled = False
        read_end, self.fd = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.fd, False)  # this description is ours alone: the command has the other end
        enlarge_pipe(self.fd)
        try:
            # A session of its own: abort must reach the shell's children, Ctrl-C must not.
            self._process = subprocess.Popen(
                ["/bin/sh", "-c", command], stdin=read_end, start_new_session=True
            )
        except OSError as error:
            os.close(self.fd)
            raise _sink_error(self.name, error) from None
        finally:
            os.close(read_end)
        self._own()

    def explain(self, err: int) -> str:
        if err != errno.EPIPE:
            return os.strerror(err)
        try:
            return f"the command stopped reading ({_exit_text(self._process.wait(GRACE_S))})"
        except subprocess.TimeoutExpired:
            return "the command stopped reading"

    def cancel(self) -> None:
        self._cancelled = True

    def _commit(self) -> None:
        os.close(self.fd)
        try:
            code = self._wait_for_end()
        except BaseException:
            self._stop()
            raise
        if code:
            raise SinkError(errno.EIO, f"{self.name}: {_exit_text(code)}")

    def _wait_for_end(self) -> int:
        pidfd = os.pidfd_open(self._process.pid)
        try:
            while not select.select([pidfd], [], [], 0.1)[0]:
                if self._cancelled:
                    raise SinkError(errno.ECANCELED, f"{self.name}: the command was ended before it was done")
        finally:
            os.close(pidfd)
        return self._process.wait()

    def _abort(self) -> None:
        self._stop()  # before the pipe is closed: an end of file would look like a complete image
        os.close(self.fd)

    def _stop(self) -> None:
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE_S)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


class FdSink(_OwnSink):
    """A descriptor of the caller's: never closed, its flags never changed."""

    def __init__(self, fd: int, name: str | None = None) -> None:
        super().__init__(name or f"fd:{fd}")
        try:
            self.fd = _private_writer(fd)
        except OSError as error:
            raise _sink_error(self.name, error) from None
        self._own()

    def _commit(self) -> None:
        try:
            if stat.S_ISREG(os.fstat(self.fd).st_mode):
                os.fsync(self.fd)
        except OSError as error:
            raise _sink_error(self.name, error) from None
        finally:
            os.close(self.fd)

    def _abort(self) -> None:
        os.close(self.fd)


class NullSink(Sink):
    """Counts (`Writer.image_bytes`) and discards: what a capture costs without any output."""

    fd = DISCARD

    def __init__(self) -> None:
        super().__init__("null:")

    def write(self, data: memoryview | bytes) -> None:
        """Discard."""


class MemorySink(Sink):
    """The image in memory: `getvalue` after `commit`."""

    def __init__(self) -> None:
        super().__init__("memory")
        self._bytes = bytearray()

    def write(self, data: memoryview | bytes) -> None:
        """Append."""
        self._bytes += data

    def getvalue(self) -> bytes:
        """The bytes so far; none after `abort`."""
        return bytes(self._bytes)

    def _abort(self) -> None:
        self._bytes.clear()


class PyFileSink(Sink):
    """A writable binary file object of the caller's: flushed on commit, never closed."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(str(getattr(file, "name", type(file).__name__)))
        self._file = file

    def write(self, data: memoryview | bytes) -> None:
        """All of `data`, however little a raw file takes at once."""
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) or 0 :]
        except OSError as error:
            raise _sink_error(self.name, error) from None

    def _commit(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            raise _sink_error(self.name, error) from None


def open_sink(spec: Any) -> Sink:
    """The sink that `spec` names.

    A path or ``file:PATH``; ``exec:COMMAND`` (for the shell); ``fd:N``; ``-`` (standard output);
    ``null:`` (discard); a `Sink`; or a writable binary file object. ``SinkError``: it cannot be
    opened. ``ValueError`` or ``TypeError``: that names no sink.
    """
    if isinstance(spec, Sink):
        return spec
    if isinstance(spec, os.PathLike):
        return FileSink(spec)
    if isinstance(spec, str):
        return _named_sink(spec)
    if hasattr(spec, "write"):
        return PyFileSink(spec)
    raise TypeError(f"not a sink: {spec!r}")


def _named_sink(spec: str) -> Sink:
    scheme, _, rest = spec.partition(":")
    if spec == "-":
        return FdSink(1, "stdout")
    if spec == "null:":
        return NullSink()
    if scheme in ("file", "exec") and spec != scheme and not rest:
        raise ValueError(f"{spec!r}: nothing follows the colon")
    if scheme == "exec" and rest:
        return ExecSink(rest)
    if scheme == "fd" and rest:
        if not rest.isascii() or not rest.isdigit():
            raise ValueError(f"{spec!r}: not a descriptor number")
        return FdSink(int(rest))
    if not spec:
        raise ValueError("the name of the image is empty")
    return FileSink(rest if scheme == "file" and rest else spec)


def _partial_prefix(directory: str, base: str) -> str:
    """What the names of unfinished files of `base` begin with: as many of its bytes as leave room."""
    room = os.pathconf(directory, "PC_NAME_MAX") - len("..12345678") - len(PARTIAL)
    return f".{os.fsdecode(os.fsencode(base)[:room])}."


def _lock(fd: int) -> bool:
    """False: another process holds the lock. A file system without locks is no obstacle: there nothing is
    removed, as no lock is got."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _remove_stale(directory: str, prefix: str) -> None:
    """Remove unfinished files that a killed process has left: those whose lock nobody holds."""
    pattern = re.compile(re.escape(prefix) + r"[0-9a-f]{8}" + re.escape(PARTIAL))
    with contextlib.suppress(OSError):  # a directory that may not be listed
        for name in filter(pattern.fullmatch, os.listdir(directory)):
            _remove_if_unlocked(os.path.join(directory, name))


def _remove_if_unlocked(path: str) -> None:
    # Not removed: another user's, gone, or somebody writes to it.
    with contextlib.suppress(OSError), Descriptor(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)


def _check_destination(name: str, path: str, directory: str) -> None:
    if not os.path.isdir(directory):
        raise SinkError(errno.ENOENT, f"{name}: there is no directory {directory}")
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:  # such as a name that is too long: better now than when all is saved
        raise _sink_error(name, error) from None
    if stat.S_ISDIR(mode):
        raise SinkError(errno.EISDIR, f"{name}: is a directory")
    if not stat.S_ISREG(mode):
        raise SinkError(errno.EINVAL, f"{name}: not a regular file (use fd:N for a device or pipe)")


def _private_writer(fd: int) -> int:
    """A descriptor of our own for the same file.

    Of a pipe it is a new description with O_NONBLOCK, so that a write to a full pipe can be
    cancelled: setting the flag on the caller's description would change it for everyone who shares it.
    """
    own = os.dup(fd)
    if not stat.S_ISFIFO(os.fstat(own).st_mode):
        return own
    try:
        reopened = os.open(f"/proc/self/fd/{own}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # no /proc, or a pipe of another user: the writer polls instead
        return own
    os.close(own)
    return reopened


def enlarge_pipe(fd: int) -> None:
    """A pipe of 1 MiB instead of 64 KiB: fewer switches to the other end. Not vital, so errors are ignored,
    and that `fd` may be no pipe."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def _fsync_directory(directory: str) -> None:
    with Descriptor(directory, os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.fsync(fd)


def _exit_text(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit status {code}"


def _sink_error(name: str, error: OSError) -> SinkError:
    return SinkError(error.errno or errno.EIO, f"{name}: {error.strerror or error}")

"""A sink that writes a file and renames it to its final name when it is complete."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat

from snapengine.base.descriptor import Descriptor
from snapengine.errors import SinkError
from snapengine.storage.sink import OwningSink, sink_error

PARTIAL = ".partial"


class FileSink(OwningSink):
    """A file that gets its final name on commit, when it is complete.

    Until then it is ``.NAME.XXXXXXXX.partial`` in the same directory, locked (flock(2)) by its writer. A
    killed process leaves this file behind. It has no trailer, so readers reject it. The next sink with the
    same name removes it, since it is no longer locked. The mode is 0600, since memory may contain secrets.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(os.fspath(path))
        self._path = os.path.realpath(self.name)  # write through a symbolic link, do not replace it
        directory, base = os.path.split(self._path)
        _check_destination(self.name, self._path, directory)
        prefix = _partial_prefix(directory, base)
        _remove_stale(directory, prefix)
        while not self._make(os.path.join(directory, f"{prefix}{secrets.token_hex(4)}{PARTIAL}")):
            pass

    def _make(self, path: str) -> bool:
        """Create the file and lock it. Returns False if another sink removed it before it was locked."""
        self._temporary = path
        try:
            self._descriptor = Descriptor(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            self.fd = self._descriptor.fd
            if _lock(self.fd) and os.fstat(self.fd).st_nlink:
                self._take_ownership()
                return True
            self._descriptor.close()
            return False
        except OSError as error:
            raise sink_error(self.name, error) from None
        except BaseException:  # an interrupt: the file may exist, but no caller can abort the sink yet
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
            raise sink_error(self.name, error) from None
        self._descriptor.close()

    def _abort(self) -> None:
        self._descriptor.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._temporary)


def _partial_prefix(directory: str, base: str) -> str:
    """Prefix of the names of unfinished files of `base`, truncated so that the name fits NAME_MAX."""
    room = os.pathconf(directory, "PC_NAME_MAX") - len("..12345678") - len(PARTIAL)
    return f".{os.fsdecode(os.fsencode(base)[:room])}."


def _lock(fd: int) -> bool:
    """Lock the file. Returns False if another process holds the lock. On a file system without locks it
    returns True: stale files are not removed there, since that requires a lock."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _remove_stale(directory: str, prefix: str) -> None:
    """Remove the unfinished files of killed processes: those that are not locked."""
    pattern = re.compile(re.escape(prefix) + r"[0-9a-f]{8}" + re.escape(PARTIAL))
    with contextlib.suppress(OSError):  # no permission to list the directory
        for name in filter(pattern.fullmatch, os.listdir(directory)):
            _remove_if_unlocked(os.path.join(directory, name))


def _remove_if_unlocked(path: str) -> None:
    # Errors: it belongs to another user, is gone, or is locked by its writer.
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
    except OSError as error:  # for example a name that is too long: fail before anything is saved
        raise sink_error(name, error) from None
    if stat.S_ISDIR(mode):
        raise SinkError(errno.EISDIR, f"{name}: is a directory")
    if not stat.S_ISREG(mode):
        raise SinkError(errno.EINVAL, f"{name}: not a regular file (use fd:N for a device or pipe)")


def _fsync_directory(directory: str) -> None:
    with Descriptor(directory, os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.fsync(fd)

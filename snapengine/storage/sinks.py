"""All kinds of sinks, and the selection of one by a name or an object."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from snapengine.errors import SnapengineError
from snapengine.storage.exec_sink import ExecSink
from snapengine.storage.fd_sink import FdSink
from snapengine.storage.file_sink import FileSink
from snapengine.storage.memory_sink import MemorySink
from snapengine.storage.null_sink import NullSink
from snapengine.storage.pyfile_sink import PyFileSink
from snapengine.storage.sink import Sink, sink_error

__all__ = [
    "ExecSink", "FdSink", "FileSink", "MemorySink", "NullSink", "PyFileSink", "Sink", "atomic_output",
    "open_sink",
]  # fmt: skip


def open_sink(spec: Any) -> Sink:
    """Open the sink that `spec` specifies.

    A path or ``file:PATH``; ``exec:COMMAND`` (a shell command); ``fd:N``; ``-`` (standard output); ``null:``
    (discard); a `Sink`; or a writable binary file object. Raises `SinkError` if it cannot be opened,
    ValueError or TypeError if `spec` is not a sink.
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


@contextlib.contextmanager
def atomic_output(out: str | os.PathLike[str] | Sink) -> Iterator[Sink]:
    """Context manager for a sink or a path. The output exists, complete, after the block.

    Raises `SinkError` if it cannot be written. After an error nothing of the output is left.
    """
    sink = out if isinstance(out, Sink) else FileSink(out)
    try:
        yield sink
    except OSError as error:
        sink.abort()
        if isinstance(error, SnapengineError):
            raise
        raise sink_error(sink.name, error) from None
    except BaseException:
        sink.abort()
        raise
    sink.commit()

"""Conversion of a migration stream to an image: parse, resolve repeated pages, compress, index, commit.

One thread reads the stream and queues its pages; encoder threads write the image. The caller's thread waits
in Python code, so a Ctrl-C reaches it while the other threads are blocked.
"""

from __future__ import annotations

import math
import os
import select
import time
from collections.abc import Callable
from typing import Any

from snapengine.base.workers import Workers
from snapengine.errors import CaptureCancelled, TimeLimitError
from snapengine.options import Options
from snapengine.pipeline.pipeline import Pipeline
from snapengine.qemu.blobs import HEAD, MACHINE, TAIL, parse_members
from snapengine.qemu.image_end import finish_image, regions_of
from snapengine.qemu.stream_pages import DirectIntake, Spool
from snapengine.qemu.stream_parser import HEAD_MAX_BYTES, TAIL_MAX_BYTES
from snapengine.qemu.tail import check_tail
from snapengine.result import Result
from snapengine.storage.pipes import PIPE_BYTES, enlarge_pipe
from snapengine.storage.sinks import Sink, open_sink

__all__ = ["drain", "ingest"]

DRAIN_SECONDS = 30.0
RECORD_MAX_BYTES = 4096 + 9 + 255  # of one page, with the name of its block


def ingest(
    stream_fd: int,
    sink: Any,
    options: Options | None = None,
    *,
    direct: bool = False,
    extra_blobs: dict[str, bytes] | None = None,
    name: str = "stream",
    watch: Callable[[int], None] | None = None,
    finish: Callable[[], dict[str, Any]] | None = None,
    failed: Callable[[float], None] | None = None,
) -> Result:
    """Read a migration stream to its end and write it as an image.

    Parameters
    ----------
    stream_fd:
        The stream: a pipe, a socket or a file. The caller closes it.
    sink:
        As `snapengine.snapshot` takes it.
    options:
        `compress`, `memory_limit`, `rate_limit`, `spill_dir`, `timeout` and `encoder_threads` are used.
    direct:
        Write each page to the image when it arrives. This suits a stream that sends each page once
        (background-snapshot); a page that is sent again is stored again. Otherwise pages go through an
        unnamed file in `spill_dir`, which keeps the last version of each, and the image stores each once.
    extra_blobs:
        Further named blobs. A JSON object named "qemu.machine" is merged into the machine description.
    name:
        The stream's name in error messages.
    watch:
        Called about ten times a second with the bytes read so far. An exception from it ends the operation.
    finish:
        Called when the stream has ended, which can be long before the image is complete. It returns fields
        of the result that only the sender knows. After an exception from it no image is left.
    failed:
        Called before an error is raised, with the most bytes that a background-snapshot can still send: for
        `drain`.

    Returns
    -------
    Result
        The method is "write-tracking" if `direct`, or if the stream is of a background-snapshot, else
        "dirty-logging". Fields that only a capture
        measures are 0.

    Raises
    ------
    StreamError
        The stream is truncated, damaged, or uses an unsupported feature.
    SinkError, OSError, ValueError
        The image or the spool file cannot be written, or the extra blobs are invalid. No image is left after
        any error.
    TimeLimitError
        The operation took longer than `options.timeout`.
    """
    blobs = dict(extra_blobs or {})
    members = parse_members(blobs.pop(MACHINE)) if MACHINE in blobs else {}
    if taken := {HEAD, TAIL} & blobs.keys():
        raise ValueError(f"extra blobs: {', '.join(sorted(taken))} is a reserved name: use another")
    work = _Ingest(stream_fd, open_sink(sink), options or Options(), direct, blobs, members, name)
    work.finish = finish
    try:
        return work.run(watch)
    except BaseException:
        if failed is not None:
            failed(work.rest_max_bytes)
        raise


def drain(stream_fd: int, silence: float = DRAIN_SECONDS, most: float = math.inf) -> None:
    """Read the rest of a background-snapshot's stream and discard it.

    If a background-snapshot fails or is cancelled, QEMU 7.2 leaves the pages write-protected, and the guest
    blocks for ever at its first write to one (10.0 does not). After an error on our side the migration must
    therefore run to its end. This function gives up after `silence` seconds without data, or when `most`
    bytes have come: then it is another migration, which may go on for ever, and which may fail.
    """
    poll = select.poll()
    poll.register(stream_fd, select.POLLIN)
    while most > 0 and poll.poll(silence * 1000):
        got = len(os.read(stream_fd, PIPE_BYTES))
        if not got:
            return
        most -= got


class _Ingest:
    """The state of one call of `ingest`."""

    def __init__(
        self,
        stream_fd: int,
        sink: Sink,
        options: Options,
        direct: bool,
        blobs: dict[str, bytes],
        members: dict[str, Any],
        name: str,
    ) -> None:
        self._sink = sink
        self._options = options
        self._blobs = blobs
        self._members = members
        self.finish: Callable[[], dict[str, Any]] | None = None
        self._error: BaseException | None = None
        self._result: Result | None = None
        self._encoding: Pipeline | None = None
        self._intake: DirectIntake | Spool
        self._stream_fd = stream_fd
        try:
            self._intake = (
                DirectIntake(stream_fd, name=name)
                if direct
                else Spool(stream_fd, options.spill_dir, name=name)
            )
        except BaseException:
            sink.abort()
            raise
        self._start_ns = time.monotonic_ns()

    @property
    def rest_max_bytes(self) -> float:
        """The most bytes that still come if the stream sends each page once: infinite before the head."""
        pages = self._intake.total_pages
        whole = HEAD_MAX_BYTES + pages * RECORD_MAX_BYTES + TAIL_MAX_BYTES if pages else math.inf
        return whole - self._intake.offset

    def run(self, watch: Callable[[int], None] | None) -> Result:
        """Convert the stream on a worker thread, and wait for it."""
        enlarge_pipe(self._stream_fd)
        worker = Workers()
        try:
            worker.start("snap-ingest", self._work)
            until = time.monotonic() + (self._options.timeout or math.inf)
            while not worker.wait(0.1):
                if watch is not None:
                    watch(self._intake.offset)
                if time.monotonic() > until:
                    raise TimeLimitError(f"not done within {self._options.timeout:g} s: no image is left")
        except BaseException:
            self._stop()
            if not worker.close():
                self._close()
            worker.wait()
            self._sink.abort()
            raise
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def _stop(self) -> None:
        self._intake.fail()
        if self._encoding is not None:
            self._encoding.writer.cancel()

    def _work(self) -> None:
        try:
            self._result = self._convert()
        except BaseException as error:
            self._stop()
            cause = self._encoding.stop() if self._encoding is not None else None
            # A failing encoder cancels the reader; the encoder's error is the cause to report.
            self._error = cause if cause is not None and isinstance(error, CaptureCancelled) else error
            self._sink.abort()
        finally:
            self._close()

    def _close(self) -> None:
        if isinstance(self._intake, Spool):
            self._intake.close()
        if self._encoding is not None:
            self._encoding.close()

    def _convert(self) -> Result:
        intake = self._intake
        intake.read_head()
        intake.open_tables()
        encoding = self._encoding = Pipeline(self._sink, self._options, intake.total_pages, self._stop)
        encoding.start(regions_of(intake.ram_blocks))
        intake.attach(encoding.pool, self._options.zstd_level is None)
        intake.read_pages()
        intake.read_tail()
        check_tail(intake.tail, intake.offset, intake.name)
        sender_fields = self.finish() if self.finish is not None else {}
        if isinstance(intake, DirectIntake):
            intake.put_holes()
        else:
            intake.put_all()
        intake.close_lane()
        encoding.join()
        result = finish_image(encoding.writer, intake, self._options, self._blobs, self._members,
                              self._start_ns, encoding.peak_bytes, sender_fields)  # fmt: skip
        self._sink.commit()
        return result

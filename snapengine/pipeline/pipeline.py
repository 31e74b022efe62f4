"""Construction of the pipeline from filled slots to the sink: pool, encoder and writer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from snapengine.base.workers import Workers
from snapengine.image.writer import Writer
from snapengine.options import Options
from snapengine.pipeline.encoder import Encoder
from snapengine.pipeline.pool import Pool
from snapengine.regions import PAGE_BYTES, Region
from snapengine.storage.sinks import Sink


def writer_and_encoder(
    pool: Pool, sink: Sink, options: Options, *, store_raw: Literal["writers", "room"] = "room"
) -> tuple[Writer, Encoder]:
    """Create the writer and the encoder that write the filled slots of `pool` to `sink`.

    `store_raw`: when a chunk may be stored raw for speed (see `Encoder`); never with `compress_always`.
    """
    writer = Writer(sink, rate_limit=options.rate_limit)
    encoder = Encoder(
        pool, writer, options.zstd_level, options.encoders,
        store_raw="never" if options.compress_always else store_raw, follow_sink=options.level_follows_sink,
    )  # fmt: skip
    return writer, encoder


class Pipeline:
    """Writes filled slots to `sink`. One thread fills the slots (`snapengine.qemu.stream_pages`).

    `on_failure` is called when an encoder fails, possibly several times and from any thread. It must stop the
    thread that fills slots. The caller calls `commit` or `abort` of the sink.
    """

    def __init__(
        self, sink: Sink, options: Options, total_pages: int, on_failure: Callable[[], None]
    ) -> None:
        self._n_threads = options.encoders
        self._on_failure = on_failure
        self._error: BaseException | None = None
        self._workers = Workers()
        # The thread that fills slots waits for a free slot, so the queue never exceeds the slots of the pool.
        most = min(total_pages, options.memory_limit // PAGE_BYTES)
        self.pool = Pool(options.memory_limit, most, 1, self._n_threads, options.spill_dir)
        self.writer, self._encoder = writer_and_encoder(self.pool, sink, options)

    @property
    def peak_bytes(self) -> int:
        """Largest number of bytes in buffers at one time."""
        return self.pool.peak_bytes + self._encoder.scratch_bytes

    def start(self, regions: Sequence[tuple[Region, int]]) -> None:
        """Begin the image with these regions (and their first page numbers), and start the encoders."""
        self.writer.begin(regions)
        for number in range(self._n_threads):
            self._workers.start(f"snap-encode-{number}", self._encode, number)

    def _encode(self, number: int) -> None:
        try:
            self._encoder.run(number)
        except BaseException as error:
            self._error = self._error or error
            self._on_failure()

    def join(self) -> None:
        """Wait for the threads, which end when the pool is closed and empty. Raises their exception."""
        self._workers.wait()
        if self._error is not None:
            raise self._error

    def stop(self) -> BaseException | None:
        """End the threads after a failure, when no thread fills slots. Returns the error of an encoder."""
        self.writer.cancel()
        self._workers.close()
        self._workers.wait()
        return self._error

    def close(self) -> None:
        """Free the slots. Call it after `join` or `stop`."""
        self.pool.close()

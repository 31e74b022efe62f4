"""From filled slots to the sink: how pool, encoder and writer are put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from snapengine.base.workers import Crew
from snapengine.image.writer import Writer
from snapengine.options import Options
from snapengine.pipeline.encoder import Encoder
from snapengine.pipeline.pool import Pool
from snapengine.regions import PAGE_BYTES, Region
from snapengine.storage.sinks import Sink


def writer_and_encoder(
    pool: Pool, sink: Sink, options: Options, *, store_raw: Literal["writers", "room"] = "room"
) -> tuple[Writer, Encoder]:
    """What takes filled slots from `pool` into `sink`, as the options say.

    `store_raw`: when a chunk may be stored raw for speed (see `Encoder`); never with `compress_always`.
    """
    writer = Writer(sink, rate_limit=options.rate_limit)
    encoder = Encoder(
        pool, writer, options.zstd_level, options.encoders,
        store_raw="never" if options.compress_always else store_raw, follow_sink=options.level_follows_sink,
    )  # fmt: skip
    return writer, encoder


class Encoding:
    """Takes filled slots from `pool` into `sink`. One thread fills them (`snapengine.qemu.stream_pages`).

    `on_failure` is called, once or more and from any thread, when an encoder fails: it must stop the
    thread that fills slots. The sink's `commit` and `abort` remain the caller's.
    """

    def __init__(
        self, sink: Sink, options: Options, total_pages: int, on_failure: Callable[[], None]
    ) -> None:
        self._threads_wanted = options.encoders
        self._on_failure = on_failure
        self._error: BaseException | None = None
        self._threads = Crew()
        # The thread that fills slots waits for room, so no more pages are ever queued than the pool holds.
        most = min(total_pages, options.memory_limit // PAGE_BYTES)
        self.pool = Pool(options.memory_limit, most, 1, self._threads_wanted, options.spill_dir)
        self.writer, self._encoder = writer_and_encoder(self.pool, sink, options)

    @property
    def peak_bytes(self) -> int:
        """Most bytes of buffer at one time."""
        return self.pool.peak_bytes + self._encoder.scratch_bytes

    def start(self, regions: Sequence[tuple[Region, int]]) -> None:
        """Begin the image with these regions (and their first page numbers), and start to encode."""
        self.writer.begin(regions)
        for number in range(self._threads_wanted):
            self._threads.start(f"snap-encode-{number}", self._encode, number)

    def _encode(self, number: int) -> None:
        try:
            self._encoder.run(number)
        except BaseException as error:
            self._error = self._error or error
            self._on_failure()

    def join(self) -> None:
        """Wait for the threads, which end when the pool is closed and empty. Raises what one raised."""
        self._threads.wait()
        if self._error is not None:
            raise self._error

    def stop(self) -> BaseException | None:
        """After a failure, and `on_failure`'s: end the threads. Returns what one of them failed with."""
        self.writer.cancel()
        self._threads.dismiss()
        self._threads.wait()
        return self._error

    def close(self) -> None:
        """Free the slots; after `join` or `stop`."""
        self.pool.close()

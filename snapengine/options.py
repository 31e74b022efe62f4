"""The options of a capture: one frozen dataclass; each field says when to change it."""

from __future__ import annotations

import re
from dataclasses import dataclass

WRITE_TRACKING = "write-tracking"
DIRTY_LOGGING = "dirty-logging"
METHODS = (WRITE_TRACKING, DIRTY_LOGGING)

AUTO = "auto"
PLAIN = "plain"
TWO_STEP = "two-step"
ARMING = (AUTO, PLAIN, TWO_STEP)

MIB = 1 << 20
MIN_MEMORY_LIMIT = 16 * MIB
MAX_TIMEOUT = 1e7  # the most that Python's timers take on any host
COPY_LIMIT = 64 * MIB
_ZSTD = re.compile(r"zstd(?::(-?\d+|auto))?(:always)?$")


@dataclass(frozen=True, slots=True)
class Options:
    """Options of one capture.

    Raises
    ------
    ValueError
        A field is out of range; the text names it.
    """

    method: str = WRITE_TRACKING
    """``"write-tracking"`` (the state at the start, every page once) or ``"dirty-logging"`` (the state at the
    end, in rounds; the target must be able to pause). Change it to compare the two."""

    compress: str = "none"
    """``"none"``, ``"zstd"`` or ``"zstd:LEVEL"`` (-7 ... 22, default 1). Use zstd when the sink is slower
    than the CPU, or when space counts. ``"zstd:auto"``: the highest level of 1 ... 6 that does not take
    longer than writing. A slow sink then gets a smaller image in less time, at the price of CPU time. Chunks
    that do not shrink are stored raw. Chunks are also stored raw while compression would delay the target and
    raw is faster by the costs measured so far: while writers fault more than once a millisecond and the walk
    waits for room; with dirty logging whenever a round waits for room. With the suffix ``":always"``
    (``"zstd:3:always"``) those are compressed too: the smallest image, at the price of more faults or longer
    rounds."""

    arming: str = AUTO
    """Write tracking: ``"plain"`` (all memory is protected at T; writers wait meanwhile: 16 ms per GiB of 4
    KiB pages) or ``"two-step"`` (memory is protected before T, and at T again only what was written to since,
    so the pause follows the hot set). ``"auto"``: two-step from 64 MiB on, if the target runs while it is
    armed."""

    memory_limit: int = 64 * MIB
    """Bytes of buffer between the capture threads and the sink (at least 16 MiB). Raise it to take
    bursts without a spill file; what exceeds it goes to `spill_dir`."""

    copy_limit: int = COPY_LIMIT
    """Attached processes: most bytes to copy while all threads are stopped, of memory that the kernel does
    not write-protect (1 ms per 8 MiB). Only private pages of the process count, not the size of its mappings.
    What exceeds the limit is not in the image, and the result says so: raise the limit then."""

    rate_limit: int = 0
    """Most bytes a second into the sink; 0: no limit. Set it to leave bandwidth to others."""

    spill_dir: str | None = None
    """Directory of the (unnamed) spill file; None: the system's temporary directory. Point it to a
    disk with room for the whole memory when the sink is slow and writers are fast."""

    fault_threads: int = 0
    """Threads that serve write faults; 0: one per usable CPU, at most 4."""

    walk_threads: int = 0
    """Threads that save the pages that nobody writes to (at most 16); 0: two, or one where only one CPU
    is usable or the memory is small. Set 1 to leave the other CPUs to the target; it takes longer then."""

    encoder_threads: int = 0
    """Threads that checksum, compress and write (one at a time); 0: two, or one where nothing is compressed:
    two would only wait for each other (into a tmpfs 494 instead of 432 ms per GiB)."""

    strict: bool = False
    """Fail, and leave no image, if the target discarded memory before it was saved. Otherwise the result
    lists it (`Result.lost_runs`), and reading it from the image is an error."""

    downtime_limit: float = 0.3
    """Dirty logging: the longest pause, in seconds, that the last round may take at the copy rate
    measured so far."""

    max_rounds: int = 30
    """Dirty logging: give up ("not-converged") after so many rounds."""

    max_seconds: float = 300.0
    """Dirty logging: give up ("not-converged") after so many seconds."""

    timeout: float = 0.0
    """Most seconds for the whole capture, from the wait for a peer to the commit of the sink; 0: no limit.
    After that the target is released, nothing is left of the image, and `TimeLimitError` is raised. The limit
    cannot interrupt a write of a Python-level sink, nor an fsync."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: {self.method!r} is none of {', '.join(METHODS)}")
        if self.arming not in ARMING:
            raise ValueError(f"arming: {self.arming!r} is none of {', '.join(ARMING)}")
        level = self.zstd_level
        if level is not None and not -7 <= level <= 22:
            raise ValueError(f"compress: zstd level {level} is not in -7 ... 22")
        if self.memory_limit < MIN_MEMORY_LIMIT:
            mib = self.memory_limit / MIB
            raise ValueError(f"memory_limit: {mib:.3g} MiB is less than {MIN_MEMORY_LIMIT // MIB} MiB")
        if self.copy_limit < 0:
            raise ValueError("copy_limit: must not be negative")
        if self.rate_limit < 0:
            raise ValueError("rate_limit: must not be negative")
        if not 0 <= self.fault_threads <= 64:
            raise ValueError("fault_threads: must be in 0 ... 64")
        if not 0 <= self.walk_threads <= 16:
            raise ValueError("walk_threads: must be in 0 ... 16")
        if not 0 <= self.encoder_threads <= 64:
            raise ValueError("encoder_threads: must be in 0 ... 64")
        for name in ("downtime_limit", "max_seconds", "max_rounds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: must be positive")
        if not 0 <= self.timeout < MAX_TIMEOUT:
            raise ValueError(f"timeout: must be in 0 ... {MAX_TIMEOUT:g} seconds")

    @property
    def zstd_level(self) -> int | None:
        """The zstd level (with ``zstd:auto`` the first one), or None for no compression. ValueError if
        `compress` is malformed."""
        if self.compress == "none":
            return None
        match = _ZSTD.match(self.compress)
        if match is None:
            ways = "none, zstd, zstd:LEVEL, zstd:auto (and :always)"
            raise ValueError(f"compress: {self.compress!r} is none of {ways}")
        return int(match[1]) if match[1] not in (None, AUTO) else 1

    @property
    def encoders(self) -> int:
        """How many encoder threads there are: `encoder_threads`, or what its 0 means."""
        return self.encoder_threads or (1 if self.zstd_level is None else 2)

    @property
    def level_follows_sink(self) -> bool:
        """Whether the level is chosen while it is written (``zstd:auto``)."""
        return self.compress.startswith("zstd:auto")

    @property
    def compress_always(self) -> bool:
        """Whether to compress even where storing raw would delay the target less."""
        return self.compress.endswith(":always")

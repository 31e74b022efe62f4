"""What can be refused before the sink and the target are opened: options and arguments that do not fit each
other, or this kernel.

Nothing here touches the target, so a refusal leaves no trace in it.
"""

from __future__ import annotations

import errno
import os
import tempfile
from typing import Any

from snapengine.base.names import encode
from snapengine.errors import UnsupportedError
from snapengine.image.encode import NAME_BYTES
from snapengine.kernel.features import PAGEMAP_SCAN, PAGEMAP_WP_BIT, KernelFeature
from snapengine.kernel.pagemap import has_pagemap_scan, has_wp_bits
from snapengine.options import DIRTY_LOGGING, WRITE_TRACKING, Options
from snapengine.pipeline.pool import check_room
from snapengine.process.record import PROCESS_BLOBS
from snapengine.targets.base import AttachedTarget, Target
from snapengine.targets.buffer import BufferTarget

SMALL_TARGET_BYTES = 16 << 20  # below, one thread is done before a second one has started
NO_PAUSE = "dirty logging needs a target that can pause: give pause and resume"


def check_before_open(
    target: Target, options: Options, vmstate: dict[str, bytes], extra: dict[str, Any]
) -> None:
    """Raise ValueError, TypeError, UnsupportedError or OSError for what would be refused later. ``extra``:
    arguments of the session."""
    if isinstance(target, BufferTarget) and options.method == DIRTY_LOGGING and not target.can_pause:
        raise ValueError(NO_PAUSE)
    method = getattr(target, "method", options.method)
    if method != options.method:
        raise ValueError(f"method: the target was made for {method}, the options say {options.method}")
    for name, blob in vmstate.items():
        _check_blob(name, blob, isinstance(target, AttachedTarget))
    _check_kernel(options, bool(extra.get("use_scan", True)))
    check_room(options.memory_limit, fault_threads(options) + walkers(options), options.encoders)
    with tempfile.TemporaryFile(dir=options.spill_dir, prefix="snapengine-spill-"):
        pass  # a spill file can be made


def fault_threads(options: Options) -> int:
    """How many threads serve write faults."""
    if options.method == DIRTY_LOGGING:
        return 1
    return options.fault_threads or min(4, len(os.sched_getaffinity(0)))


def walkers(options: Options, total_bytes: int = SMALL_TARGET_BYTES) -> int:
    """How many threads walk over a target of that size; by default the most for any."""
    if options.method == DIRTY_LOGGING:
        return 1
    if options.walk_threads:
        return options.walk_threads
    return 1 if total_bytes < SMALL_TARGET_BYTES else min(2, len(os.sched_getaffinity(0)))


def lacks(feature: KernelFeature) -> str:
    """That this kernel lacks it, and which one has it."""
    return f"this kernel lacks {feature.name} (Linux {feature.since})"


def _check_blob(name: str, blob: bytes, attached: bool) -> None:
    if not isinstance(name, str):
        raise TypeError(f"vmstate: the name {name!r} is no str")
    if attached and name in PROCESS_BLOBS:
        raise ValueError(f"vmstate: the name {name!r} is that of a blob which describes the process")
    size = len(encode(name))
    if not 0 < size <= NAME_BYTES:
        raise ValueError(f"vmstate: the name {name[:80]!r} has {size} bytes; 1 to {NAME_BYTES} are allowed")
    if "\0" in name:
        raise ValueError(f"vmstate: the name {name[:80]!r} contains a NUL")
    if not isinstance(blob, bytes | bytearray | memoryview):
        raise TypeError(f"vmstate: the blob {name[:80]!r} is {type(blob).__name__}, not bytes")


def _check_kernel(options: Options, use_scan: bool) -> None:
    try:
        if use_scan and has_pagemap_scan():
            return
    except PermissionError:
        # A process that gave up its rights may not open its own pagemap. The target says first why it cannot
        # be attached to; if it can be, the session fails at the same open.
        return
    if options.method == DIRTY_LOGGING:
        name, since = PAGEMAP_SCAN.name, PAGEMAP_SCAN.since
        raise UnsupportedError(errno.EOPNOTSUPP, f"dirty logging needs {name} (Linux {since})")
    if options.method == WRITE_TRACKING and options.strict and not has_wp_bits():
        raise UnsupportedError(
            errno.EOPNOTSUPP,
            f"{lacks(PAGEMAP_WP_BIT)}: whether pages were lost cannot be told, so strict is refused",
        )

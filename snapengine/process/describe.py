"""The process part of `info`: as JSON types, and as lines for a terminal."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from snapengine.base.names import escape, printable, unescape
from snapengine.base.units import format_count, format_size
from snapengine.image.sections import ImageRegion
from snapengine.process.record import ProcessRecord, not_captured_object

SHOWN_THREADS = 8
CUTS = {
    "soft": "soft (the threads kept running: their registers are not part of it)",
    "stop": "stop (all threads were stopped)",
}


def process_info(record: ProcessRecord | None, regions: Sequence[ImageRegion]) -> dict[str, Any] | None:
    r"""The record in JSON types, or None. Names are escaped as in the image: ``\\``, ``\xHH`` (FORMAT.md).

    A mapping counts as captured if any of it lies in a region.
    """
    if record is None:
        return None
    sizes = _captured(record, regions)
    return {
        "pid": record.pid,
        "ppid": record.ppid,
        "uid": record.uid,
        "gid": record.gid,
        "comm": escape(record.comm),
        "cmdline": [escape(argument) for argument in record.cmdline],
        "exe": escape(record.exe),
        "cut": record.cut,
        "threads": [{"tid": thread.tid, "comm": escape(thread.comm)} for thread in record.threads],
        "mappings": len(record.mappings),
        "mapped_bytes": sum(mapping.end - mapping.start for mapping in record.mappings),
        "captured_mappings": sum(size > 0 for size in sizes),
        "captured_bytes": sum(sizes),
        "not_captured": [not_captured_object(item) for item in record.not_captured],
    }


def _captured(record: ProcessRecord, regions: Sequence[ImageRegion]) -> list[int]:
    """The number of bytes of each mapping that lie in a region."""
    sizes = []
    ordered = sorted((region.addr, region.addr + region.length) for region in regions)
    first = 0
    for mapping in record.mappings:
        while first < len(ordered) and ordered[first][1] <= mapping.start:
            first += 1
        size, number = 0, first
        while number < len(ordered) and ordered[number][0] < mapping.end:
            size += max(min(ordered[number][1], mapping.end) - max(ordered[number][0], mapping.start), 0)
            number += 1
        sizes.append(size)
    return sizes


def process_rows(info: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of each line, from `process_info`. They contain no control characters."""
    captured = f"{format_count(info['captured_mappings'])} captured, {format_size(info['captured_bytes'])}"
    total = f"{format_count(info['mappings'])}, {format_size(info['mapped_bytes'])}"
    rows = [
        ("process", f"{info['pid']} ({_shown(info['comm'])}), user {info['uid']}, group {info['gid']}"),
        ("command", shlex.join(map(_shown, info["cmdline"]))),
        ("program", _shown(info["exe"])),
        ("cut", CUTS[info["cut"]]),
        ("threads", _threads(info["threads"])),
        ("mappings", f"{total}; {captured}"),
    ]
    reasons: dict[str, list[int]] = defaultdict(list)
    for item in info["not_captured"]:
        reasons[_shown(item["reason"])].append(item["end"] - item["start"])
    for reason, sizes in reasons.items():
        rows.append(("not captured", f"{format_count(len(sizes))}, {format_size(sum(sizes))}: {reason}"))
    return [(name, value) for name, value in rows if value]


def _threads(threads: list[dict[str, Any]]) -> str:
    shown = [f"{thread['tid']} ({_shown(thread['comm'])})" for thread in threads[:SHOWN_THREADS]]
    more = len(threads) - len(shown)
    return ", ".join(shown) + (f" and {format_count(more)} more" if more else "")


def _shown(name: str) -> str:
    return printable(unescape(name))

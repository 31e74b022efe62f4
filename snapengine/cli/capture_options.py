"""The command-line flags of `snapengine.options.Options`, the same in all commands that write an image."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from snapengine.base.units import parse_seconds, parse_size
from snapengine.cli.common import add_timeout, argument
from snapengine.options import ARMING, METHODS, Options
from snapengine.report.terminal import Parser

LEAST_RATE = 64 << 10


def parse_rate(text: str) -> int:
    """Bytes a second. Raises ValueError: that little is a forgotten unit."""
    size = parse_size(text)
    if 0 < size < LEAST_RATE:
        raise ValueError(f"{size} bytes a second are less than 64K: say {text.strip().rstrip('Bb')}M for MiB")
    return size


_SIZE = {"type": argument(parse_size), "metavar": "SIZE"}
_SECONDS = {"type": argument(parse_seconds), "metavar": "SECONDS"}
_COUNT = {"type": int, "metavar": "N"}

FLAGS: dict[str, dict[str, Any]] = {
    "method": {
        "choices": METHODS,
        "help": "write-tracking: the state at the start, every page once; dirty-logging: the state at the "
        "end, in rounds (default: write-tracking)",
    },
    "compress": {
        "metavar": "none|zstd[:LEVEL|:auto][:always]",
        "help": "LEVEL: -7 to 22; auto: a level that follows the speed of the sink; always: compress also "
        "where that delays the target (default: none)",
    },
    "arming": {
        "choices": ARMING,
        "help": "plain: protect all memory at T; two-step: protect it before T, and at T again only what was "
        "written to meanwhile (default: auto: two-step from 64 MiB on)",
    },
    "memory_limit": _SIZE | {"help": "size of the buffer before the sink, at least 16M (default: 64M)"},
    "copy_limit": _SIZE
    | {"help": "most memory to copy while all threads are stopped (default: 64M)"},
    "rate_limit": {
        "type": argument(parse_rate), "metavar": "SIZE",
        "help": "most bytes a second into the sink (default: no limit)",
    },
    "spill_dir": {"metavar": "DIR", "help": "where to spill what exceeds the buffer (default: $TMPDIR)"},
    "fault_threads": _COUNT
    | {"help": "threads that serve write faults, at most 64 (default: one per CPU, at most 4)"},
    "walk_threads": _COUNT
    | {"help": "threads that save the pages that nobody writes to, at most 16 (default: 2; 1 if only one CPU "
       "is usable or the memory is small)"},
    "encoder_threads": _COUNT
    | {"help": "threads that compress and write, at most 64 (default: 2; 1 without compression)"},
    "strict": {
        "action": "store_true", "default": None,
        "help": "fail if memory is discarded before it is saved",
    },
    "downtime_limit": _SECONDS
    | {"help": "dirty logging: longest pause that the last round may take (default: 0.3)"},
    "max_rounds": _COUNT | {"help": "dirty logging: give up after so many rounds (default: 30)"},
    "max_seconds": _SECONDS | {"help": "dirty logging: give up after so long (default: 300)"},
    "timeout": {"help": "give up, and release the target,"},
}  # fmt: skip
"""Arguments of `add_argument`, by the field's name; ``timeout``: of `add_timeout`."""

LEFT_OUT = {
    "save": (),
    "qemu save": ("copy_limit",),
    "ingest": (
        "method", "arming", "copy_limit", "fault_threads", "walk_threads", "strict", "downtime_limit",
        "max_rounds", "max_seconds",
    ),
}  # fmt: skip
"""What means nothing to a command: of a machine only the state of devices is copied in the stop, and `ingest`
has no target."""


def add_options(
    parser: argparse.ArgumentParser, left_out: Iterable[str], helps: Mapping[str, str] | None = None
) -> None:
    """Add the flag of every field but those of `left_out`; ``helps``: help texts of this command."""
    for name, usual in FLAGS.items():
        if name in left_out:
            continue
        keywords = usual | ({"help": helps[name]} if helps and name in helps else {})
        if name == "timeout":
            add_timeout(parser, keywords["help"])
        else:
            parser.add_argument(flag_of(name), **keywords)


def flag_of(name: str) -> str:
    """``--memory-limit`` of ``memory_limit``."""
    return f"--{name.replace('_', '-')}"


def make_options(args: argparse.Namespace) -> Options:
    """The options that were given; the others keep the defaults of `Options`. Wrong ones are usage errors."""
    given = {f.name: getattr(args, f.name, None) for f in fields(Options)}
    try:
        return Options(**{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        field, colon, text = str(error).partition(":")
        parser: Parser = args.parser
        parser.error(f"{flag_of(field)}{colon}{text}")

"""Shared by the commands: exit codes, usage errors, JSON, messages to the user."""

from __future__ import annotations

import argparse
import signal
import sys
from typing import Any, NoReturn, TextIO

from snapengine.base.names import one_line
from snapengine.report import streams

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_NOT_CONVERGED = 3
EXIT_LOST = 4
EXIT_TIMEOUT = 124  # as timeout(1) has it
EXIT_PIPE = 128 + signal.SIGPIPE

EXIT_CODES = """\
exit codes:
  0    done
  1    error (one line on stderr says what and why)
  2    wrong usage
  3    dirty logging did not converge; there is no image
  4    the image is complete, but pages were lost: the target discarded them before they were saved
  124  not done within --timeout: the target is released, nothing is left behind
  130  interrupted by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP, 131 by SIGQUIT: likewise
  141  the reader of stdout went away"""

raw = argparse.RawDescriptionHelpFormatter


class Parser(argparse.ArgumentParser):
    """A parser whose errors are two lines: what is wrong, and where the options are described."""

    def error(self, message: str) -> NoReturn:
        """End with `EXIT_USAGE`."""
        say(f"error: {message}", of=self.prog)
        say(f"`{self.prog} --help` has the options and examples", of=self.prog)
        sys.exit(EXIT_USAGE)


def say(text: str, *, of: str = "snapengine") -> None:
    """Print a message to the user. A broken stderr is ignored."""
    try:
        print(f"{of}: {one_line(text)}", file=sys.stderr, flush=True)
    except OSError:
        streams.silence(sys.stderr)


def print_json(value: Any, file: TextIO | None = None) -> None:
    """`value` as indented JSON in ASCII, to stdout unless told otherwise."""
    import json

    print(json.dumps(_plain(value), indent=2), file=file or sys.stdout)


def _plain(value: Any) -> Any:
    """Escape lone surrogates, which JSON does not have."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode() if not value.isascii() else value
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value

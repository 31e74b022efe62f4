"""What the subcommands share: exit codes, clean interruption, argument types, the two output streams."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn, TextIO

from rich.console import Console

from snapengine.names import one_line

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_NOT_CONVERGED = 3
EXIT_LOST = 4
EXIT_PIPE = 128 + signal.SIGPIPE

EXIT_CODES = """\
exit codes:
  0    done
  1    error (one line on stderr says what and why)
  2    wrong usage
  3    dirty logging did not converge; there is no image
  4    the image is complete, but pages were lost: the target discarded them before they were saved
  130  interrupted by Ctrl-C, 143 by SIGTERM: the target is released, nothing is left behind
  141  the reader of stdout went away"""

SIGNALS = (signal.SIGINT, signal.SIGTERM)
raw = argparse.RawDescriptionHelpFormatter


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM. A KeyboardInterrupt, so that no `except Exception` swallows it."""

    def __init__(self, signum: int) -> None:
        self.signal = signal.Signals(signum)
        super().__init__(f"cancelled by {self.signal.name}")

    @property
    def exit_code(self) -> int:
        """The shell's code for an end by this signal."""
        return 128 + self.signal


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into `Interrupted`, and ignore those that follow.

    A second Ctrl-C must not break off the release of the target. Only SIGKILL ends that, and then the
    kernel releases it. Outside the main thread, where Python allows no handlers, this does nothing.
    """

    def interrupt(signum: int, frame: FrameType | None) -> NoReturn:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise Interrupted(signum)

    previous: dict[signal.Signals, Any] = {}
    try:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a shell's background job
                previous[number] = signal.signal(number, interrupt)
    except ValueError:
        pass
    try:
        yield
    finally:
        for number in previous:
            signal.signal(number, previous[number])


def silence_stdout() -> None:
    """After a broken pipe: keep the interpreter from failing once more when it flushes stdout at the end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argparse type from a function that raises ValueError: its text becomes the usage error."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def say(text: str) -> None:
    """A word to the user."""
    print(f"snapengine: {one_line(text)}", file=sys.stderr)


def print_json(value: Any, file: TextIO | None = None) -> None:
    """`value` as indented JSON, to stdout unless told otherwise."""
    print(json.dumps(value, indent=2, ensure_ascii=False), file=file or sys.stdout)


def console(file: TextIO | None = None) -> Console:
    """A rich console that prints text as it is: no markup, no colouring of numbers.

    It is always wide enough for our widest table: a narrow terminal wraps lines, and no figure is cut.
    """
    return Console(file=file or sys.stdout, markup=False, highlight=False, emoji=False, width=200)

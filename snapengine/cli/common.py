"""What the subcommands share: clean interruption, a limit of time, argument types."""

from __future__ import annotations

import argparse
import contextlib
import errno
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from snapengine.cli.signals import SIGNALS
from snapengine.report import streams
from snapengine.report.terminal import EXIT_TIMEOUT, say


class Interrupted(KeyboardInterrupt):
    """A signal that ends the command. A KeyboardInterrupt, so that no `except Exception` swallows it."""

    def __init__(self, signum: int, text: str = "") -> None:
        self.signal = signal.Signals(signum)
        super().__init__(text or f"cancelled by {self.signal.name}")

    @property
    def exit_code(self) -> int:
        """The shell's code for an end by this signal; that of timeout(1) if --timeout is over."""
        return EXIT_TIMEOUT if self.signal == signal.SIGALRM else 128 + self.signal


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn the first of `SIGNALS` into `Interrupted`, and ignore those that follow.

    A second Ctrl-C must not interrupt the release of the target. Only SIGKILL does, and then the kernel
    releases it. Outside the main thread Python allows no handlers, and this does nothing.

    Python drops an exception that is raised in a destructor or a callback. It is raised again afterwards.
    """

    def interrupt(signum: int, frame: FrameType | None) -> NoReturn:
        _ignore_all()
        raise Interrupted(signum)

    def raise_again(dropped: sys.UnraisableHookArgs) -> None:
        if isinstance(dropped.exc_value, Interrupted):
            pending.append(dropped.exc_value)
            _raise_soon(dropped.exc_value)
        else:
            hook(dropped)

    pending: list[Interrupted] = []
    hook = sys.unraisablehook
    previous: dict[signal.Signals, Any] = {}
    try:
        sys.unraisablehook = raise_again
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a shell's background job
                previous[number] = signal.signal(number, interrupt)
    except ValueError:
        pass

    def restore() -> None:
        sys.unraisablehook = hook
        if pending:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number in previous:
            signal.signal(number, previous[number])

    try:
        yield
    finally:
        try:
            restore()
        except Interrupted:  # raised again just here: the timer fires once, so not a second time
            restore()
            raise


def _raise_soon(error: Interrupted) -> None:
    """With a delay: the code that drops exceptions has not returned yet."""

    def again(signum: int, frame: FrameType | None) -> NoReturn:
        raise error

    signal.signal(signal.SIGALRM, again)
    signal.setitimer(signal.ITIMER_REAL, 0.01)


@contextlib.contextmanager
def limit_time(seconds: float | None) -> Iterator[None]:
    """Interrupt the block like a Ctrl-C after so many seconds (None: never)."""

    def expire(signum: int, frame: FrameType | None) -> NoReturn:
        _ignore_all()
        raise Interrupted(signum, f"error: not done within {seconds:g} s (--timeout)")

    if seconds is None:
        yield
        return
    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def end_of_limit() -> None:
    """The awaited state is reached: --timeout no longer applies."""
    signal.setitimer(signal.ITIMER_REAL, 0)


def _ignore_all() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def argument(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argparse type from a function that raises ValueError: its text becomes the usage error."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def add_timeout(parser: argparse.ArgumentParser, what: str = "give up, and release the target,") -> None:
    """Add --timeout, which `limit_time` is given."""
    from snapengine.base.units import parse_seconds

    parser.add_argument("--timeout", type=argument(parse_seconds), metavar="SECONDS",
        help=f"{what} after so long (default: no limit); exit code {EXIT_TIMEOUT}",
    )  # fmt: skip


def check_output(spec: str) -> None:
    """Raise SinkError for a closed standard stream: output to it would be lost."""
    from snapengine.errors import SinkError

    fd = {"-": 1, "fd:1": 1, "fd:2": 2}.get(spec)
    if fd in streams.closed:
        raise SinkError(errno.EBADF, f"{spec}: standard {'output' if fd == 1 else 'error'} is closed")


def after_the_image(print_it: Callable[[], None]) -> None:
    """Print the figures of a complete image. A failure of this output (no reader, a full disk, an interrupt)
    does not change that the image is complete."""
    try:
        print_it()
        sys.stdout.flush()
    except BrokenPipeError:
        streams.silence(sys.stdout)
    except OSError as error:
        streams.silence(sys.stdout)
        say(f"warning: the image is complete, but its figures cannot be printed: {error.strerror or error}")
    except Interrupted as stop:
        streams.silence(sys.stdout)
        say(f"the image is complete; its figures are not ({stop})")

"""An asyncio loop on its own thread. Callers may be interrupted (Ctrl-C) while they wait for it.

Only that thread creates, runs and closes the loop, and no signal handler raises there. Callers use only the
loop's `call_soon_threadsafe`. An exception inside that call may leave the callback queued while the loop
sleeps, until the next such call; `close` makes one.

Callers wait with `snapengine.base.latch`. The futures of `concurrent.futures` contain a Condition: an
exception during a wait would leave it locked, and the loop, which notifies it, would block for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from snapengine.base.latch import Latch
from snapengine.base.workers import Workers

Value = TypeVar("Value")


class Future(Generic[Value]):
    """The result of some work. The loop's thread fills it; another thread waits for it and takes it once."""

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None  # used by the loop's thread only
        self._filled = Latch()
        self._values: list[Value] = []
        self._errors: list[BaseException] = []

    async def fill(self, work: Callable[[], Coroutine[Any, Any, Value]]) -> None:
        """Do the work and store its result."""
        try:
            self._values.append(await work())
        except BaseException as error:
            self._errors.append(error)
        finally:
            self._filled.set()

    def is_filled(self, seconds: float) -> bool:
        """Wait up to `seconds`; return whether the result is available."""
        return self._filled.wait(seconds)

    def take(self) -> Value:
        """Return the value, or raise the exception that ended the work."""
        if self._errors:
            raise self._errors.pop()  # pop: its traceback refers to this list, which would be a cycle
        return self._values.pop()


class _Loop(asyncio.SelectorEventLoop):
    """A loop that its thread closes. `__del__` does nothing: asyncio's raises if the constructor failed."""

    def __del__(self) -> None:
        return


def _new_loop() -> _Loop:
    """Create a loop. Raises OSError without free descriptors, and closes those already opened."""
    selector = selectors.DefaultSelector()
    try:
        return _Loop(selector)
    except OSError:
        selector.close()
        raise


class LoopThread:
    """A loop and its thread. Call `start`, then `close`, even if `start` failed."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._errors: list[OSError] = []
        self._ready = Latch()
        self._tasks: set[asyncio.Task[None]] = set()  # used by the loop's thread only
        self._thread = Workers()  # one thread

    def start(self, name: str) -> None:
        """Create the loop and run it. Raises OSError if it cannot be created."""
        self._thread.start(name, self._serve)
        self._ready.wait()
        if self._errors:
            raise self._errors.pop()  # pop: see `Future.take`

    @property
    def runs(self) -> bool:
        """Whether the loop was created."""
        return self._loop is not None

    def _serve(self) -> None:
        try:
            loop = self._loop = _new_loop()
        except OSError as error:
            self._errors.append(error)
            return
        finally:
            self._ready.set()
        try:
            loop.run_forever()
        finally:
            loop.close()

    def begin(self, work: Callable[[], Coroutine[Any, Any, Value]]) -> Future[Value]:
        """Start the work on the loop. Raises RuntimeError if the loop is closed."""
        assert self._loop is not None
        future: Future[Value] = Future()
        self._loop.call_soon_threadsafe(self._begin, self._loop, future, work)
        return future

    def _begin(
        self,
        loop: asyncio.AbstractEventLoop,
        future: Future[Value],
        work: Callable[[], Coroutine[Any, Any, Value]],
    ) -> None:
        future.task = loop.create_task(future.fill(work))
        self._tasks.add(future.task)
        future.task.add_done_callback(self._tasks.discard)

    def cancel(self, future: Future[Any]) -> None:
        """Cancel work whose result is not needed any more."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(lambda: future.task is not None and future.task.cancel())

    async def cancel_others(self) -> None:
        """Cancel all other work. Runs on the loop."""
        others = self._tasks - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def close(self) -> None:
        """End the loop and its thread. Idempotent."""
        if self._thread.close():
            self._ready.wait()
            self.end()
        self._thread.wait()

    def end(self) -> None:
        """Stop the loop without waiting for its thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._loop.stop)

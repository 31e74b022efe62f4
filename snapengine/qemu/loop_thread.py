"""An asyncio loop on its own thread, for callers that an interrupt (Ctrl-C) may hit while they wait.

Only that thread creates, runs and closes the loop; no signal handler raises there. Callers use only
`call_soon_threadsafe` of it. An exception inside that call may leave the callback in the queue while the loop
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
from snapengine.base.workers import Crew

Value = TypeVar("Value")


class Answer(Generic[Value]):
    """The result of some work. The loop's thread fills it; another thread waits for it and takes it once."""

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None  # the loop's thread's alone
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
        """Whether it is filled within `seconds`."""
        return self._filled.wait(seconds)

    def take(self) -> Value:
        """The value. Raises what the work raised; `asyncio.CancelledError`."""
        if self._errors:
            raise self._errors.pop()  # if it stayed in the list, it would be in a cycle with its traceback
        return self._values.pop()


class _Loop(asyncio.SelectorEventLoop):
    """Its thread closes it, so `__del__` does nothing: asyncio's raises if the constructor failed."""

    def __del__(self) -> None:
        return


def _made() -> _Loop:
    """A new loop. OSError: no free descriptors; those already opened are closed."""
    selector = selectors.DefaultSelector()
    try:
        return _Loop(selector)
    except OSError:
        selector.close()
        raise


class LoopThread:
    """A loop. `start` it, and `close` it even if that failed."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._errors: list[OSError] = []
        self._ready = Latch()
        self._tasks: set[asyncio.Task[None]] = set()  # the loop's thread's alone
        self._thread = Crew()  # of one

    def start(self, name: str) -> None:
        """Create the loop and run it. OSError: it cannot be created."""
        self._thread.start(name, self._serve)
        self._ready.wait()
        if self._errors:
            raise self._errors.pop()  # pop: the traceback of a half-made loop would make a cycle

    @property
    def runs(self) -> bool:
        """Whether the loop was created."""
        return self._loop is not None

    def _serve(self) -> None:
        try:
            loop = self._loop = _made()
        except OSError as error:
            self._errors.append(error)
            return
        finally:
            self._ready.set()
        try:
            loop.run_forever()
        finally:
            loop.close()

    def begin(self, work: Callable[[], Coroutine[Any, Any, Value]]) -> Answer[Value]:
        """Start the work on the loop. RuntimeError: the loop is closed."""
        assert self._loop is not None
        answer: Answer[Value] = Answer()
        self._loop.call_soon_threadsafe(self._begin, self._loop, answer, work)
        return answer

    def _begin(
        self,
        loop: asyncio.AbstractEventLoop,
        answer: Answer[Value],
        work: Callable[[], Coroutine[Any, Any, Value]],
    ) -> None:
        answer.task = loop.create_task(answer.fill(work))
        self._tasks.add(answer.task)
        answer.task.add_done_callback(self._tasks.discard)

    def cancel(self, answer: Answer[Any]) -> None:
        """Cancel work that nobody waits for any more."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(lambda: answer.task is not None and answer.task.cancel())

    async def cancel_others(self) -> None:
        """On the loop: cancel all other work."""
        others = self._tasks - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def close(self) -> None:
        """End the loop and its thread. Idempotent."""
        if self._thread.dismiss():
            self._ready.wait()
            self.end()
        self._thread.wait()

    def end(self) -> None:
        """Stop the loop, without waiting for its end."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it is closed
                self._loop.call_soon_threadsafe(self._loop.stop)

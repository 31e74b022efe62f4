from typing import Protocol

from snapengine.base.latch import Latch
from snapengine.engine.session import Session

class Pausable(Protocol):
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def vmstate(self) -> dict[str, bytes]: ...


class DirtyLog:
    def __init__(self, session: Session) -> None: ...
    @property
    def session(self) -> Session: ...
    def run(
        self,
        target: Pausable,
        downtime_limit: float,
        max_rounds: int,
        max_seconds: float,
        wanted: Latch | None = None,
    ) -> tuple[int, dict[str, bytes] | None]: ...
    def release(self) -> None: ...

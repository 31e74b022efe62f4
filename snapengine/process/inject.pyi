import os
from typing import NamedTuple

from snapengine.process.permissions import ProcessInfo

class Injected(NamedTuple):
    fd: int
    stop_ns: int
    tid: int

def inject_userfaultfd(
    pid: int,
    *,
    device: str | os.PathLike[str] | None = None,
    deadline: float = 1.0,
    info: ProcessInfo | None = None,
    _repair: bool = True,
) -> Injected: ...

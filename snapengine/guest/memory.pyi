from types import TracebackType

from snapengine.guest.params import GuestParams

class GuestMemory:
    params: GuestParams
    addr: int
    length: int
    memfd: int
    def __init__(self, params: GuestParams) -> None: ...
    def close(self) -> None: ...
    def __enter__(self) -> GuestMemory: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

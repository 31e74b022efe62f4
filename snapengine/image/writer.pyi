from collections.abc import Sequence
from typing import Any

from snapengine.regions import Region
from snapengine.storage.sinks import Sink

class Writer:
    sink: Sink
    image_bytes: int
    chunks: int
    vmstate_parts: int
    image_id: bytes
    parent_id: bytes
    def __init__(
        self,
        sink: Sink,
        *,
        image_id: bytes | None = None,
        parent_id: bytes | None = None,
        rate_limit: int = 0,
    ) -> None: ...
    def begin(self, regions: Sequence[tuple[Region, int]]) -> None: ...
    def py_chunk(
        self, entries: Sequence[tuple[int, int, int]], data: Any = b"", *, level: int | None = None
    ) -> None: ...
    def vmstate(self, name: str, blob_or_file: Any, level: int | None = None) -> None: ...
    def finish(self, stats: dict[str, Any]) -> int: ...
    def cancel(self) -> None: ...

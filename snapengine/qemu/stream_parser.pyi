HEAD_MAX_BYTES: int
TAIL_MAX_BYTES: int
RAM_MAX_BYTES: int

class StreamParser:
    name: str
    offset: int
    head: bytes
    tail: bytes
    machine_type: str | None
    domain_xml: bytes | None
    section_id: int
    has_end: bool
    total_pages: int
    pages: int
    zeros: int
    def __init__(self, source: int | bytes, *, name: str = "stream") -> None: ...
    def cancel(self) -> None: ...
    @property
    def ram_blocks(self) -> list[tuple[str, int]]: ...
    def read_head(self) -> None: ...
    def read_pages(self) -> None: ...
    def read_tail(self) -> None: ...

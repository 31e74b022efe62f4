from snapengine.image.writer import Writer
from snapengine.pipeline.pool import Pool

class Encoder:
    def __init__(
        self,
        pool: Pool,
        writer: Writer,
        level: int | None,
        threads: int,
        *,
        store_raw: str = "writers",
        follow_sink: bool = False,
    ) -> None: ...
    @property
    def writer(self) -> Writer: ...
    @property
    def level(self) -> int | None: ...
    @property
    def raw_chunks(self) -> int: ...
    @property
    def compressed_chunks(self) -> int: ...
    @property
    def scratch_bytes(self) -> int: ...
    def run(self, number: int) -> None: ...

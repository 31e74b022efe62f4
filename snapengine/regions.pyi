from dataclasses import dataclass

@dataclass(frozen=True)
class Region:
    name: str
    addr: int
    length: int
    page_size: int = 4096
    kind: str = "anon"
    memfd: int = -1
    memfd_offset: int = 0
    zero_inode: int = 0

@dataclass
class RegionPlan:
    region: Region
    addr: int
    pages: int
    first_page: int
    unit_pages: int
    track_start: int
    track_end: int
    source: int = 0
    file: int = -1
    file_offset: int = 0
    reading: str = "memory"
    presence: str = "bits"
    shared: bool = False
    missing: bool = False
    sparse: bool = False
    check: bool = False
    own: bool = False
    shadow: int = 0
    alone_before: bool = False
    alone_after: bool = False
    follows: bool = False
    keep_huge: bool = False

PAGE_BYTES: int
KINDS: tuple[str, ...]

def kind_of(page_bytes: int, shared: bool) -> str: ...
def is_shared(kind: str) -> bool: ...
def any_shared(regions: list[Region]) -> bool: ...
def total_bytes(regions: list[Region]) -> int: ...

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from snapengine.kernel.procmaps_line import Mapping
from snapengine.process.copied import Way
from snapengine.regions import Region

@dataclass
class Fate:
    mapping: Mapping
    action: Literal["track", "copy", "leave"]
    reason: str = ""
    name: str = ""
    kind: str = "anon"
    page_size: int = 4096
    way: Way = "populated"
    cost: int = 0
    whole: bool = False
    zero_inode: int = 0
    def leave_out(self, reason: str) -> None: ...

class Sorter(Protocol):
    asked: int
    def fate(self, mapping: Mapping) -> Fate: ...

def sort_mappings(mappings: Iterable[Mapping], sorter: Sorter, refused: dict[int, int]) -> list[Fate]: ...
def tracked_regions(fates: list[Fate]) -> tuple[list[Region], bool]: ...
def region_name(fate: Fate) -> str: ...

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from snapengine.kernel.procmaps_line import Mapping
from snapengine.process.copied import Way
from snapengine.regions import Region

@dataclass
class Decision:
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

class Decider(Protocol):
    asked: int
    def decide(self, mapping: Mapping) -> Decision: ...

def decide_all(mappings: Iterable[Mapping], decider: Decider, refused: dict[int, int]) -> list[Decision]: ...
def tracked_regions(decisions: list[Decision]) -> tuple[list[Region], bool]: ...
def region_name(decision: Decision) -> str: ...

from collections.abc import Sequence
from dataclasses import dataclass

from _typeshed import ReadableBuffer

from snapengine.guest.params import GuestParams

@dataclass(frozen=True)
class CutReport:
    consistent: bool
    violation: str | None
    writes: list[int]
    torn: list[bool]
    written_pages: int
    untouched_hole_pages: int

def check_cut(
    ram: ReadableBuffer, params: GuestParams, counts: Sequence[int] | None = None
) -> CutReport: ...

"""Parameters that determine a guest's memory: its content after any number of writes follows from them.

The guest stores them in its vmstate; `check_image` reads them from there.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from snapengine.regions import PAGE_BYTES

HUGE_BYTES = 2 << 20
MAX_THREADS = 8
BACKINGS = ("anon", "memfd")
PAGES = ("4k", "thp", "2m")
PATTERNS = ("uniform", "hot", "sequential")


@dataclass(frozen=True, slots=True)
class GuestParams:
    """The memory of a guest and the order of its writes (not their rate).

    Raises
    ------
    ValueError
        A field is out of range; the message names it.
    """

    size: int
    """Bytes of RAM: a multiple of 4096, of 2 MiB with ``pages="2m"``."""
    backing: str = "anon"
    """``"anon"`` (private) or ``"memfd"`` (shared)."""
    pages: str = "4k"
    """``"4k"``, ``"thp"`` (transparent huge pages) or ``"2m"`` (hugetlb)."""
    threads: int = 1
    """Writers, 1 ... 8. Writer t owns the pages p with p % threads == t."""
    pattern: str = "uniform"
    """``"uniform"``, ``"hot"`` (only a hot set of `hot_size` bytes) or ``"sequential"``."""
    hot_size: int = 0
    """Bytes of the hot set, over all writers; only for ``"hot"``."""
    zero_percent: int = 0
    """Share of the RAM that is populated and all zeros."""
    hole_percent: int = 0
    """Share of the RAM that is not populated until a writer touches it."""
    incompressible: bool = False
    """Random bytes, instead of content that zstd compresses to a quarter."""
    seed: int = 1
    """0 ... 2**63 - 1."""

    def __post_init__(self) -> None:
        for name in ("size", "threads", "hot_size", "zero_percent", "hole_percent", "seed"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name}: must be an integer")
        if type(self.incompressible) is not bool:
            raise ValueError("incompressible: must be true or false")
        for name, allowed in (("backing", BACKINGS), ("pages", PAGES), ("pattern", PATTERNS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: {getattr(self, name)!r} is none of {', '.join(allowed)}")
        unit = HUGE_BYTES if self.pages == "2m" else PAGE_BYTES
        if self.size <= 0 or self.size % unit or self.size > 1 << 46:
            raise ValueError(f"size: {self.size} is not a positive multiple of {unit}")
        if not 1 <= self.threads <= MAX_THREADS:
            raise ValueError(f"threads: must be in 1 ... {MAX_THREADS}")
        if self.size // PAGE_BYTES < self.threads:
            raise ValueError("size: fewer pages than threads")
        if self.pattern == "hot" and not PAGE_BYTES * self.threads <= self.hot_size <= self.size:
            raise ValueError("hot_size: must be at least one page per thread and at most the size")
        if min(self.zero_percent, self.hole_percent) < 0 or self.zero_percent + self.hole_percent > 100:
            raise ValueError("zero_percent and hole_percent: must not be negative, nor above 100 together")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError("seed: must be in 0 ... 2**63 - 1")

    @property
    def page_count(self) -> int:
        """Pages of 4096 bytes."""
        return self.size // PAGE_BYTES

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> GuestParams:
        """The reverse of `to_json`. ValueError if a field is missing, unknown or out of range."""
        try:
            return cls(**data)
        except TypeError as error:
            raise ValueError(f"guest parameters: {error}") from None

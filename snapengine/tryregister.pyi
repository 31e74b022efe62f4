from .mapline import Mapping
from .region import Region
from .uffd import Uffd

def refusal(uffd: Uffd, maps: int, start: int, end: int) -> int: ...
def refused_regions(
    uffd: Uffd, maps: int, regions: list[Region], mappings: list[Mapping] | None = None
) -> list[Region]: ...

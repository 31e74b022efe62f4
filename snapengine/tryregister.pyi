from snapengine.mapline import Mapping
from snapengine.region import Region
from snapengine.uffd import Uffd

def refusal(uffd: Uffd, maps: int, start: int, end: int) -> int: ...
def refused_regions(
    uffd: Uffd, maps: int, regions: list[Region], mappings: list[Mapping] | None = None
) -> list[Region]: ...

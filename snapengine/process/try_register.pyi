from snapengine.kernel.procmaps_line import Mapping
from snapengine.kernel.uffd import Uffd
from snapengine.regions import Region

def refusal(uffd: Uffd, maps: int, start: int, end: int) -> int: ...
def refused_regions(
    uffd: Uffd, maps: int, regions: list[Region], mappings: list[Mapping] | None = None
) -> list[Region]: ...

from collections.abc import Callable

from snapengine.kernel.procmaps_line import Mapping
from snapengine.regions import Region, RegionPlan

def lay_out(
    regions: list[Region],
    mappings: list[Mapping],
    uncovered: Callable[[Region], list[Mapping]],
    decide: Callable[[RegionPlan, list[Mapping]], None],
) -> list[RegionPlan]: ...
def first_overlap(regions: list[Region]) -> tuple[Region, Region] | None: ...
def first_shared_unit(plans: list[RegionPlan]) -> tuple[RegionPlan, RegionPlan] | None: ...

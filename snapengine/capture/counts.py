"""From the engine's counters to the figures of a capture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from snapengine.capture.region_plan import Plan
from snapengine.engine.session import Session
from snapengine.options import DIRTY_LOGGING


@dataclass(slots=True)
class Extra:
    """Memory that was copied beside the engine: pages by what they hold."""

    bytes: int = 0
    data: int = 0
    zero: int = 0
    hole: int = 0
    lost: int = 0


def figures(session: Session, plan: Plan, method: str, extra: Extra) -> dict[str, Any]:
    """The fields of `Result` that the engine knows."""
    counts = session.counters()
    data, holes = counts["data"] + extra.data, counts["hole"] + extra.hole
    total = session.total_pages + extra.data + extra.zero + extra.hole + extra.lost
    final = data
    zeros = counts["zero"] + extra.zero
    runs = session.lost_runs()
    lost = sum(length for _, length in runs) // 4096 + extra.lost
    if method == DIRTY_LOGGING:
        final = session.final_pages() + extra.data
        zeros = total - final - holes - lost
    return {
        "region_bytes": sum(plan.region.length for plan in plan.regions) + extra.bytes,
        "nonzero_bytes": final * 4096,
        "pages_total": total,
        "pages_saved": data,
        "zero_pages": zeros,
        "hole_pages": holes,
        "duplicate_pages": data - final,
        "faults": counts["faults"],
        "rounds": session.rounds,
        "arm_ns": session.arm_ns,
        "pause_ns": session.pause_ns,
        "arming_faults": counts["arming_faults"],
        "fault_ns": session.fault_ns(),
        "fault_histogram": session.fault_histogram(),
        "spilled_bytes": session.pool.spilled_bytes,
        "lost_pages": lost,
        "lost_runs": runs,
    }

"""Draw what the bench measured: `python bench/plots.py [build/bench.json [build/bench]]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from plot_images import draw_images
from plot_rates import draw_batches, draw_sizes
from plot_stalls import draw_stalls
from plot_work import draw_work

Info = dict[str, Any]


def draw(benches: Sequence[dict[str, Any]], room: Path) -> Iterator[Path]:
    """Draw every picture that there is data for; yields their paths."""
    infos = [bench["extra_info"] for bench in benches]
    images = [bench["extra_info"] for bench in benches if bench["group"] == "images"]
    if images:
        draw_images(images, room / "images.png")
        yield room / "images.png"
    stalls = [info for info in infos if "histograms" in info]
    if stalls:
        draw_stalls(stalls, room / "stalls.png")
        yield room / "stalls.png"
    for info in (info for info in infos if "work" in info):
        draw_work(info, room / "work.png")
        yield room / "work.png"
    for info in (info for info in infos if "by_size" in info):
        draw_sizes(info, room / "sizes.png")
        yield room / "sizes.png"
    floors: dict[str, list[float]] = {}
    for bench in (bench for bench in benches if bench["group"] == "floors"):
        floors.update(bench["extra_info"].get("samples", {}))
    if draw_batches(floors, room / "batches.png"):
        yield room / "batches.png"


def main(source: str = "build/bench.json", directory: str = "build/bench") -> None:
    """The command."""
    room = Path(directory)
    room.mkdir(parents=True, exist_ok=True)
    for path in draw(json.loads(Path(source).read_text())["benchmarks"], room):
        print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])

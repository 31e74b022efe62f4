"""`snapengine qemu analyze`: the contents of a migration stream, and its size as an image."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from snapengine.base.names import printable
from snapengine.base.units import format_count, format_size
from snapengine.cli.common import add_timeout
from snapengine.cli.ingest import opened_stream
from snapengine.report.terminal import EXIT_CODES, EXIT_OK, print_json, raw, say

if TYPE_CHECKING:
    from snapengine.qemu.analyze import Analysis

ANALYZE = """\
Analyze a file that QEMU's `migrate "exec:cat > FILE"` wrote: the sizes of its sections, how often it holds
each page of the RAM, and its size as an image, raw and compressed (made for this purpose and discarded).
"""
ANALYZE_EPILOG = f"""\
examples:
  snapengine qemu analyze vm_state
  snapengine qemu analyze vm_state --compress zstd:9 --plot vm_state.png
  snapengine qemu analyze vm_state --json | jq .times_sent

{EXIT_CODES}
"""
Rows = list[tuple[str, str]]


def add_analyze(group: argparse._SubParsersAction[Any]) -> None:
    """Add `qemu analyze`."""
    parser = group.add_parser(
        "analyze", help="what is in a migration stream", description=ANALYZE, epilog=ANALYZE_EPILOG,
        formatter_class=raw,
    )  # fmt: skip
    add = parser.add_argument
    add("stream", metavar="FILE", help="the stream: a file, or - for standard input")
    add("--compress", default="zstd", metavar="zstd[:LEVEL]", help="of the second image (default zstd)")
    add("--spill-dir", metavar="DIR", help="room for all pages that are not zero (default: $TMPDIR)")
    add("--json", action="store_true", help="print a JSON object")
    add_timeout(parser, "give up")
    add("--plot", metavar="OUT", help="draw histogram and sizes (PNG, SVG, PDF)")
    parser.set_defaults(run=run_analyze, parser=parser)


def run_analyze(args: argparse.Namespace) -> int:
    """`qemu analyze`."""
    from snapengine.options import Options
    from snapengine.qemu.analyze import analyze
    from snapengine.report.plots import check_plot

    try:
        Options(compress=args.compress)
    except ValueError as error:
        args.parser.error(str(error))
    if args.plot:
        check_plot(args.plot)
    name = "standard input" if args.stream == "-" else args.stream
    with opened_stream(args.stream) as fd:
        found = analyze(fd, compress=args.compress, spill_dir=args.spill_dir, name=name)
    if args.json:
        print_json(found.to_json())
    else:
        print_analysis(found, name)
    if args.plot:
        from snapengine.report.stream_plot import draw

        draw(found, args.plot)
        say(f"wrote {args.plot}")
    return EXIT_OK


def print_analysis(found: Analysis, name: str) -> None:
    """The figures, the blocks, how often pages came, the sections."""
    from snapengine.report.tables import print_table

    print(f"{printable(name)}: {format_size(found.stream_bytes)}\n")
    print_table(_figures(found))
    blocks = [(name, format_size(used)) for name, used in found.ram_blocks]
    times = [(format_count(times), format_count(pages)) for times, pages in found.times_sent.items()]
    tables = {
        ("RAM block", "size"): blocks,
        ("times sent", "pages"): times,
        ("section", "size"): _sections(found),
    }
    for titles, rows in tables.items():
        print()
        print_table(rows, titles=titles, right=[1])


def _figures(found: Analysis) -> Rows:
    kept = (found.data_pages, "with data"), (found.zero_pages, "zero"), (found.absent_pages, "not in it")
    rows = [
        ("machine", found.machine_type or "not named"),
        ("written by", "migrate" if found.ram_end else "background-snapshot"),
        ("pages", ", ".join(f"{format_count(count)} {what}" for count, what in kept if count)),
        ("records", _records(found)),
    ]
    for way, size in found.image_bytes.items():
        ratio = found.stream_bytes / size
        what = "image" if way == "none" else f"image, {way}"
        rows.append((what, f"{format_size(size)}, the stream is {ratio:.2f} x that"))
    return rows


def _records(found: Analysis) -> str:
    pages, zeros = format_count(found.page_records), format_count(found.zero_records)
    return f"{pages} of pages, {zeros} of zero pages; {format_count(found.duplicate_records)} superseded"


def _sections(found: Analysis) -> Rows:
    rows = [("header, configuration, ram START", found.head_bytes), ("ram", found.ram_bytes)]
    rows += [(f"{d.name}, {d.instance}" if d.instance else d.name, d.size) for d in found.devices]
    rows.append(("EOF, description", found.description_bytes))
    return [(name, format_size(size)) for name, size in rows]

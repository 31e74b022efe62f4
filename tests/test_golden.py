"""The checked-in image of format 1.0 must stay readable for ever, and equal what the writer writes."""

import struct
from pathlib import Path

from image_kit import DATA, HOLE, LOST, ZERO, pattern, stream_everything

from snapengine.image import open_image
from snapengine.image.writer import Writer
from snapengine.regions import Region
from snapengine.storage.sinks import MemorySink

GOLDEN = Path(__file__).with_name("golden") / "v1.snap"


def make() -> bytes:
    """tests/golden/v1.snap was made by ``GOLDEN.write_bytes(make())``, once, and must not be made again.

    zstd is not used: other versions give other bytes. (The only frame is hand-made: a raw block.)
    """
    sink = MemorySink()
    writer = Writer(sink, image_id=bytes(range(16)), parent_id=bytes(range(16, 32)))
    writer.begin(
        [
            (Region("ram", 0x7F0000000000, 8 * 4096), 0),
            (Region("grün", 0x100800, 4096, 4096, "shared"), 16),
            (Region("huge", 0x40000000, 2 << 20, 2 << 20, "hugetlb-shared"), 512),
        ]
    )
    writer.py_chunk([(0, 2, DATA), (2, 1, ZERO), (3, 2, HOLE), (5, 1, LOST), (6, 2, ZERO)], pattern(2, 0))
    writer.vmstate("device", bytes(range(256)))
    writer.py_chunk([(17, 1, DATA), (16, 1, DATA)], pattern(2, 10))
    writer.py_chunk([(512, 511, ZERO), (1023, 1, HOLE), (7, 1, DATA)], pattern(1, 20))
    writer.vmstate("empty", b"")
    writer.finish({"method": "write-tracking", "status": "completed"})
    return sink.getvalue()


def test_the_writer_still_writes_it():
    assert make() == GOLDEN.read_bytes()


def test_it_reads():
    with open_image(GOLDEN) as image:
        assert str(image.id) == "00010203-0405-0607-0809-0a0b0c0d0e0f"
        info = image.info()
        assert info["format"] == "1.0"
        assert info["parent"] == "10111213-1415-1617-1819-1a1b1c1d1e1f"
        assert [(r["name"], r["addr"], r["length"], r["page_size"], r["kind"]) for r in info["regions"]] == [
            ("ram", 0x7F0000000000, 32768, 4096, "anon"),
            ("grün", 0x100800, 4096, 4096, "shared"),
            ("huge", 0x40000000, 2 << 20, 2 << 20, "hugetlb-shared"),
        ]
        assert dict(image.vmstate) == {"device": bytes(range(256)), "empty": b""}
        assert image.read("ram", 0, 5 * 4096) == pattern(2, 0) + bytes(3 * 4096)
        assert image.read("ram", 6 * 4096, 8192) == bytes(4096) + pattern(1, 20)
        assert image.read("grün", 0, 4096) == b"\x0c" * 2048 + b"\x0b" * 2048
        assert image.read("huge", 0, 2 << 20) == bytes(2 << 20)
        report = image.verify()
        assert (report.data_pages, report.zero_pages, report.hole_pages, report.lost_pages) == (5, 513, 3, 1)
        assert report.file_bytes == len(GOLDEN.read_bytes()) == image.stats["image_bytes"]


def test_its_fields_are_where_they_were():
    data = GOLDEN.read_bytes()
    assert struct.unpack_from("<8sHHIQ", data) == (b"\x89SNPE\r\n\x1a", 1, 0, 64, 0)
    assert data[64:68] == b"REGN"
    assert struct.unpack_from("<QQQIHH4s", data, 64 + 48 + 32 + 3) == (
        0x100800, 4096, 16, 4096, 1, 5, "grün".encode()[:4],
    )  # fmt: skip
    assert data[-120:-116] == b"TRLR"
    assert struct.unpack_from("<Q", data, len(data) - 24)[0] == len(data)


def test_it_streams():
    try:
        stream_everything(GOLDEN.read_bytes())
    except ValueError as error:
        assert "lost at capture time" in str(error)  # noqa: PT017
    else:
        raise AssertionError("the lost page was not reported")

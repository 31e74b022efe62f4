"""The writer: records as FORMAT.md defines them, limits, errors, cancellation, rate."""

import errno
import io
import os
import socket
import struct
import threading
import time

import pytest
from image_kit import DATA, HOLE, ZERO, noise, of_type, opened, pattern, records, sample, stream_everything
from waitkit import PATIENCE_S

from snapengine.base.checksum import crc32c_of
from snapengine.errors import CaptureCancelled, SinkError
from snapengine.image.writer import Writer
from snapengine.regions import Region
from snapengine.storage.sinks import ExecSink, FdSink, MemorySink, NullSink, PyFileSink, Sink, open_sink

RAM = Region("ram", 0x10000, 1 << 30)
ID = bytes(range(16))


def begun(sink: Sink, **options) -> Writer:
    writer = Writer(sink, image_id=ID, **options)
    writer.begin([(RAM, 0)])
    return writer


def fill(writer: Writer) -> int:
    writer.py_chunk([(0, 2, DATA), (2, 100, ZERO), (102, 262042, HOLE)], noise(2, 5))
    writer.vmstate("cpu", b"abc")
    return writer.finish({})


def test_the_bytes_are_those_of_the_format():
    data = sample().data
    magic, major, minor, size, features = struct.unpack_from("<8sHHIQ", data)
    assert (magic, major, minor, size, features) == (b"\x89SNPE\r\n\x1a", 1, 0, 64, 0)
    assert struct.unpack_from("<I", data, 60)[0] == crc32c_of(data[:60])
    found = records(data)
    assert [r.type for r in found] == [
        b"REGN", b"CHNK", b"VMST", b"CHNK", b"CHNK", b"VMST", b"VMST", b"STAT", b"INDX", b"TRLR",
    ]  # fmt: skip
    assert [r.seq for r in found] == list(range(10))
    assert [r.arg for r in found if r.type == b"CHNK"] == [0, 1, 2]
    assert [(r.arg, r.last_part) for r in found if r.type == b"VMST"] == [(0, True), (0, False), (1, True)]
    assert struct.unpack("<3Q", found[1].meta) == (1 << 40, 1 << 62 | 2 << 40 | 2, 2 << 62 | 4 << 40 | 5)
    assert [r.encoding for r in found if r.type == b"CHNK"] == [0, 1, 0]
    assert found[-1].end == len(data)
    assert found[-1].stored_bytes == 72


def test_image_bytes_is_exact_and_in_the_stats():
    sink = MemorySink()
    writer = begun(sink)
    writer.py_chunk([(0, 1 << 18, HOLE)])
    stats = {"method": "x", "warnings": ["ä"]}
    total = writer.finish(stats)
    assert total == len(sink.getvalue()) == stats["image_bytes"] == writer.image_bytes
    with opened(sink.getvalue()) as image:
        assert image.stats == {"method": "x", "warnings": ["ä"], "image_bytes": total}


@pytest.mark.parametrize("kind", ["memory", "file", "exec", "socket", "fd", "object", "throttled"])
def test_every_sink_gets_the_same_bytes(kind, tmp_path):
    reference = MemorySink()
    fill(begun(reference))
    path = tmp_path / "image"
    if kind == "socket":
        ours, theirs = socket.socketpair()
        with ours, theirs:
            sink = FdSink(ours.fileno())
            assert fill(begun(sink)) == len(reference.getvalue())
            assert theirs.recv(1 << 20) == reference.getvalue()
            sink.commit()
        return
    with open(path, "wb") if kind in ("fd", "object") else io.BytesIO() as file:
        sink = {
            "memory": MemorySink,
            "throttled": MemorySink,
            "file": lambda: open_sink(path),
            "exec": lambda: ExecSink(f"cat > {path}"),
            "fd": lambda: FdSink(file.fileno()),
            "object": lambda: PyFileSink(file),
        }[kind]()
        options = {"rate_limit": 1 << 20} if kind == "throttled" else {}
        assert fill(begun(sink, **options)) == len(reference.getvalue())
        sink.commit()
    data = sink.getvalue() if isinstance(sink, MemorySink) else path.read_bytes()
    assert data == reference.getvalue()


def test_many_regions_make_several_parts():
    sink = MemorySink()
    writer = Writer(sink)
    regions = [(Region(f"{n:05}" + "x" * 95, n << 20, 4096), n) for n in range(20000)]
    writer.begin(regions)
    writer.py_chunk([(0, 20000, HOLE)])
    writer.finish({})
    parts = [r for r in records(sink.getvalue()) if r.type == b"REGN"]
    assert [r.last_part for r in parts] == [False, False, True]
    assert max(r.raw_bytes for r in parts) <= 1 << 20
    with opened(sink.getvalue()) as image:
        assert [(r.name, r.addr) for r in image.regions] == [(r.name, r.addr) for r, _ in regions]


def test_a_long_index_makes_several_parts():
    sink = MemorySink()
    writer = begun(sink)
    for page in range(30000):
        writer.py_chunk([(page, 1, HOLE)])
    writer.finish({})
    parts = [r for r in records(sink.getvalue()) if r.type == b"INDX"]
    assert [r.arg for r in parts] == [26214, 3786]
    with opened(sink.getvalue()) as image:
        assert image.index.count == 30000
        assert list(image.resolve(image.regions[0], 0, 30000 * 4096)) == [(0, 30000, HOLE)]


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20])
@pytest.mark.parametrize("level", [None, 1])
def test_vmstate_from_bytes_and_from_files(size, level):
    class Dribble(io.BytesIO):
        def read(self, count=-1):
            return super().read(min(count, 70001))

    blob = pattern(size // 4096 + 1, 1)[:size]
    sink = MemorySink()
    writer = begun(sink)
    writer.vmstate("bytes", memoryview(blob), level)
    writer.vmstate("file", Dribble(blob), level)
    writer.finish({})
    with opened(sink.getvalue()) as image:
        assert image.vmstate["bytes"] == image.vmstate["file"] == blob
    assert (of_type(sink.getvalue(), b"VMST").encoding == 1) == (level is not None and size > 100)


def test_what_does_not_shrink_is_stored_raw():
    sink = MemorySink()
    writer = begun(sink)
    writer.py_chunk([(0, 4, DATA)], noise(4, 1), level=1)
    writer.finish({})
    assert of_type(sink.getvalue(), b"CHNK").encoding == 0


@pytest.mark.parametrize(
    ("entries", "data", "text"),
    [
        ([], b"", "page map is empty"),
        ([(0, 1, DATA)], b"", "raw_bytes"),
        ([(0, 1, ZERO)], bytes(4096), "raw_bytes"),
        ([(0, 1025, DATA)], bytes(1025 * 4096), "4 MiB"),
        ([(0, 0, ZERO)], b"", "out of range"),
        ([(0, (1 << 22) + 1, ZERO)], b"", "out of range"),
        ([((1 << 40) - 1, 2, ZERO)], b"", "out of range"),
        ([(0, 1, 4)], b"", "out of range"),
        ([(n, 1, ZERO) for n in range(32769)], b"", "too long"),
    ],
)
def test_a_malformed_chunk_is_refused_and_the_image_goes_on(entries, data, text):
    sink = MemorySink()
    writer = begun(sink)
    with pytest.raises(ValueError, match=text):
        writer.py_chunk(entries, data)
    writer.py_chunk([(0, 1 << 18, HOLE)])
    writer.finish({})
    with opened(sink.getvalue()) as image:
        assert image.verify().hole_pages == 1 << 18


@pytest.mark.parametrize(
    ("regions", "text"),
    [
        ([(Region("a", 0, 8192), 0), (Region("b", 8192, 4096), 1)], "share page number 1"),
        ([(Region("a", 1, 4096), 0), (Region("b", 8192, 4096), 1)], "share page number 1"),
        ([(Region("a", 0, 0), 0)], "empty"),
        ([(Region("a", (1 << 64) - 4096, 8192), 0)], "address space"),
        ([(Region("a", 0, 8192), (1 << 40) - 1)], "2\\^40"),
        ([(Region("a" * 4097, 0, 4096), 0)], "longer"),
        ([(Region("a", 0, 4096, 4096, "stack"), 0)], "none of anon"),
    ],
)
def test_malformed_regions_are_refused(regions, text):
    sink = MemorySink()
    with pytest.raises(ValueError, match=text):
        Writer(sink).begin(regions)
    assert sink.getvalue() == b""


def test_calls_out_of_order_are_refused():
    writer = Writer(NullSink())
    calls = (
        lambda: writer.py_chunk([(0, 1, HOLE)]),
        lambda: writer.finish({}),
        lambda: writer.vmstate("a", b""),
    )
    for call in calls:
        with pytest.raises(ValueError, match="not begun"):
            call()
    writer.begin([(RAM, 0)])
    with pytest.raises(ValueError, match="already begun"):
        writer.begin([(RAM, 0)])
    writer.vmstate("a", b"")
    for name in ("a", "", "x" * 4097):
        with pytest.raises(ValueError, match="empty, too long or taken"):
            writer.vmstate(name, b"")
    writer.finish({})
    with pytest.raises(ValueError, match="finished"):
        writer.py_chunk([(0, 1, HOLE)])
    with pytest.raises(ValueError, match="16 bytes"):
        Writer(NullSink(), image_id=b"short")


def test_a_full_disk_says_so_and_stays_so():
    with open("/dev/full", "wb", buffering=0) as full:
        sink = FdSink(full.fileno(), "image.snap")
        for _ in range(2):
            writer = Writer(sink)
            with pytest.raises(SinkError, match=r"image\.snap: No space left on device") as caught:
                writer.begin([(RAM, 0)])
            assert caught.value.errno == errno.ENOSPC
            with pytest.raises(SinkError, match="No space left"):
                writer.finish({})
        sink.abort()


def test_a_command_that_stops_reading_says_so():
    sink = ExecSink("exit 3")
    writer = Writer(sink)
    with pytest.raises(SinkError, match=r"stopped reading \(exit status 3\)") as caught:  # noqa: PT012
        writer.begin([(RAM, 0)])
        for page in range(0, 1 << 12, 512):
            writer.py_chunk([(page, 512, DATA)], bytes(512 * 4096))
    assert caught.value.errno == errno.EPIPE
    sink.abort()
    with pytest.raises(SinkError, match="stopped reading"):
        writer.vmstate("a", b"")


def test_an_error_of_a_python_sink_ends_the_image():
    class Broken(io.RawIOBase):
        def write(self, data):
            raise OSError(errno.EDQUOT, "quota")

    writer = Writer(PyFileSink(Broken()))
    with pytest.raises(SinkError, match="quota"):
        writer.begin([(RAM, 0)])
    with pytest.raises(SinkError, match="Broken") as caught:
        writer.finish({})
    assert caught.value.errno == errno.EDQUOT


def blocked_sinks():
    read_end, write_end = os.pipe()
    yield "pipe", FdSink(write_end), [read_end, write_end]
    ours, theirs = socket.socketpair()
    yield "socket", FdSink(ours.fileno()), [ours.detach(), theirs.detach()]
    read_end, write_end = os.pipe()
    polled = FdSink(write_end)
    os.set_blocking(polled.fd, True)  # as if the pipe could not be reopened
    yield "polled", polled, [read_end, write_end]


def test_cancel_stops_a_blocked_write():
    for name, sink, fds in blocked_sinks():
        writer = begun(sink)
        timer = threading.Timer(0.05, writer.cancel)
        timer.start()
        with pytest.raises(CaptureCancelled, match="cancelled"):  # noqa: PT012
            for _ in range(100):
                writer.py_chunk([(0, 1024, DATA)], bytes(4 << 20))
            pytest.fail(name)
        timer.join()
        with pytest.raises(CaptureCancelled):
            writer.finish({})
        sink.abort()
        for fd in fds:
            os.close(fd)


def test_cancel_stops_a_throttled_write():
    writer = begun(NullSink(), rate_limit=1000)
    timer = threading.Timer(0.05, writer.cancel)
    timer.start()
    start = time.monotonic()
    with pytest.raises(CaptureCancelled):
        writer.py_chunk([(0, 1024, DATA)], bytes(4 << 20))  # it would take more than an hour
    assert time.monotonic() - start < PATIENCE_S
    timer.join()


@pytest.mark.parametrize("sink", [NullSink, MemorySink])
def test_the_rate_limit_holds(sink):
    writer = begun(sink(), rate_limit=40_000_000)
    start = time.monotonic()
    for page in range(0, 2048, 256):
        writer.py_chunk([(page, 256, DATA)], bytes(1 << 20))
    seconds = time.monotonic() - start
    assert seconds >= (8 << 20) / 40_000_000 - 0.06  # the token bucket holds 50 ms


def test_too_many_lost_runs_are_truncated_with_a_warning():
    sink = MemorySink()
    writer = begun(sink)
    writer.py_chunk([(0, 1 << 18, HOLE)])
    writer.finish({"lost_runs": [(n << 12, 4096) for n in range(300_000)], "warnings": ["first"]})
    with opened(sink.getvalue()) as image:
        stats = image.stats
    assert 50_000 < len(stats["lost_runs"]) < 300_000
    assert stats["warnings"][0] == "first"
    assert "truncated" in stats["warnings"][1]


@pytest.mark.parametrize("name", ["r", "r" * 7, "r" * 64])
@pytest.mark.parametrize("pages", [1, 15, 16, 200])
def test_large_raw_payloads_are_aligned(name, pages):
    """They begin at multiples of 64 bytes in the file, by means of padding records that any reader skips."""
    sink = MemorySink()
    writer = Writer(sink, image_id=ID)
    writer.begin([(Region(name, 0, 4096 * 1024), 0)])
    data = noise(pages, 7)
    for first in (0, 300, 600):
        writer.py_chunk([(first, pages, DATA), (first + pages, 300 - pages, ZERO)], data)
    writer.py_chunk([(900, 124, ZERO)])
    writer.finish({})
    image = sink.getvalue()
    chunks = [record for record in records(image) if record.type == b"CHNK"]
    padding = [record for record in records(image) if record.type == b"PADD"]
    places = [record.payload_offset % 64 for record in chunks[:3]]
    if pages < 16:
        assert padding == []
    else:
        assert places == [0, 0, 0]
        assert padding
        assert all(record.meta == bytes(len(record.meta)) and len(record.meta) < 64 for record in padding)
    stream_everything(image)
    with opened(image) as read:
        read.verify()
        assert read.read(name, 300 * 4096, len(data)) == data

"""Conversion of streams to images and back: the memory is correct, and a failure leaves no file."""

import contextlib
import json
import os
import random
import subprocess
import sys
import threading

import pytest
import streamkit as kit
from hypothesis import given, settings
from hypothesis import strategies as st
from waitkit import PATIENCE_S, until

import snapengine
from snapengine.errors import (
    CorruptImageError,
    ImageError,
    LostPagesError,
    SinkError,
    StreamError,
    UnsupportedVersionError,
)
from snapengine.image.encode import DATA, HOLE, LOST, ZERO
from snapengine.image.writer import Writer
from snapengine.options import Options
from snapengine.qemu.blobs import DOMAIN_XML, machine_of
from snapengine.qemu.from_stream import ingest
from snapengine.qemu.to_stream import SMALL_BLOCK_BYTES, make_head, stream_blobs, write_stream
from snapengine.regions import Region
from snapengine.storage.sinks import MemorySink

NAMES = {name: used // 4096 for name, used in kit.BLOCKS}


@contextlib.contextmanager
def readable(data):
    """Yield a descriptor of a file with these bytes."""
    with open(os.memfd_create("stream"), "w+b") as file:
        file.write(data)
        file.seek(0)
        yield file.fileno()


def take_in(data, sink, *, options=None, **how):
    with readable(data) as fd:
        return ingest(fd, sink, options, **how)


def memory_of(image):
    return {region.name: image.read(region, 0, region.length) for region in image.regions}


def check(image, result, pages, data):
    """Check the image and its statistics against the stream `data` with these pages."""
    image.verify()
    assert memory_of(image) == kit.memory_of(pages)
    assert stream_blobs(image) == (kit.head(), kit.tail())
    last = {(block, number): data for block, number, data in pages}
    nonzero = sum(data not in (None, kit.ZEROS) for data in last.values())
    assert result.nonzero_bytes == nonzero * 4096
    assert result.zero_pages == len(last) - nonzero
    assert result.hole_pages == 68 - len(last)
    kept = result.pages_saved - result.duplicate_pages + result.zero_pages + result.hole_pages
    assert result.pages_total == kept == 68
    assert image.stats == result.to_json()
    machine = json.loads(image.vmstate["qemu.machine"])
    assert machine["machine_type"] == kit.MACHINE
    assert machine["ram_blocks"] == [{"name": name, "used": used} for name, used in kit.BLOCKS]
    assert machine["stream"]["bytes"] == len(data)
    assert machine["stream"]["repeated"] == len(pages) - len(last)


@st.composite
def page_lists(draw):
    pages = []
    for _ in range(draw(st.integers(0, 60))):
        block = draw(st.sampled_from(list(NAMES)))
        number = draw(st.integers(0, NAMES[block] - 1))
        other = kit.filled(draw(st.integers(0, 99)))
        data = draw(st.sampled_from([None, kit.ZEROS, kit.filled(number), other]))
        pages.append((block, number, data))
    return pages


@settings(max_examples=60, deadline=None)
@given(pages=page_lists(), direct=st.booleans(), end=st.booleans(), zstd=st.booleans())
def test_any_order_and_repetition(tmp_path_factory, pages, direct, end, zstd):
    path = tmp_path_factory.mktemp("image") / "vm"
    data = kit.stream(pages, end=end)
    options = Options(compress="zstd" if zstd else "none")
    result = take_in(data, path, options=options, direct=direct)
    assert result.method == ("write-tracking" if direct or not end else "dirty-logging")
    with snapengine.open_image(path) as image:
        check(image, result, pages, data)
        assert direct or image.index.data_pages() * 4096 == result.nonzero_bytes  # each page once


def many_pages(count, seed=1):
    """Return 2 * `count` records of random pages in a block of `count` pages, some of them zero."""
    dice = random.Random(seed)
    return [
        ("pc.ram", dice.randrange(count), dice.choice([None, kit.filled(n), dice.randbytes(4096)]))
        for n in range(2 * count)
    ]


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("compress", ["none", "zstd"])
def test_more_than_the_buffers_hold(tmp_path, direct, compress):
    pages = many_pages(6000)
    blocks = [("pc.ram", 6000 * 4096)]
    options = Options(memory_limit=16 << 20, compress=compress, spill_dir=str(tmp_path))
    result = take_in(kit.stream(pages, blocks=blocks), tmp_path / "vm", options=options, direct=direct)
    assert (result.duplicate_pages > 0) == direct
    assert (result.spilled_bytes > 0) != direct
    assert result.peak_buffer_bytes <= 16 << 20 or compress == "zstd"
    with snapengine.open_image(tmp_path / "vm") as image:
        image.verify()
        assert memory_of(image) == kit.memory_of(pages, blocks)
    assert os.listdir(tmp_path) == ["vm"]  # the spool file is unnamed


def test_extra_blobs(tmp_path):
    extra = {"a": b"1", "qemu.machine": b'{"via": "background-snapshot", "cpu": "max"}'}
    take_in(kit.stream(kit.SOME_PAGES), tmp_path / "vm", extra_blobs=extra)
    with snapengine.open_image(tmp_path / "vm") as image:
        machine = json.loads(image.vmstate["qemu.machine"])
        assert image.vmstate["a"] == b"1"
    assert (machine["version"], machine["via"], machine["cpu"]) == (1, "background-snapshot", "max")
    with pytest.raises(ValueError, match="head"):
        take_in(b"", tmp_path / "no", extra_blobs={"qemu.stream.head": b""})
    with pytest.raises(ValueError, match="object"):
        take_in(b"", tmp_path / "no", extra_blobs={"qemu.machine": b"[]"})


def test_the_description_of_a_machine(tmp_path):
    take_in(kit.stream(kit.SOME_PAGES), tmp_path / "vm", extra_blobs={"qemu.machine": b'{"cpu": "max"}'})
    with snapengine.open_image(tmp_path / "vm") as image:
        assert machine_of(image)["cpu"] == "max"
    with image_with([], [(Region("a", 0, 4096), 0)]) as image:
        assert machine_of(image) is None


GOOD = '"via": "x", "machine_type": null, "ram_blocks": []'
WRONG = {
    "": CorruptImageError, "[]": CorruptImageError, "{": CorruptImageError, "\udcff": CorruptImageError,
    "[" * 100_000: CorruptImageError, "{}": UnsupportedVersionError,
    f'{{"version": 2, {GOOD}}}': UnsupportedVersionError,
    '{"version": 1, "via": "x", "machine_type": 3, "ram_blocks": []}': CorruptImageError,
    '{"version": 1, "via": "x", "ram_blocks": [{"name": "a"}]}': CorruptImageError,
    f'{{"version": 1, {GOOD}}}' + " " * (1 << 20): CorruptImageError,
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:30])
def test_a_wrong_description_is_refused(text):
    blob = text.encode("utf-8", "surrogateescape")
    with (
        image_with([], [(Region("a", 0, 4096), 0)], {"qemu.machine": blob}) as image,
        pytest.raises(WRONG[text], match=r"qemu\.machine"),
    ):
        machine_of(image)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("length", [0, 30, 200, 9000, len(kit.stream(kit.SOME_PAGES)) - 1])
def test_a_cut_stream_leaves_nothing(tmp_path, direct, length):
    before = (tmp_path / "vm").write_bytes(b"an older image")
    with pytest.raises(StreamError, match="ends early") as caught:
        take_in(kit.stream(kit.SOME_PAGES)[:length], tmp_path / "vm", direct=direct)
    assert caught.value.offset == length
    assert os.listdir(tmp_path) == ["vm"]
    assert (tmp_path / "vm").stat().st_size == before


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("cookie", [0, len(kit.XML) + 1])
def test_a_save_file_of_libvirt(order, cookie):
    data = kit.libvirt_save(kit.stream(kit.SOME_PAGES), order=order, cookie=cookie)
    with image_of(data) as image:
        assert memory_of(image) == kit.memory_of(kit.SOME_PAGES)
        assert image.vmstate[DOMAIN_XML] == kit.XML
        _, again = regenerated(image)
    assert again.startswith(kit.head())


@pytest.mark.parametrize(("direct", "end", "method"), [
    (False, True, "dirty-logging"), (False, False, "write-tracking"), (True, True, "write-tracking"),
])  # fmt: skip
def test_the_method_is_that_of_the_stream(direct, end, method):
    result = take_in(kit.stream(kit.SOME_PAGES, end=end), MemorySink(), direct=direct)
    assert result.method == method


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("compress", ["none", "zstd"])
def test_a_sink_that_fails_ends_it(direct, compress):
    pages = [("pc.ram", n, random.Random(n).randbytes(4096)) for n in range(10000)]
    data = kit.stream(pages, blocks=[("pc.ram", 10000 * 4096)])
    with pytest.raises(SinkError, match="stopped reading"):
        take_in(data, "exec:head -c 5000000 >/dev/null", direct=direct, options=Options(compress=compress))
    until(lambda: threading.active_count() == 1, "a thread is left")


def test_a_spool_that_cannot_be(tmp_path):
    with pytest.raises(FileNotFoundError):
        take_in(kit.stream([]), tmp_path / "vm", options=Options(spill_dir=str(tmp_path / "none")))
    assert os.listdir(tmp_path) == []


# -- back --


def regenerated(image, **how):
    with open(os.memfd_create("again"), "w+b") as file:
        sent = write_stream(image, file.fileno(), **how)
        assert file.tell() == sent.stream_bytes
        file.seek(0)
        return sent, file.read()


def image_of(data, **how):
    sink = MemorySink()
    take_in(data, sink, **how)
    file = open(os.memfd_create("image"), "w+b")  # noqa: SIM115
    file.write(sink.getvalue())
    file.flush()
    with file:
        return snapengine.open_image(file)


@settings(max_examples=40, deadline=None)
@given(pages=page_lists(), direct=st.booleans(), zstd=st.booleans())
def test_there_and_back(pages, direct, zstd):
    options = Options(compress="zstd" if zstd else "none")
    with image_of(kit.stream(pages), direct=direct, options=options) as image:
        sent, data = regenerated(image)
    assert data.startswith(kit.head())
    assert data.endswith(kit.tail())
    assert sent.data_pages + sent.zero_pages == 68  # including the holes of small blocks
    with image_of(data) as again:
        assert memory_of(again) == kit.memory_of(pages)


def test_holes():
    pages = [("big", 0, kit.filled(1)), ("big", 1, None), ("small", 0, kit.filled(2))]
    blocks = [("big", SMALL_BLOCK_BYTES + 4096), ("small", 8 * 4096)]
    with image_of(kit.stream(pages, blocks=blocks)) as image:
        counts = {how: regenerated(image, holes=how)[0].zero_pages for how in ("small", "send", "skip")}
        assert counts == {"small": 1 + 7, "send": SMALL_BLOCK_BYTES // 4096 + 7, "skip": 1}


def test_a_head_from_scratch():
    assert make_head(kit.MACHINE, kit.BLOCKS) == kit.head()
    assert make_head(None, kit.BLOCKS) == kit.head(config=b"")
    for blocks in ([], [("a", 100)], [("a", 4096), ("a", 4096)]):
        with pytest.raises(StreamError):
            make_head("pc", blocks)
    with pytest.raises(ValueError, match="255"):
        make_head("pc", [("a" * 256, 4096)])


def image_with(chunks, regions, blobs=None, lost="refuse"):
    """Return an image of the given chunks, a list of (entries, data)."""
    sink = MemorySink()
    writer = Writer(sink)
    writer.begin(regions)
    for entries, data in chunks:
        writer.py_chunk(entries, data)
    for name, blob in (blobs or {}).items():
        writer.vmstate(name, blob)
    writer.finish({})
    with open(os.memfd_create("image"), "w+b") as file:
        file.write(sink.getvalue())
        file.flush()
        return snapengine.open_image(file, lost=lost)


def test_an_image_that_came_another_way():
    """An image of a process: regions at its addresses, and page numbers with gaps."""
    ram, bios = Region("pc.ram", 0x7F0000000000, 4 * 4096), Region("pc.bios", 0x7E0000000000, 4096)
    chunks = [
        ([(1002, 1, DATA), (7, 1, DATA), (1000, 1, ZERO)], kit.filled(1) + kit.filled(2)),
        ([(1001, 1, HOLE), (1003, 1, DATA)], kit.filled(3)),
    ]
    blocks = [("pc.bios", 4096), ("pc.ram", 4 * 4096)]
    with image_with(chunks, [(ram, 1000), (bios, 7)]) as image:
        _, data = regenerated(image, head=make_head("pc", blocks), tail=kit.tail())
        with pytest.raises(ImageError, match=r"qemu\.stream\.head"):
            regenerated(image)
    with image_of(data) as again:
        assert again.read("pc.ram", 0, 4 * 4096) == bytes(8192) + kit.filled(1) + kit.filled(3)
        assert again.read("pc.bios", 0, 4096) == kit.filled(2)


@pytest.mark.parametrize("case", ["name", "length", "missing page", "lost page", "odd address"])
def test_what_does_not_fit_is_refused_before_a_byte(case):
    addr = 0x1800 if case == "odd address" else 0x1000
    name = "other" if case == "name" else "a"
    pages = 3 if case == "length" else 2
    entries = {"missing page": [(0, 1, ZERO)], "lost page": [(0, 1, ZERO), (1, 1, LOST)]}
    chunk = (entries.get(case, [(0, pages, ZERO)]), b"")
    error = LostPagesError if case == "lost page" else ImageError
    with image_with([chunk], [(Region(name, addr, pages * 4096 - addr % 4096), 0)]) as image:
        read_end, write_end = os.pipe()
        with pytest.raises(error):
            write_stream(image, write_end, make_head("pc", [("a", 8192)]), kit.tail())
        os.close(write_end)
        assert os.read(read_end, 1) == b""
        os.close(read_end)


def test_a_lost_page_as_zeros():
    """In a small block, which QEMU may fill by itself, it is sent like a hole."""
    chunk = ([(1, 1, DATA), (2, 1, LOST)], kit.filled(1))
    with image_with([chunk], [(Region("a", 0x1000, 8192), 1)], lost="zero") as image:
        sent, stream = regenerated(image, head=make_head("pc", [("a", 8192)]), tail=kit.tail())
    assert (sent.data_pages, sent.zero_pages) == (1, 1)
    with image_of(stream) as again:
        assert again.read("a", 0, 8192) == kit.filled(1) + bytes(4096)


@pytest.mark.parametrize("blocking", [True, False])
def test_into_a_pipe_that_is_slow(blocking):
    pages = [("pc.ram", n, kit.filled(n)) for n in range(1000)]
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, blocking)
    got = bytearray()

    def drain():
        with os.fdopen(read_end, "rb", buffering=0) as pipe:
            while piece := pipe.read(50_001):
                got.extend(piece)

    thread = threading.Thread(target=drain)
    thread.start()
    with image_of(kit.stream(pages, blocks=[("pc.ram", 4096000)])) as image:
        write_stream(image, write_end)
        os.close(write_end)
        thread.join()
        assert bytes(got) == regenerated(image)[1]


def test_a_reader_that_goes_away():
    pages = [("pc.ram", n, kit.filled(n)) for n in range(1000)]
    with image_of(kit.stream(pages, blocks=[("pc.ram", 4096000)])) as image:
        read_end, write_end = os.pipe()
        os.close(read_end)
        with pytest.raises(BrokenPipeError):
            write_stream(image, write_end)
        os.close(write_end)


# -- the command --


def command(*words, data=b"", **how):
    line = [sys.executable, "-m", "snapengine.cli", *map(str, words)]
    return subprocess.run(line, input=data, capture_output=True, check=False, timeout=PATIENCE_S, **how)


def test_command(tmp_path):
    data = kit.stream(kit.SOME_PAGES)
    done = command("ingest", "-", "./vm_state", data=data, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")  # no output without a terminal
    (tmp_path / "file").write_bytes(data)
    done = command("ingest", "--direct", "--compress", "zstd", "--json", tmp_path / "file", tmp_path / "two")
    assert json.loads(done.stdout)["duplicate_pages"] == 3
    for name in ("vm_state", "two"):
        with snapengine.open_image(tmp_path / name) as image:
            assert memory_of(image) == kit.memory_of(kit.SOME_PAGES)
    assert command("info", tmp_path / "two").returncode == 0
    done = command("ingest", tmp_path / "file", "-")
    with open(os.memfd_create("image"), "w+b") as file:
        file.write(done.stdout)
        file.flush()
        with snapengine.open_image(file) as image:
            assert memory_of(image) == kit.memory_of(kit.SOME_PAGES)


def test_command_says_what_is_wrong(tmp_path):
    done = command("ingest", "-", tmp_path / "vm", data=kit.stream(kit.SOME_PAGES)[:-7])
    assert done.returncode == 1
    assert done.stderr.startswith(b"snapengine: error: standard input: the stream ends early")
    assert done.stderr.count(b"\n") == 1
    assert command("ingest", tmp_path, tmp_path / "vm").returncode == 1
    assert command("ingest", "-", tmp_path / "none" / "vm").returncode == 1
    assert command("ingest", "--compress", "lz4", "-", tmp_path / "vm").returncode == 2
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("closing", [">&-", "2>&-", ">&- 2>&-", "| true"])
def test_standard_output_may_be_gone(tmp_path, closing):
    (tmp_path / "stream").write_bytes(kit.stream(kit.SOME_PAGES))
    line = f"{sys.executable} -m snapengine.cli ingest --json stream vm {closing}"
    script = f"set -o pipefail; {line}"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, check=False, timeout=PATIENCE_S)
    assert done.returncode == 0
    with snapengine.open_image(tmp_path / "vm") as image:
        image.verify()


def test_interrupted(tmp_path):
    line = [sys.executable, "-m", "snapengine.cli", "ingest", "-", str(tmp_path / "vm")]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdin.write(kit.head())
        child.stdin.flush()
        while not os.listdir(tmp_path):  # it has begun
            assert child.poll() is None
        child.terminate()
        assert child.wait(PATIENCE_S) == 143
        child.stdin.close()
    assert os.listdir(tmp_path) == []

"""The page index: lookups, laziness; the last record of a page wins in any order of reading."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_kit import DATA, HOLE, LOST, ZERO, noise, of_type, opened, reseal, sample

from snapengine.errors import CorruptImageError, ImageError, LostPagesError
from snapengine.image import open_image
from snapengine.image.writer import Writer
from snapengine.regions import Region
from snapengine.restore.stream import restore_stream
from snapengine.storage.sinks import MemorySink

PAGES = 48
entry = st.tuples(st.integers(0, PAGES - 1), st.integers(1, 12), st.sampled_from([DATA, ZERO, HOLE, LOST]))
chunk = st.tuples(st.lists(entry, min_size=1, max_size=6), st.sampled_from([None, 1]))


def write(chunks):
    """(image, page -> (kind, bytes) of the newest record); every DATA page has different content."""
    sink = MemorySink()
    writer = Writer(sink)
    writer.begin([(Region("ram", 0x5000, PAGES * 4096), 0)])
    newest, serial = {}, 0
    for entries, level in chunks:
        data = b""
        for first, pages, kind in entries:
            for page in range(first, first + pages):
                content = bytes(4096)
                if kind == DATA:
                    serial += 1
                    content = serial.to_bytes(4, "big") * 1024
                    data += content
                newest[page] = (kind, content)
        writer.py_chunk(entries, data, level=level)
    writer.finish({})
    return sink.getvalue(), newest


@settings(max_examples=150, deadline=None)
@given(st.lists(chunk, min_size=1, max_size=8), st.integers(0, PAGES * 4096), st.integers(0, 20000))
def test_the_last_record_wins(chunks, offset, length):
    chunks = [([(0, PAGES + 12, ZERO)], None), *chunks]
    data, newest = write(chunks)
    expected = b"".join(newest[page][1] for page in range(PAGES))
    lost = [page for page in range(PAGES) if newest[page][0] == LOST]
    length = min(length, PAGES * 4096 - offset)
    touched = range(offset // 4096, -(-(offset + length) // 4096) if length else offset // 4096)
    with opened(data) as image:
        totals = [sum(newest[page][0] == kind for page in range(PAGES)) for kind in range(4)]
        report = image.verify()
        assert [report.data_pages, report.zero_pages, report.hole_pages, report.lost_pages] == totals
        kinds = [kind for _, bytes_, kind in image.runs(0) for _ in range(bytes_ // 4096)]
        assert kinds == [("data", "zero", "hole", "lost")[newest[page][0]] for page in range(PAGES)]
        if any(page in touched for page in lost):
            with pytest.raises(LostPagesError):
                image.read(0, offset, length)
        else:
            assert image.read(0, offset, length) == expected[offset : offset + length]
    with open_image(io.BytesIO(data), lost="zero") as image:
        assert image.lost_pages() == len(lost)
        assert image.read(0, offset, length) == expected[offset : offset + length]
    buffer = bytearray(PAGES * 4096)
    if lost:
        with pytest.raises(LostPagesError):
            restore_stream(io.BytesIO(data), lambda region: buffer)
    else:
        restore_stream(io.BytesIO(data), lambda region: buffer)
        assert buffer == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(chunk, min_size=1, max_size=5))
def test_pages_in_no_map_are_not_holes(chunks):
    data, newest = write(chunks)
    missing = [page for page in range(PAGES) if page not in newest]
    with opened(data) as image:
        for page in range(PAGES):
            if page in missing:
                with pytest.raises(ImageError, match="is not in the image"):
                    image.read(0, page * 4096, 1)
            elif newest[page][0] != LOST:
                assert image.read(0, page * 4096, 4096) == newest[page][1]
        if missing:
            with pytest.raises(CorruptImageError, match="is missing"):
                image.verify()
        else:
            assert image.verify().chunks == len(chunks)


def test_sparse_regions_of_many_tib_cost_nothing():
    sink = MemorySink()
    writer = Writer(sink)
    tib = 1 << 40
    writer.begin([(Region("sparse", 0, 8 * tib), 0)])
    entries = [(first, 1 << 22, HOLE) for first in range(0, 8 * tib // 4096, 1 << 22)]
    writer.py_chunk(entries)
    writer.py_chunk([(1 << 30, 1, DATA)], noise(1, 3))
    writer.finish({})
    with opened(sink.getvalue()) as image:
        assert image.verify().hole_pages == 8 * tib // 4096 - 1
        assert image.read(0, 1 << 42, 4096) == noise(1, 3)
        assert image.read(0, (1 << 42) + 4096, 4096) == bytes(4096)
        assert [kind for _, _, kind in image.runs(0)] == ["hole", "data", "hole"]


def test_only_the_chunks_that_are_asked_for_are_read():
    image_bytes = sample().data
    chunk = of_type(image_bytes, b"CHNK", 1)
    damaged = bytearray(image_bytes)
    damaged[chunk.offset + 50] ^= 1
    with opened(bytes(damaged)) as image:
        assert image.read("ram", 0, 40960) == sample().memory["ram"]
        with pytest.raises(CorruptImageError, match="damaged") as caught:
            image.read("io", 0, 1)
        assert caught.value.offset == chunk.offset


def interleaved(n):
    """n regions of one page. Two chunks have an entry for each page; each entry of another covers all."""
    sink = MemorySink()
    writer = Writer(sink)
    writer.begin([(Region(f"r{page}", page << 13, 4096), page) for page in range(n)])
    backwards = [(page, 1, ZERO) for page in reversed(range(n))]
    for entries in (backwards, [(0, n, HOLE)] * n, backwards):
        writer.py_chunk(entries)
    for page in range(n):  # by the index, each of these chunks may have any page
        writer.py_chunk([(0, 1, ZERO), (n - 1, 1, ZERO), (page, 1, LOST if page == 7 else ZERO)])
    writer.finish({})
    return sink.getvalue()


def looked_at_for_nothing(n):
    with opened(interleaved(n)) as image:
        report = image.verify()
        assert (report.zero_pages, report.lost_pages) == (n - 1, 1)
        for region in image.regions[:7]:
            assert list(image.runs(region)) == [(0, 4096, "zero")]
        return image.index.wasted


def test_a_hostile_image_does_not_take_quadratic_time():
    """Every map overlaps every region: without a bound, twice as many of both cause four times the waste."""
    few, many = looked_at_for_nothing(400), looked_at_for_nothing(800)
    assert few > 0
    assert many < 2.5 * few


@settings(max_examples=60, deadline=None)
@given(st.lists(chunk, min_size=1, max_size=8), st.lists(st.tuples(st.integers(0, PAGES - 1), st.just(3))))
def test_many_lookups_find_what_the_first_ones_find(chunks, lookups):
    """Both if lookups read maps and if they search the index of the completely resolved image."""
    data, newest = write([([(0, PAGES + 12, ZERO)], None), *chunks])
    with opened(data) as image:
        for first, pages in lookups * 20:
            end = min(first + pages, PAGES)
            found = [kind for _, count, kind in image.index.resolve(first, end) for _ in range(count)]
            assert found == [newest[page][0] for page in range(first, end)]
            if LOST not in found:
                expected = b"".join(newest[page][1] for page in range(first, end))
                assert image.read(0, first * 4096, (end - first) * 4096) == expected


def test_a_damaged_chunk_never_hides_a_sound_one():
    image_bytes = sample().data
    chunk = of_type(image_bytes, b"CHNK", 1)
    damaged = bytearray(image_bytes)
    damaged[chunk.offset + 50] ^= 1
    with opened(bytes(damaged)) as image:
        for _ in range(100):
            assert image.read("ram", 4096, 4096) == sample().memory["ram"][4096:8192]
            with pytest.raises(CorruptImageError, match="damaged") as caught:
                image.read("io", 0, 1)
            assert caught.value.offset == chunk.offset
        assert image.index.wasted < 100  # the image was resolved as a whole


def test_a_chunk_that_is_not_the_one_in_the_index():
    image_bytes = sample().data
    with opened(reseal(image_bytes, of_type(image_bytes, b"CHNK", 1), arg=7)) as image, pytest.raises(
        CorruptImageError, match="inconsistent"
    ):
        image.read("io", 0, 1)

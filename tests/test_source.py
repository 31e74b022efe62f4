"""Sources: the content of an image and its errors do not depend on the source."""

import errno
import io
import mmap
import os
import threading

import pytest
from image_kit import of_type, sample

from snapengine.base.checksum import crc32c_of
from snapengine.errors import CorruptImageError, ImageError, TruncatedImageError
from snapengine.image import open_image
from snapengine.storage.source import FileSource, MemorySource, Source

SAMPLE = sample()


class Recorded(Source):
    """A source in Python: at most 1000 bytes per call, and an error at a given offset."""

    def __init__(self, data, fails_at=None, error=None):
        super().__init__("recorded", len(data))
        self.data = data
        self.fails_at = fails_at
        self.error = error or OSError(errno.EIO, "the bucket is gone")
        self.closed = 0

    def pread(self, count, offset):
        if self.fails_at is not None and offset <= self.fails_at < offset + count:
            raise self.error
        return self.data[offset : offset + min(count, 1000)]

    def close(self):
        self.closed += 1


def from_file(data):
    fd = os.memfd_create("image")
    try:
        os.write(fd, data)
        return FileSource(fd, "image")
    finally:
        os.close(fd)


KINDS = {"file": from_file, "memory": lambda data: MemorySource(data, "image"), "python": Recorded}


@pytest.fixture(params=KINDS)
def source_of(request):
    return KINDS[request.param]


def outcome(source):
    """All metadata and content of an image, or the error without the source's name."""
    try:
        with open_image(source) as image:
            memory = [image.read(region, 0, region.length) for region in image.regions]
            return memory, dict(image.vmstate), image.info(), image.verify()
    except (ImageError, OSError) as error:
        text = str(error).replace(source.name, "image")
        return type(error), text, getattr(error, "offset", None)


def damaged():
    """The sample truncated, and with one byte changed, at places in every record."""
    for at in range(0, len(SAMPLE.data), 997):
        yield SAMPLE.data[:at]
        yield SAMPLE.data[:at] + bytes([SAMPLE.data[at] ^ 1]) + SAMPLE.data[at + 1 :]


def test_a_sound_image_is_the_same_from_every_source(source_of):
    memory, vmstate, _, report = outcome(source_of(SAMPLE.data))
    assert memory == list(SAMPLE.memory.values())
    assert vmstate == SAMPLE.vmstate
    assert report == outcome(from_file(SAMPLE.data))[3]


def test_a_damaged_image_has_the_same_errors_from_every_source():
    found = set()
    for data in damaged():
        outcomes = [outcome(make(data)) for make in KINDS.values()]
        assert outcomes[0] == outcomes[1] == outcomes[2]
        found.add(outcomes[0][0])
    assert found >= {CorruptImageError, TruncatedImageError}


def reads(image):
    """Each kind of read: a page map, a raw payload by one thread and by several, vmstate, everything."""
    region = image.regions[0]
    yield lambda: image.read(region, 0, region.length)
    yield lambda: image.restore_into(region, bytearray(region.length), threads=3)
    yield lambda: os.close(image.restore_memfd(region))
    yield image.verify


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "the bucket is gone"), TimeoutError(errno.ETIMEDOUT, "no answer"),
              RuntimeError("the client is closed"), KeyboardInterrupt()],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
@pytest.mark.parametrize("place", ["map", "payload"])
def test_what_a_read_raises_reaches_the_caller(place, error):
    chunk = of_type(SAMPLE.data, b"CHNK")
    at = chunk.offset + 70 if place == "map" else chunk.payload_offset + 4097
    source = Recorded(SAMPLE.data, error=error)
    with open_image(source) as image:
        source.fails_at = at
        for read in reads(image):
            with pytest.raises(type(error)) as caught:
                read()
            assert caught.value is error
        source.fails_at = None
        assert image.read("ram", 0, 40960) == SAMPLE.memory["ram"]
        image.verify()


def test_an_error_while_it_is_opened_closes_the_source():
    source = Recorded(SAMPLE.data, fails_at=len(SAMPLE.data) - 1)
    with pytest.raises(OSError, match="the bucket is gone"):
        open_image(source)
    assert source.closed == 1


def test_a_source_that_is_shorter_than_it_said(source_of):
    chunk = of_type(SAMPLE.data, b"CHNK", 1)
    source = Recorded(SAMPLE.data)
    with open_image(source) as image:
        source.data = SAMPLE.data[: chunk.payload_offset + 5]
        for name in ("io", 1):
            with pytest.raises(TruncatedImageError, match="was truncated"):
                image.read(name, 0, 6000)
        with pytest.raises(TruncatedImageError):
            image.verify()


def test_a_source_that_returns_what_it_should_not():
    source = Recorded(SAMPLE.data)
    with open_image(source) as image:
        source.data = "text"
        with pytest.raises(TypeError):
            image.read("ram", 0, 1)

        class TooLong(Recorded):
            def pread(self, count, offset):
                return self.data[offset : offset + count + 1]

    with pytest.raises(ValueError, match="returned 9 bytes where 8"):
        open_image(TooLong(SAMPLE.data)).close()
    with pytest.raises(NotImplementedError, match="must define pread"):
        Source("nothing", 8).read_exactly(0, 8)


def test_threads_read_one_source(source_of):
    wrong = []
    with open_image(source_of(SAMPLE.data)) as image:

        def work():
            for _ in range(20):
                for name, memory in SAMPLE.memory.items():
                    buffer = bytearray(len(memory))
                    image.restore_into(name, buffer, threads=2)
                    if buffer != memory:
                        wrong.append(name)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_the_bytes_of_a_source(kind):
    data = SAMPLE.data
    with KINDS[kind](data) as source:
        assert source.size == len(data)
        assert source.read_exactly(5, 700) == data[5:705]
        assert source.read_exactly(len(data), 0) == b""
        assert source.checksum(3, len(data) - 3) == crc32c_of(data[3:])
        for offset, count in ((1, len(data)), (1 << 63, 1 << 63), (len(data) + 1, 0)):
            assert source.checksum(offset, count) is None
        for offset, count in ((1, len(data)), (1 << 64, 1), (1 << 63, 1 << 63)):
            with pytest.raises(TruncatedImageError, match=f"ends at byte {len(data)}"):
                source.read_exactly(offset, count)


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_after_close_nothing_is_read(kind):
    image = open_image(KINDS[kind](SAMPLE.data))
    image.close()
    image.close()
    others = os.memfd_create("others")  # it reuses the descriptor number of the file source
    try:
        os.write(others, bytes(len(SAMPLE.data)))
        for read in (lambda: image.read("ram", 0, 1), lambda: image.vmstate["cpu"], image.verify):
            with pytest.raises(OSError, match="Bad file descriptor"):
                read()
    finally:
        os.close(others)


def test_a_descriptor_stays_the_callers(tmp_path):
    path = tmp_path / "a.snap"
    path.write_bytes(SAMPLE.data)
    with open(path, "rb") as file:
        file.seek(100)
        with open_image(file) as image:
            assert image.name == str(path)
            assert image.source.fd != file.fileno()
        assert file.tell() == 100
    for file in (path, os.fspath(path)):
        with open_image(file) as image:
            assert image.name == str(path)


def test_an_object_in_memory_is_held_until_the_end():
    data = bytearray(SAMPLE.data)
    with open_image(MemorySource(data)) as image:
        with pytest.raises(BufferError):
            data.append(0)
        image.verify()
    data.append(0)
    with pytest.raises(TypeError, match="bytes-like"):
        MemorySource("text")


def test_a_bytesio_is_shared_not_copied():
    file = io.BytesIO(SAMPLE.data)
    file.seek(0, io.SEEK_END)
    before = len(os.listdir("/proc/self/fd"))
    with open_image(file) as image:
        assert len(os.listdir("/proc/self/fd")) == before
        file.write(b"more")
        file.close()
        assert image.source.size == len(SAMPLE.data)
        image.verify()


class Reader:
    """A file object without a descriptor that returns few bytes per read."""

    def __init__(self, data):
        self.file = io.BytesIO(data)

    def read(self, count):
        return self.file.read(min(count, 1000))


def test_another_object_is_read_to_its_end():
    with open_image(Reader(SAMPLE.data)) as image:
        assert image.name == "Reader"
        image.verify()


def test_a_mapped_file_that_is_cut_while_it_is_a_source(tmp_path):
    path = tmp_path / "a.snap"
    path.write_bytes(SAMPLE.data)
    with open(path, "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    with open_image(MemorySource(memory)) as image:
        assert image.read("ram", 0, 40960) == SAMPLE.memory["ram"]
        os.truncate(path, 0)
        for read in (lambda: image.read("ram", 0, 4096), image.verify):
            with pytest.raises(OSError, match="Input/output error"):
                read()


def test_a_destination_that_is_cut_while_it_is_filled(source_of):
    with open_image(source_of(SAMPLE.data)) as image:
        fd = os.memfd_create("destination")
        try:
            os.ftruncate(fd, 40960)
            memory = mmap.mmap(fd, 40960)
            os.ftruncate(fd, 0)
            with pytest.raises(OSError, match="cannot be filled") as caught:
                image.restore_into("ram", memory, fresh=True)
            assert caught.value.errno == errno.EFAULT
        finally:
            os.close(fd)

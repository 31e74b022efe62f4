"""Restoring an image into a populated buffer, against one memcpy of the same bytes, alternated."""

import os
import time

import pytest
from benchkit import MIB, ROUNDS, Samples, size, small_pages, warm_file
from packdata import packable

import snapengine
from snapengine.export.raw import export_raw

SIZE = size("RESTORE_SIZE", "1G")

pytestmark = [pytest.mark.timeout(300), pytest.mark.benchmark(group="restore")]


@pytest.fixture
def destination(floors):
    """A destination of the same size in 4 KiB pages, populated."""
    with small_pages(SIZE) as memory:
        floors.fill(memory, 1)
        yield memory


def noise(length):
    """`length` bytes that do not compress, in 4 KiB pages."""
    memory = small_pages(length)
    while memory.tell() < length:
        memory.write(os.urandom(min(16 * MIB, length - memory.tell())))
    return memory


def measure(benchmark, floors, memory, path, destination, options):
    """Alternate memcpy and restoring. The first restore is not counted; its result is compared."""
    samples = Samples()
    benchmark.extra_info.update(size=SIZE, samples=samples, floors={"restore_ns": "memcpy_ns"})
    warm_file(path, SIZE)
    with snapengine.snapshot(memory, path, **options):
        pass

    def restore():
        with snapengine.open_image(path) as image:
            image.restore_into(0, destination)

    def pair():
        memcpy = floors.copy_ns(destination, memory)
        began = time.monotonic_ns()
        restore()
        samples.note(memcpy_ns=memcpy, restore_ns=time.monotonic_ns() - began)

    restore()
    assert memoryview(destination) == memoryview(memory)
    benchmark.pedantic(pair, rounds=ROUNDS)
    pairs = zip(samples["memcpy_ns"], samples["restore_ns"], strict=True)
    samples["restore_memcpy_ratio"] = [memcpy / restored for memcpy, restored in pairs]
    return samples


def bench_restore(benchmark, floors, tmpfs, destination):
    """Without compression."""
    with noise(SIZE) as memory:
        samples = measure(benchmark, floors, memory, tmpfs, destination, {})
    export(samples, tmpfs)


def bench_restore_zstd(benchmark, floors, tmpfs, destination):
    with packable("guest", SIZE) as memory:
        measure(benchmark, floors, memory, tmpfs, destination, {"compress": "zstd:1"})


def export(samples, path):
    """Export the image as a raw file into the tmpfs."""
    output = path.with_suffix(".raw")
    for _ in range(min(3, ROUNDS)):
        warm_file(output, SIZE)
        with snapengine.open_image(path) as image:
            began = time.monotonic_ns()
            export_raw(image, output, 0)
            samples.note(export_ns=time.monotonic_ns() - began)
        output.unlink()

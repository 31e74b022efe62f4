"""The checksum of the image format, CRC-32C, against XXH3-64 of python-xxhash, on 1 MiB."""

import pytest
from benchkit import MIB

from snapengine.base.checksum import crc32c_of

pytestmark = pytest.mark.benchmark(group="checksum")

BLOCK = bytes(range(256)) * (MIB // 256)


def note_rate(benchmark):
    """Bytes per second of each round."""
    rates = [MIB / seconds for seconds in benchmark.stats.stats.data]
    benchmark.extra_info["samples"] = {"checksum_rate": rates}


def bench_crc32c_without_gil(benchmark):
    benchmark.pedantic(crc32c_of, args=(BLOCK,), rounds=200, iterations=10, warmup_rounds=20)
    note_rate(benchmark)


def bench_xxh3_64_with_gil(benchmark):
    xxhash = pytest.importorskip("xxhash", reason="pip install 'snapengine[bench]'")
    benchmark.pedantic(xxhash.xxh3_64_intdigest, args=(BLOCK,), rounds=200, iterations=10, warmup_rounds=20)
    note_rate(benchmark)

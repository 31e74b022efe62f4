"""zstd on two threads into a tmpfs, alternated with others on the same bytes.

zstd:1 against the command ``zstd -1 -T2``; zstd:auto, which follows the sink's rate, against fixed levels.
"""

import shutil
import subprocess
import time

import pytest
from benchkit import MIB, ROUNDS, Samples, size, warm_file
from packdata import KINDS, packable

import snapengine
from snapengine.options import Options

SIZE = size("PACK_SIZE", "1G")
OPTIONS = Options(compress="zstd:1", encoder_threads=2)
AUTO_SIZE = size("AUTO_SIZE", "512M")
WAYS = ("auto", "1", "3")

pytestmark = [pytest.mark.timeout(300), pytest.mark.benchmark(group="zstd")]


@pytest.fixture(params=KINDS)
def memory(request):
    """The memory to save."""
    with packable(request.param, SIZE) as buffer:
        yield buffer


@pytest.fixture
def source(memory, tmpfs):
    """The same memory as a file."""
    path = tmpfs.with_suffix(".in")
    path.write_bytes(memory)
    yield path
    path.unlink()


def command(source, output):
    """The whole command, as a user starts it. Its reading of the file corresponds to our copy."""
    began = time.monotonic_ns()
    subprocess.run(["zstd", "-1", "-T2", "-f", "-q", str(source), "-o", str(output)], check=True)
    return {"command_ns": time.monotonic_ns() - began, "command_bytes": output.stat().st_size}


def capture(memory, path):
    """A capture of a buffer of this process, without writers."""
    began = time.monotonic_ns()
    with snapengine.snapshot(memory, path, OPTIONS) as running:
        pass
    taken = time.monotonic_ns() - began
    assert running.result.faults == 0
    return {"zstd_ns": taken, "zstd_bytes": running.result.image_bytes}


def bench_zstd_command(benchmark, memory, source, tmpfs):
    if shutil.which("zstd") is None:
        pytest.skip("there is no command zstd here to compare with")
    other = tmpfs.with_suffix(".zst")
    samples = Samples()
    benchmark.extra_info.update(size=SIZE, samples=samples, floors={"zstd_ns": "command_ns"})

    def pair():
        for path in (other, tmpfs):
            path.unlink(missing_ok=True)
            warm_file(path, SIZE)
        samples.note(**command(source, other), **capture(memory, tmpfs))

    pair()
    samples.clear()
    benchmark.pedantic(pair, rounds=ROUNDS)
    other.unlink()
    pairs = zip(samples["command_ns"], samples["zstd_ns"], strict=True)
    samples["zstd_ratio"] = [theirs / ours for theirs, ours in pairs]
    pairs = zip(samples["zstd_bytes"], samples["command_bytes"], strict=True)
    samples["zstd_size_ratio"] = [ours / theirs for ours, theirs in pairs]


def by_level(memory, path, way, rate_limit):
    """A capture with ``zstd:WAY`` into a sink of `rate_limit` bytes per second (0: no limit)."""
    options = Options(compress=f"zstd:{way}", encoder_threads=2, rate_limit=rate_limit)
    began = time.monotonic_ns()
    with snapengine.snapshot(memory, path, options) as running:
        pass
    taken = time.monotonic_ns() - began
    return {f"level_{way}_ns": taken, f"level_{way}_bytes": running.result.image_bytes}


@pytest.mark.parametrize("rate_limit", [50 * MIB, 200 * MIB, 0], ids=["50M", "200M", "none"])
def bench_zstd_auto(benchmark, rate_limit, tmpfs):
    """On text and code; a guest's pages compress to the same size at every level."""
    samples = Samples()
    benchmark.extra_info.update(size=AUTO_SIZE, rate_limit=rate_limit, samples=samples)
    with packable("files", AUTO_SIZE) as memory:

        def all_ways():
            for way in WAYS:
                tmpfs.unlink(missing_ok=True)
                warm_file(tmpfs, AUTO_SIZE)
                samples.note(**by_level(memory, tmpfs, way, rate_limit))

        all_ways()
        samples.clear()
        benchmark.pedantic(all_ways, rounds=ROUNDS)
    for way in WAYS[1:]:
        for unit in ("ns", "bytes"):
            pairs = zip(samples[f"level_auto_{unit}"], samples[f"level_{way}_{unit}"], strict=True)
            samples[f"auto_{unit}_to_{way}_ratio"] = [auto / fixed for auto, fixed in pairs]

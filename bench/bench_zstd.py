"""zstd:1 on two threads into a tmpfs, against ``zstd -1 -T2`` on the same bytes, in alternation."""

import shutil
import subprocess
import time

import pytest
from benchkit import ROUNDS, Samples, size, warm_file
from packdata import KINDS, packable

import snapengine
from snapengine.options import Options

SIZE = size("PACK_SIZE", "1G")
OPTIONS = Options(compress="zstd:1", encoder_threads=2)

pytestmark = [pytest.mark.timeout(300), pytest.mark.benchmark(group="zstd")]


@pytest.fixture(params=KINDS)
def memory(request):
    """The bytes."""
    with packable(request.param, SIZE) as buffer:
        yield buffer


@pytest.fixture
def source(memory, tmpfs):
    """The same bytes as a file."""
    path = tmpfs.with_suffix(".in")
    path.write_bytes(memory)
    yield path
    path.unlink()


def command(source, output):
    """The whole process, as one would start it; of its work, reading the file corresponds to our copy."""
    began = time.monotonic_ns()
    subprocess.run(["zstd", "-1", "-T2", "-f", "-q", str(source), "-o", str(output)], check=True)
    return {"command_ns": time.monotonic_ns() - began, "command_bytes": output.stat().st_size}


def capture(memory, path):
    """A snapshot of this process's buffer; nobody writes to it."""
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
    benchmark.extra_info.update(size=SIZE, samples=samples)

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

"""The choice of the zstd level, from given measurements, and in a capture."""

import itertools
import sysconfig
from pathlib import Path

import pytest

import snapengine
from snapengine.options import Options
from snapengine.pipeline.zstd_auto import LEVELS, START, STEP_CHUNKS, Levels

MIB = 1 << 20
# Invented, so that each level gets chosen: ns of one thread per byte, stored bytes per byte.
COSTS = dict(zip(LEVELS, (2.2, 3.0, 4.0, 6.0, 8.0), strict=True))
RATIOS = dict(zip(LEVELS, (0.270, 0.255, 0.245, 0.235, 0.228), strict=True))


def follow(levels, chunks, sink_cost, costs=COSTS, ratios=RATIOS, kind=lambda number: 1.0):
    """The level of each of `chunks` chunks, if the sink takes `sink_cost` ns per stored byte (a number, or a
    function of the level). `kind(number)`: the compressibility of that chunk."""
    used = []
    for number in range(chunks):
        level = levels.level
        cost, ratio = costs[level] * kind(number), ratios[level] * kind(number)
        levels.note(level, cost, ratio, sink_cost(level) if callable(sink_cost) else sink_cost)
        above = levels.probe(level)
        if above is not None:
            levels.compare(above, costs[above] / costs[level], ratios[above] / ratios[level])
        used.append(level)
    return used


def changes(used):
    return [i for i in range(1, len(used)) if used[i] != used[i - 1]]


def pace(level, sink_cost, threads):
    write = RATIOS[level] * sink_cost
    return max(write, (COSTS[level] + write) / threads)


def test_a_slow_sink_gets_the_highest_level():
    used = follow(Levels(2), 1000, sink_cost=200)
    assert used[0] == START
    assert used == sorted(used)
    assert used[-1] == LEVELS[-1]


def test_a_fast_sink_gets_the_lowest_level():
    assert set(follow(Levels(2), 1000, sink_cost=0.1)) == {LEVELS[0]}


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("sink_cost", [0.1, 1, 5, 8, 12, 20, 60, 200])
def test_the_level_ends_near_the_fastest(threads, sink_cost):
    used = follow(Levels(threads), 3000, sink_cost)
    last = set(used[1000:])
    assert len(last) == 1
    best = min(pace(level, sink_cost, threads) for level in LEVELS)
    assert pace(last.pop(), sink_cost, threads) <= 1.05 * best


def test_a_level_is_kept_for_some_chunks():
    used = follow(Levels(2), 1000, sink_cost=200)
    at = changes(used)
    assert at[0] >= STEP_CHUNKS
    assert all(b - a >= STEP_CHUNKS for a, b in itertools.pairwise(at))
    assert all(abs(LEVELS.index(used[i]) - LEVELS.index(used[i - 1])) == 1 for i in at)


def test_a_level_that_makes_nothing_smaller_is_not_taken():
    used = follow(Levels(2), 2000, sink_cost=200, ratios=dict.fromkeys(LEVELS, 0.25))
    assert max(used) == START


def test_memory_that_is_not_alike_everywhere_changes_nothing():
    """Chunks of all kinds in turn; each kind lasts longer than a level does."""
    used = follow(Levels(2), 3000, sink_cost=60, kind=lambda number: 0.5 + number // 20 % 3)
    assert used == sorted(used)
    assert used[-1] == LEVELS[-1]


def test_a_sink_that_looks_fast_while_compression_holds_up():
    """With a limited rate: a sink that waits for compression accumulates allowance."""
    used = follow(Levels(2), 3000, lambda level: 20 if COSTS[level] <= RATIOS[level] * 20 else 0.3)
    assert set(used[1000:]) == {3}


def test_the_level_follows_a_sink_that_changes():
    levels = Levels(2)
    assert follow(levels, 1000, sink_cost=200)[-1] == LEVELS[-1]
    assert follow(levels, 1000, sink_cost=0.1)[-1] == LEVELS[0]
    assert follow(levels, 1000, sink_cost=200)[-1] == LEVELS[-1]


def test_chunks_that_were_begun_before_the_last_change_count_for_nothing():
    levels = Levels(2)
    follow(levels, 2 * STEP_CHUNKS, sink_cost=200)
    at = levels.level
    assert at != START
    for _ in range(2 * STEP_CHUNKS):
        levels.note(START, COSTS[START], RATIOS[START], 0.1)
        assert levels.probe(START) is None
    assert levels.level == at


def test_options():
    options = Options(compress="zstd:auto")
    assert options.level_follows_sink
    assert options.zstd_level == START
    assert not options.compress_always
    assert Options(compress="zstd:auto:always").compress_always
    assert not Options(compress="zstd:1").level_follows_sink
    with pytest.raises(ValueError, match="zstd:auto"):
        Options(compress="zstd:automatic")


def library(length):
    """That many bytes of the sources of Python's library."""
    data = bytearray()
    while len(data) < length:
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            data += path.read_bytes()
    return data[:length]


def save(memory, path, **options):
    with snapengine.snapshot(memory, path, **options) as capture:
        pass
    with snapengine.open_image(path) as image:
        image.verify()
        assert image.read(0, 0, len(memory)) == memory
    return capture.result.image_bytes


def test_a_slow_sink_gets_a_smaller_image(tmp_path):
    memory = library(96 * MIB)
    fixed = save(memory, tmp_path / "fixed", compress="zstd:1")
    slow = save(memory, tmp_path / "slow", compress="zstd:auto", rate_limit=8 * MIB)
    assert slow < 0.98 * fixed

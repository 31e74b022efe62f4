"""The loops that the bench compares with (bench/peers): they save the memory at one instant."""

from pathlib import Path

import floorkit
import pytest
from peers import shapes
from waitkit import attempts

from snapengine.guest.check import check_cut
from snapengine.guest.memory import GuestMemory
from snapengine.guest.params import GuestParams
from snapengine.guest.writers import GuestWriters

MIB = 1 << 20
PARAMS = GuestParams(size=16 * MIB, threads=2)


@pytest.fixture(scope="module")
def ways(native_bench, requires_uffd):
    return shapes.ways(floorkit.load_loops())


@pytest.fixture
def busy():
    """Memory, and writers that write to all of it at full speed."""
    with GuestMemory(PARAMS) as memory, GuestWriters(memory) as writers:
        writers.resume()
        while min(writers.counts()) < 1000:
            pass
        yield memory, writers


@pytest.mark.parametrize("way", ["qemu-shape", "forkd-shape", "fork"])
def test_the_image_is_one_state_of_a_busy_memory(ways, busy, way, tmp_path):
    memory, writers = busy
    for _ in attempts("nobody faults"):
        before = sum(writers.counts())
        at_t = []
        saved = ways[way](memory, tmp_path / "image", lambda at_t=at_t: at_t.append(sum(writers.counts())))
        image = (tmp_path / "image").read_bytes()
        assert len(image) == saved["image_bytes"] == PARAMS.size
        report = check_cut(image, PARAMS)
        assert report.consistent, report.violation
        done = sum(writers.counts())
        assert before <= sum(report.writes) <= at_t[0] + PARAMS.threads  # T lies in the save, not at its end
        if saved["faults"] > 0 or way == "fork":
            break
    while sum(writers.counts()) == done:  # the writers still run: nothing is protected any more
        pass


@pytest.mark.parametrize("way", ["qemu-shape", "forkd-shape", "fork"])
def test_without_a_path_the_bytes_go_nowhere(ways, busy, way):
    assert ways[way](busy[0], None, int)["image_bytes"] == PARAMS.size


@pytest.mark.parametrize("way", ["qemu-shape", "forkd-shape", "fork"])
def test_a_full_sink_is_an_error_and_the_writers_go_on(ways, busy, way):
    memory, writers = busy
    with pytest.raises(OSError, match="No space left"):
        ways[way](memory, Path("/dev/full"), int)
    done = sum(writers.counts())
    while sum(writers.counts()) == done:
        pass

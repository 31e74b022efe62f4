"""The pool between capture threads and encoders: order, bounds, waiting, spilling, failing."""

import errno
import os
import resource
import threading

import pytest
from waitkit import PATIENCE_S, until

from snapengine.pipeline.pool import SLOT_BYTES, SMALL_SLOT_BYTES, Pool

pytestmark = [pytest.mark.slow_build]

MIB = 1 << 20
DATA, ZERO, HOLE, LOST = range(4)


@pytest.fixture(scope="session")
def driver(build_driver):
    return build_driver("pool_driver")


@pytest.fixture
def make(driver):
    """``make(...)``: a driver of a small pool: 16 MiB at most, slots of 256 KiB."""
    made = []

    def start(memory_limit=8 * MIB, total_pages=1 << 16, lanes=4, encoders=1, spill_dir=None):
        made.append(Pool(memory_limit, total_pages, lanes, encoders, spill_dir))
        return driver.Driver(made[-1])

    yield start
    for pool in made:
        pool.close()


class Worker(threading.Thread):
    """Runs a call; ``finish`` returns its result, within the deadline."""

    def __init__(self, call, *arguments):
        super().__init__(daemon=True)
        self._call, self._arguments = call, arguments
        self.value = self.error = None
        self.start()

    def run(self):
        try:
            self.value = self._call(*self._arguments)
        except BaseException as error:
            self.error = error

    def finish(self):
        self.join(PATIENCE_S)
        assert not self.is_alive(), "a thread of the pool hangs"
        if self.error is not None:
            raise self.error
        return self.value


def drain(pool):
    """All chunks until the queue is closed and empty: (ticket, spilled, pages)."""
    chunks = []
    while (taken := pool.take())[0] == 1:
        chunks.append(taken[1:])
    assert taken[0] == 0
    return chunks


def fill_up(pool, lane):
    """Let a lane that does not wait take all slots; returns the next page number."""
    assert pool.open(lane) == 0
    page = 0
    while pool.free_slots:
        assert pool.save(lane, page, 1, False) == 0
        page += 1
    return page


# -- order and content --


def test_the_queue_is_first_in_first_out(make):
    pool = make()
    page = fill_up(pool, 1)
    spilled = pool.slot_pages * 20
    assert pool.save(1, page, spilled, False) == 0
    assert pool.pool.spilled_bytes > 0
    # Slots are free again: the next chunks are not spilled, and must still come after the spilled ones.
    taken = [pool.take() for _ in range(pool.pool.slots - 1)]
    assert pool.save(1, page + spilled, pool.slot_pages * 5, False) == 0
    assert pool.close(1) == 0
    pool.end()
    chunks = [taken_one[1:] for taken_one in taken] + drain(pool)
    assert [ticket for ticket, _, _ in chunks] == list(range(len(chunks)))
    kinds = [was_spilled for _, was_spilled, _ in chunks]
    first, last = kinds.index(True), len(kinds) - 1 - kinds[::-1].index(True)
    assert 0 < first < last < len(kinds) - 1, "slots, then spilled chunks, then slots again"
    assert [p for _, _, pages in chunks for p in pages] == list(range(page + spilled + pool.slot_pages * 5))


def test_many_threads(make):
    """A walk, three fault threads and two encoders: every page once, intact, in the order of its lane."""
    pool = make()
    share, lanes = 3000, 4

    def save(lane):
        return pool.save(lane, lane * share, share, lane == 0) or pool.close(lane)

    for lane in range(lanes):  # before any thread runs, as the tracker does: later all slots may be in use
        assert pool.open(lane) == 0
    producers = [Worker(save, lane) for lane in range(lanes)]
    consumers = [Worker(drain, pool) for _ in range(2)]
    assert [producer.finish() for producer in producers] == [0] * lanes
    pool.end()
    chunks = sorted(chunk for consumer in consumers for chunk in consumer.finish())
    assert [ticket for ticket, _, _ in chunks] == list(range(len(chunks)))
    pages = [page for _, _, mine in chunks for page in mine]
    assert sorted(pages) == list(range(lanes * share))
    for lane in range(lanes):
        assert [p for p in pages if p // share == lane] == list(range(lane * share, (lane + 1) * share))
    assert pool.free_slots == pool.pool.slots


def test_each_chunk_is_taken_once(make):
    pool = make(total_pages=1 << 14)
    assert pool.open(0) == 0
    consumers = [Worker(drain, pool) for _ in range(4)]
    assert pool.save(0, 0, 4096, True) == 0
    assert pool.close(0) == 0
    pool.end()
    tickets = sorted(ticket for consumer in consumers for ticket, _, _ in consumer.finish())
    assert tickets == list(range(4096 // pool.slot_pages))


# -- waiting --


def test_the_walk_waits_and_is_woken(make):
    pool = make()
    assert pool.open(0) == 0
    pages = pool.slot_pages * (pool.pool.slots + 3)
    walk = Worker(pool.save, 0, 0, pages, True)
    until(lambda: pool.waiters == 1)
    assert pool.free_slots == pool.reserve, "the reserve is for faults only"
    assert walk.is_alive()
    assert pool.pool.spilled_bytes == 0
    seen = 0
    while walk.is_alive() or pool.queued:
        if pool.queued:
            _, _, spilled, mine = pool.take()
            assert not spilled
            seen += len(mine)
    assert walk.finish() == 0
    assert pool.waiters == 0
    assert pool.close(0) == 0
    assert seen + len(pool.take()[3]) == pages


def test_a_fault_takes_the_reserve_and_then_spills(make):
    pool = make()
    assert pool.open(0) == 0
    assert pool.open(1) == 0
    walk = Worker(pool.save, 0, 0, pool.slot_pages * pool.pool.slots, True)
    until(lambda: pool.waiters == 1)
    before = pool.free_slots
    assert before == pool.reserve
    # This thread is the fault lane: each call returns, although no encoder takes chunks.
    assert pool.save(1, 1 << 20, pool.slot_pages * (before + 1), False) == 0
    assert pool.free_slots == 0
    assert pool.pool.spilled_bytes == 0
    assert pool.save(1, 2 << 20, pool.slot_pages * 3, False) == 0
    assert pool.pool.spilled_bytes == 3 * pool.slot_pages * 4096
    assert walk.is_alive()
    pool.fail()
    assert walk.finish() == 0


def test_an_encoder_waits_for_a_chunk(make):
    pool = make()
    assert pool.open(0) == 0
    encoder = Worker(pool.take)
    assert pool.save(0, 5, 1, True) == 0
    assert encoder.is_alive()
    assert pool.close(0) == 0
    assert encoder.finish() == (1, 0, False, [5])


def test_a_failed_pool_wakes_everybody(make):
    pool = make()
    fill_up(pool, 1)
    assert pool.open(0) == errno.ENOBUFS
    pool = make()
    assert pool.open(0) == 0
    walk = Worker(pool.save, 0, 0, pool.slot_pages * 2 * pool.pool.slots, True)
    until(lambda: pool.waiters == 1)
    idle = make()
    encoders = [Worker(idle.take) for _ in range(3)]
    pool.fail()
    idle.fail()
    assert walk.finish() == 0, "it continues with its own slot, and its pages are discarded"
    assert [encoder.finish()[0] for encoder in encoders] == [-1] * 3
    assert pool.take()[0] == -1, "although chunks are queued"


def test_the_end_wakes_encoders(make):
    pool = make()
    encoders = [Worker(pool.take) for _ in range(3)]
    pool.end()
    assert [encoder.finish()[0] for encoder in encoders] == [0] * 3


# -- the page map --


@pytest.mark.parametrize("first", [0, 1], ids=["by the pool", "begun by the copying thread"])
def test_checksums_of_what_is_queued(make, first):
    """The checksum is complete no matter how much of the slot was summed when it was queued."""
    driver = make()
    driver.open(0)
    driver.sum_up(0)
    assert driver.save(0, first, 2 * driver.slot_pages + 3, True) == 0
    assert driver.close(0) == 0
    taken = [page for _ in range(3) for page in driver.take()[3]]
    assert taken == list(range(first, first + 2 * driver.slot_pages + 3))
    assert driver.summed == 3


def test_entries_merge(make):
    pool = make()
    assert pool.open(0) == 0
    for page, pages, kind in [
        (0, 1, DATA), (1, 1, DATA), (2, 3, DATA), (5, 1, ZERO), (6, 10, ZERO), (16, 1, HOLE),
        (18, 1, HOLE), (17, 1, HOLE), (18, 1, LOST), (19, 1, DATA),
    ]:  # fmt: skip
        pool.entry(0, page, pages, kind)
    assert pool.entries(0) == [(0, 5, DATA), (5, 11, ZERO), (16, 1, HOLE), (18, 1, HOLE), (17, 1, HOLE),
                               (18, 1, LOST), (19, 1, DATA)]  # fmt: skip


def test_an_entry_has_a_longest_run(make):
    pool = make()
    most = 1 << 22
    assert pool.open(0) == 0
    pool.entry(0, 0, most - 1, HOLE)
    pool.entry(0, most - 1, 1, HOLE)
    pool.entry(0, most, 1, HOLE)
    assert pool.entries(0) == [(0, most, HOLE), (most, 1, HOLE)]


def test_a_full_page_map_makes_a_new_chunk(make):
    """Zero pages take no space for data, but the size of the map is limited."""
    pool = make()
    assert pool.open(0) == 0
    for page in range(0, 5000, 2):
        assert pool.room(0, 1, True) == 0
        pool.entry(0, page, 1, ZERO)
    assert pool.queued == 1
    assert len(pool.entries(0)) == 2500 - 2048


def test_nothing_saved_is_no_chunk(make):
    pool = make()
    assert pool.open(0) == 0
    assert pool.free_slots == pool.pool.slots - 1
    assert pool.close(0) == 0
    assert pool.close(0) == 0
    assert pool.free_slots == pool.pool.slots
    pool.end()
    assert drain(pool) == []


# -- bounds --


@pytest.mark.parametrize("limit", [16 * MIB, 64 * MIB, 100 * MIB + 12345])
@pytest.mark.parametrize(("lanes", "encoders"), [(2, 1), (5, 2), (9, 4)])
def test_the_memory_limit_is_kept(limit, lanes, encoders):
    pool = Pool(limit, 1 << 24, lanes, encoders)
    assert (pool.slots + 2 * encoders) * pool.stride <= limit
    assert pool.slots >= 2 * lanes + 2
    assert pool.stride - (SLOT_BYTES if pool.stride > SLOT_BYTES else SMALL_SLOT_BYTES) == 2048 * 8
    assert pool.peak_bytes == 0
    pool.close()
    pool.close()


def test_a_small_target_gets_a_small_pool():
    pool = Pool(1 << 30, 100, 2, 1)
    assert pool.slots * pool.stride < 10 * MIB
    pool.close()


def test_peak(make):
    pool = make()
    fill_up(pool, 1)
    assert pool.pool.peak_bytes == pool.pool.slots * pool.pool.stride
    for _ in range(3):
        pool.take()
    assert pool.pool.peak_bytes == pool.pool.slots * pool.pool.stride


@pytest.mark.parametrize(("limit", "lanes", "encoders"), [(0, 1, 1), (1 * MIB, 2, 1), (16 * MIB, 30, 4)])
def test_too_small_a_limit(limit, lanes, encoders):
    with pytest.raises(ValueError, match="memory_limit"):
        Pool(limit, 1 << 20, lanes, encoders)


# -- the spill file --


def test_the_spill_file_is_made_where_asked_and_has_no_name(make, tmp_path):
    pool = make(spill_dir=str(tmp_path))
    assert os.listdir(tmp_path) == []
    assert os.fstat(pool.spill_fd).st_dev == tmp_path.stat().st_dev
    with pytest.raises(FileNotFoundError):
        make(spill_dir=str(tmp_path / "nowhere"))


def test_what_was_read_back_gives_its_place_back(make):
    pool = make(spill_dir="/dev/shm")
    page = fill_up(pool, 1)
    assert pool.save(1, page, pool.slot_pages * 10, False) == 0
    assert os.fstat(pool.spill_fd).st_blocks * 512 >= 10 * pool.slot_pages * 4096
    assert pool.close(1) == 0
    pool.end()
    assert sum(spilled for _, spilled, _ in drain(pool)) == 10
    assert os.fstat(pool.spill_fd).st_blocks == 0


def test_a_disk_that_is_full(make):
    """The spilling thread gets the errno; it does not wait."""
    pool = make()
    page = fill_up(pool, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # Python ignores SIGXFSZ
    try:
        assert pool.save(1, page, pool.slot_pages, False) == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_spill_file_that_lost_bytes(make):
    pool = make()
    page = fill_up(pool, 1)
    assert pool.save(1, page, pool.slot_pages * 2, False) == 0
    os.ftruncate(pool.spill_fd, 1000)
    slots = pool.pool.slots - 1
    for _ in range(slots):
        pool.take()
    with pytest.raises(OSError, match=f"chunk {slots}") as caught:
        pool.take()
    assert caught.value.errno == errno.EIO

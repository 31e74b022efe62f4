"""Figures that a bench computes from a guest's counters (bench/writerkit.py): known numbers, and a guest."""

import pytest
import writerkit
from patientkit import PeerTarget
from waitkit import attempts
from writerkit import BIN_NS

import snapengine
from snapengine.guest.params import GuestParams
from snapengine.guest.process import GuestProcess

MS = 1_000_000


def stats(histogram, writes=(0,)):
    return {"stalls": {"histogram": histogram}, "writes": list(writes)}


def test_stalls_between_two_readings():
    before = stats([(3000, 5), (4000, 1)])
    after = stats([(3000, 5), (4000, 3), (9000, 1)])
    assert writerkit.stalls_between(before, after) == {4000: 2, 9000: 1}
    assert writerkit.stalls_between(after, after) == {}


def test_quantiles_are_of_the_counts():
    histogram = {10: 50, 20: 49, 1000: 1}
    assert writerkit.spread(histogram) == {"stalls": 100, "p50_ns": 10, "p99_ns": 20, "longest_ns": 1000}
    assert writerkit.quantile(histogram, 1.0) == 1000
    assert writerkit.spread({}) == {"stalls": 0, "p50_ns": 0, "p99_ns": 0, "longest_ns": 0}


def test_lost_work_is_the_integral_of_the_missing_writes():
    full = [(at * BIN_NS, 100) for at in range(10)]  # 100 in 10 ms: 10 000 a second
    assert writerkit.lost_work_ms(full, 0, 100 * MS, 10_000) == pytest.approx(0)
    half = [(at, writes // 2) for at, writes in full]
    assert writerkit.lost_work_ms(half, 0, 100 * MS, 10_000) == pytest.approx(50)
    hole = full[:4] + full[7:]  # bins without a write are left out
    assert writerkit.lost_work_ms(hole, 0, 100 * MS, 10_000) == pytest.approx(30)
    assert writerkit.lost_work_ms(full, 0, 50 * MS, 10_000) == pytest.approx(0), "later bins do not count"


def test_bins_around_a_snapshot_have_those_without_a_write():
    found = writerkit.bins_around([(0, 7), (3 * BIN_NS, 2)], 2 * BIN_NS, 4 * BIN_NS)
    assert found["writes"] == [7, 0, 0, 2]
    assert found["at_ns"] == [-2 * BIN_NS, -BIN_NS, 0, BIN_NS]
    assert found["ended_ns"] == 2 * BIN_NS


def test_what_began_before_t_is_over_when_every_writer_has_written_once_more():
    readings = iter(
        [
            stats([], writes=(10, 20)),
            stats([(5000, 1)], writes=(11, 20)),  # the second writer is still stopped
            stats([(5000, 1), (9_000_000, 1)], writes=(12, 21)),
            stats([], writes=(0, 0)),
        ]
    )
    base = writerkit.after_arming(lambda: next(readings))
    assert base["stalls"]["histogram"] == [(5000, 1), (9_000_000, 1)]


def test_a_writer_that_stands_for_ever_is_an_error():
    with pytest.raises(TimeoutError, match="not completed one write"):
        writerkit.after_arming(lambda: stats([], writes=(3,)), timeout_s=0.01)


@pytest.mark.parametrize(
    ("stalls", "faults", "expected"),
    [
        ({8000: 100}, [(8000, 100)], 1.0),
        ({8000: 90}, [(8000, 100)], 0.9),
        ({8000: 100}, [(8000, 90)], 0.9),
        ({}, [(8000, 90)], 0.0),
    ],
)
def test_counts_agree_in_both_directions(stalls, faults, expected):
    assert writerkit.agreement(stalls, faults)["counts_agree_ratio"] == pytest.approx(expected)


@pytest.mark.usefixtures("requires_uffd")
def test_a_writer_and_the_engine_see_the_same_faults(tmp_path):
    """Both count the same events. Durations are not compared: the writer's times contain the engine's."""
    path = tmp_path / "socket"
    slow = {"memory_limit": 16 << 20, "rate_limit": 24 << 20}  # most faults come after the first reading
    with GuestProcess(path, GuestParams(size=64 << 20, incompressible=True), None) as guest:
        # A writer that waits for a CPU counts stalls of its own, which are shorter than most faults.
        for _ in attempts("the writer's stalls are no faults"):
            with snapengine.snapshot(PeerTarget(str(path)), "null:", **slow) as capture:
                began = writerkit.after_arming(guest.stats)
            stalls = writerkit.stalls_between(began, guest.stats())
            assert capture.result.faults > 100
            found = writerkit.agreement(stalls, capture.result.fault_histogram)
            counted = sum(stalls.values()) >= 0.8 * capture.result.faults
            if counted and found["writer_by_engine_p50_ratio"] >= 0.85:
                break


def test_undisturbed_is_the_rate_of_the_writer(tmp_path, monkeypatch):
    monkeypatch.setattr(writerkit, "BASELINE_S", 0.3)
    with GuestProcess(tmp_path / "socket", GuestParams(size=4 << 20), 20_000) as guest:
        for _ in attempts("the rate differs"):
            if writerkit.undisturbed(guest.bins) == pytest.approx(20_000, rel=0.2):
                break

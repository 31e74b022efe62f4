"""The demo: the form of its rows, the table, the picture, and (with userfaultfd) a small run of it."""

import dataclasses
import io
import json
import subprocess
import sys

import pytest

from snapengine.demo.main import parse_rates
from snapengine.demo.rows import COLUMNS, Row, cells, print_rows, summary
from snapengine.demo.run import Span
from snapengine.options import DIRTY_LOGGING, METHODS, WRITE_TRACKING
from snapengine.result import COMPLETED, NOT_CONVERGED, Result

MIB = 1 << 20
RATES = (0, 2000, 10_000, 40_000, 1_234_567)


def make_result(method=WRITE_TRACKING, status=COMPLETED, image_bytes=200 * MIB, **figures):
    values = {
        "region_bytes": 256 * MIB, "nonzero_bytes": 200 * MIB, "pages_total": 65536, "pages_saved": 51200,
        "zero_pages": 10000, "hole_pages": 4336, "duplicate_pages": 0, "faults": 321, "rounds": 1,
        "arm_ns": 4_000_000, "stop_ns": 0, "duration_ns": 1_600_000_000,
        "fault_ns": {"p50": 9000, "p99": 60_000, "max": 900_000},
        "peak_buffer_bytes": 64 * MIB, "spilled_bytes": 0,
    }  # fmt: skip
    return Result(method=method, status=status, image_bytes=image_bytes, **(values | figures))


def make_row(rate=2000, *, method=WRITE_TRACKING, at_most=False, consistent=True, **figures):
    return Row(
        result=make_result(method, **figures),
        write_rate=rate,
        at_most=at_most,
        consistent=consistent,
        stall_ns={"p50": 12_000, "p99": 80_000, "max": 1_000_000},
        writes_kept=None if rate == 0 else 0.97,
    )


@pytest.fixture
def rows():
    """As after a run: images of dirty logging grow with the rate, and the two highest do not converge."""
    made = []
    for step, rate in enumerate(RATES):
        last = rate == RATES[-1]
        made.append(make_row(rate, at_most=last))
        over = step > 2
        made.append(
            make_row(
                rate,
                method=DIRTY_LOGGING,
                at_most=last,
                status=NOT_CONVERGED if over else COMPLETED,
                image_bytes=(200 + 150 * step * step) * MIB,
                duration_ns=(1600 + 1200 * step * step) * 10**6,
                consistent=None if over else True,
            )
        )
    return made


def test_a_row_is_the_figures_of_the_capture_and_of_the_guest():
    row = make_row(1999.6).to_json()
    own = {"write_rate", "consistent", "stall_ns", "writes_kept"}
    assert set(row) == {field.name for field in dataclasses.fields(Result)} | own
    assert row["write_rate"] == 2000
    assert row["consistent"] is True
    assert set(row["stall_ns"]) == {"p50", "p99", "max"}
    assert json.loads(json.dumps(row)) == row


def test_the_cells_of_a_row():
    row = dict(zip(COLUMNS, cells(make_row(10_000)), strict=True))
    assert row["writes/s"] == "10\u202f000"
    assert row["image"] == "200 MiB"
    assert row["÷ non-zero"] == "1.000"
    assert row["time"] == "1.60 s"
    assert row["stall p50"] == "12.0 µs"
    assert row["writes kept"] == "97%"
    assert row["consistent"] == "yes"


def test_the_cells_of_what_has_no_value():
    idle = dict(zip(COLUMNS, cells(make_row(0)), strict=True))
    assert idle["writes kept"] == "-"
    given_up = make_row(40_000, status=NOT_CONVERGED, consistent=None)
    assert dict(zip(COLUMNS, cells(given_up), strict=True))["consistent"] == "-"
    assert dict(zip(COLUMNS, cells(make_row(consistent=False)), strict=True))["consistent"] == "NO"


def test_the_table_shows_every_row(rows):
    out = io.StringIO()
    print_rows(rows, out)
    lines = out.getvalue().splitlines()
    assert lines[0].split()[:2] == ["method", "writes/s"]
    assert sum(line.startswith(METHODS) for line in lines) == len(rows)
    assert "max 1\u202f234\u202f567" in out.getvalue()


def test_the_summary_says_what_the_table_shows(rows):
    tracking, logging = summary(rows).splitlines()
    assert (
        tracking
        == "write-tracking: images of 1.000 to 1.000 x the memory that is not zero; all of them consistent."
    )
    assert "1.000 to 4.000 x" in logging
    assert "did not converge at 40\u202f000, max 1\u202f234\u202f567 writes/s" in logging
    assert "NOT CONSISTENT at 2\u202f000" in summary([make_row(2000, consistent=False)])


def test_stalls_of_a_span_are_those_between_its_ends():
    before = {
        "writes": [100, 50],
        "now_ns": 10**9,
        "stalls": {"max_ns": 5100, "histogram": [[4096, 7], [5120, 1]]},
    }
    after = {
        "writes": [1100, 550],
        "now_ns": 3 * 10**9,
        "stalls": {"max_ns": 9999, "histogram": [[4096, 7], [5120, 90], [6144, 10], [9216, 1]]},
    }
    span = Span(before, after)
    assert span.writes_per_second == 750
    assert span.stalls() == {"p50": 5120, "p99": 6144, "max": 9999}
    assert Span(after, after).stalls() == {"p50": 0, "p99": 0, "max": 0}


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture_is_drawn(rows, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    from snapengine.demo import plot
    from snapengine.report.plots import check_plot

    path = tmp_path / f"demo.{suffix}"
    check_plot(str(path))
    plot.draw(rows, str(path), "256 MiB, sink 128 MiB/s")
    data = path.read_bytes()
    assert len(data) > 10_000
    if suffix == "png":
        assert data.startswith(b"\x89PNG")
        width = int.from_bytes(data[16:20], "big")
        assert width >= 1000


def test_a_picture_without_a_directory_fails_before_the_work(tmp_path):
    from snapengine.report.plots import check_plot

    with pytest.raises(FileNotFoundError):
        check_plot(str(tmp_path / "absent" / "demo.png"))


def test_rates():
    assert parse_rates("0, 2000,max") == (0, 2000, None)
    for wrong in ("", "1,,2", "-5", "fast", "1.5"):
        with pytest.raises(ValueError, match="rates"):
            parse_rates(wrong)


@pytest.mark.timeout(900)
def test_a_small_run(requires_uffd, tmp_path):
    command = [sys.executable, "-m", "snapengine.cli", "demo", "--size", "32M", "--rates", "0,2000,max",
               "--sink-rate", "64M", "--json", "--keep", str(tmp_path / "kept")]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)
    assert [row["method"] for row in rows] == [*METHODS] * 3
    assert [row["write_rate"] for row in rows[:4]] == [0, 0, 2000, 2000]
    assert rows[4]["write_rate"] > 2000
    for row in rows:
        if row["status"] == COMPLETED:
            assert row["consistent"] is True
        if row["method"] == WRITE_TRACKING:
            assert row["status"] == COMPLETED
            assert row["duplicate_pages"] == 0
            assert row["image_bytes"] <= 1.005 * row["nonzero_bytes"] + 64 * 1024
    images = list((tmp_path / "kept").iterdir())
    assert len(images) == sum(row["status"] == COMPLETED for row in rows)

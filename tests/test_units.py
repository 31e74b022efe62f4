"""Sizes and times are parsed exactly; the error for an invalid one quotes its text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapengine.base.units import format_count, format_ns, format_size, parse_seconds, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("64M", 64 << 20),
        ("64m", 64 << 20),
        ("64MiB", 64 << 20),
        ("1.5GiB", 3 << 29),
        (" 10 kib ", 10240),
        ("0.5K", 512),
        ("1T", 1 << 40),
        ("9007199254740993", 9007199254740993),  # 2**53 + 1: a float would lose it
        ("7.9999990463256836T", None),
    ],
)
def test_parse_size(text, size):
    if size is None:
        with pytest.raises(ValueError, match="whole number"):
            parse_size(text)
    else:
        assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "M", "-1", "+1", "1e6", "64MB", "64 MM", "1,5G", "0x10", "nan", "\u0661"]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_a_size_beyond_any_file_is_refused():
    with pytest.raises(ValueError, match="too large"):
        parse_size("8388608T")


@given(st.integers(0, 2**62), st.sampled_from(["", "B"]))
def test_every_number_of_bytes_comes_back(size, unit):
    assert parse_size(f"{size}{unit}") == size


@pytest.mark.parametrize(("text", "seconds"), [("2", 2.0), ("0.3", 0.3), (".5s", 0.5), ("300ms", 0.3)])
def test_parse_seconds(text, seconds):
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "0", "-1", "inf", "nan", "1h", "1e3"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match="is not a time"):
        parse_seconds(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "0.98 KiB"), (4096, "4.00 KiB"), (1 << 28, "256 MiB"),
     (1023 << 20, "1.00 GiB"), (5 << 50, "5120 TiB")],
)  # fmt: skip
def test_format_size(size, text):
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [(0, "0 ns"), (850, "850 ns"), (12_345, "12.3 µs"), (999_600, "1.00 ms"), (7_890_000_000, "7.89 s")],
)
def test_format_ns(nanoseconds, text):
    assert format_ns(nanoseconds) == text


def test_format_count():
    assert format_count(1234567) == "1\u202f234\u202f567"

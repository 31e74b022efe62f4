"""Latency histogram: quantiles are exact to the width of a bucket, the maximum is exact."""

import math

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapengine.base.histogram import quantiles

LARGEST = 2**64 - 1
SHARES = (0.01, 0.25, 0.5, 0.9, 0.99, 1.0)

latency = st.one_of(st.integers(0, 64), st.integers(0, 10**9), st.integers(0, LARGEST))


@given(st.lists(latency, min_size=1))
def test_against_the_sorted_values(values):
    *found, longest = quantiles(values, SHARES)
    assert longest == max(values)
    exact = sorted(values)
    for share, value in zip(SHARES, found, strict=True):
        wanted = exact[math.ceil(share * len(exact)) - 1]
        assert wanted <= value <= longest, "a histogram may round up, never down"
        assert value <= wanted + wanted // 8, "a bucket is at most 12.5 % wide"


def test_against_numpy():
    values = numpy.random.default_rng(7).lognormal(9, 1.5, 20_000).astype(numpy.uint64)
    p50, p99, longest = quantiles(int(value) for value in values)
    for found, share in ((p50, 0.5), (p99, 0.99)):
        assert found == pytest.approx(float(numpy.quantile(values, share, method="inverted_cdf")), rel=0.125)
    assert longest == int(values.max())


def test_empty():
    assert quantiles([]) == [0, 0, 0]


def test_bounds_are_monotone_and_close():
    """With one value and a far larger one, a quantile of the first is its bucket's upper bound."""
    probes = sorted({max(0, 2**power + step) for power in range(63) for step in (-1, 0, 1, 2**power // 3)})
    tops = [quantiles([value, LARGEST], [0.5])[0] for value in probes]
    assert tops == sorted(tops)
    assert all(value <= top <= value + value // 8 for value, top in zip(probes, tops, strict=True))
    assert tops[: len([p for p in probes if p < 8])] == [p for p in probes if p < 8], "small values are exact"


@pytest.mark.parametrize("value", [0, 7, 8, 15, 16, 2**63, LARGEST])
def test_one_value_is_exact(value):
    """No quantile exceeds the maximum."""
    assert quantiles([value]) == [value] * 3

"""Copy and zero test: every implementation gives the results of the scalar one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapengine.base.checksum import crc32c_of
from snapengine.base.pages import KERNEL, KERNELS, SUM_KERNELS, copy_sum_with, copy_with, nonzero_with

PAGE = 4096

# Mostly zeros with a few bytes set, or a short pattern repeated: random bytes are never nearly zero.
pages = st.one_of(
    st.dictionaries(st.integers(0, PAGE - 1), st.integers(1, 255), max_size=5).map(
        lambda spots: bytes(spots.get(i, 0) for i in range(PAGE))
    ),
    st.binary(min_size=1, max_size=64).map(lambda part: (part * PAGE)[:PAGE]),
)


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param


def test_the_fastest_runs():
    assert KERNELS[-1] == KERNEL
    assert KERNELS[0] == "scalar"


@given(pages)
def test_every_version_equals_the_scalar_one(page):
    expected = bytearray(PAGE)
    nonzero = copy_with("scalar", expected, page)
    assert bytes(expected) == page
    assert nonzero == any(page)
    for name in KERNELS:
        dst = bytearray(b"\xaa" * PAGE)
        assert copy_with(name, dst, page) == nonzero
        assert dst == expected
        assert nonzero_with(name, page) == nonzero


@given(pages, st.integers(0, 0xFFFFFFFF))
def test_copied_and_summed(page, crc):
    for name in SUM_KERNELS:
        dst = bytearray(b"\xaa" * PAGE)
        assert copy_sum_with(name, dst, page, crc) == (crc32c_of(page, crc) if any(page) else None)
        assert dst == page


@pytest.mark.parametrize("name", SUM_KERNELS)
def test_one_byte_anywhere_is_summed(name):
    page, dst = bytearray(PAGE), bytearray(PAGE)
    for at in range(PAGE):
        page[at] = 1 << at % 8
        assert copy_sum_with(name, dst, page) == crc32c_of(page)
        page[at] = 0
    assert copy_sum_with(name, dst, page) is None


def test_one_byte_anywhere_counts(kernel):
    page, dst = bytearray(PAGE), bytearray(PAGE)
    for at in range(PAGE):
        page[at] = 1 << at % 8
        assert nonzero_with(kernel, page)
        assert copy_with(kernel, dst, page)
        assert dst[at] == page[at]
        page[at] = 0
    assert not nonzero_with(kernel, page)
    assert not copy_with(kernel, dst, page)
    assert dst == page


@pytest.mark.parametrize("shift", [1, 3, 8, 17, 31, 63])
def test_unaligned(kernel, shift):
    """The bytes around a page are neither treated as part of it nor written to."""
    source = bytearray(b"\xff" * (PAGE + 128))
    source[shift : shift + PAGE] = bytes(PAGE)
    room = bytearray(b"\x55" * (PAGE + 128))
    src = memoryview(source)[shift : shift + PAGE]
    dst = memoryview(room)[64 - shift : 64 - shift + PAGE]
    assert not nonzero_with(kernel, src)
    assert not copy_with(kernel, dst, src)
    assert dst == bytes(PAGE)
    assert room.count(0x55) == 128
    src[PAGE - 1] = 9
    assert copy_with(kernel, dst, src)
    assert dst == src
    assert room[: 64 - shift] + room[64 - shift + PAGE :] == b"\x55" * 128


def test_wrong_arguments(kernel):
    with pytest.raises(ValueError, match="4096"):
        copy_with(kernel, bytearray(PAGE), bytes(PAGE - 1))
    with pytest.raises(ValueError, match="4096"):
        copy_with(kernel, bytearray(PAGE + 1), bytes(PAGE))
    with pytest.raises(ValueError, match="4096"):
        nonzero_with(kernel, bytes(PAGE + 1))
    with pytest.raises(ValueError, match="none of apart"):
        copy_sum_with("mmx", bytearray(PAGE), bytes(PAGE))
    with pytest.raises(ValueError, match="4096"):
        copy_sum_with("apart", bytearray(PAGE), bytes(PAGE - 1))
    with pytest.raises(ValueError, match="none of scalar"):
        copy_with("mmx", bytearray(PAGE), bytes(PAGE))
    with pytest.raises(ValueError, match="none of scalar"):
        nonzero_with("mmx", bytes(PAGE))

"""CRC-32C: known answers, continuation, and equal results of all implementations."""

import numpy as np
import pytest

from snapengine.base.checksum import KERNELS, crc32c_of, crc32c_with


@pytest.mark.parametrize(
    ("data", "crc"),
    [  # RFC 3720, appendix B.4; the first is the check value of the catalogue of CRCs
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (b"", 0),
    ],
)
def test_known_answers(data, crc):
    assert crc32c_of(data) == crc


def test_continues():
    data = bytes(range(256)) * 17
    for cut in (0, 1, 7, 8, 4095, 4096, len(data)):
        assert crc32c_of(data[cut:], crc32c_of(data[:cut])) == crc32c_of(data)


def test_any_contiguous_bytes():
    array = np.arange(10000, dtype=np.uint8)
    assert crc32c_of(array) == crc32c_of(array.tobytes()) == crc32c_of(memoryview(bytearray(array.tobytes())))
    with pytest.raises(ValueError, match="contiguous"):
        crc32c_of(array[::2])


def test_every_version_equals_the_library():
    """All lengths around the 256 bytes that are folded at once, at any alignment, with any initial value."""
    data = np.random.default_rng(1).integers(0, 256, 5000, dtype=np.uint8)
    lengths = [*range(70), *range(240, 300), *range(500, 530), 1023, 1024, 4095, 4096, 4097, 4999]
    for length in lengths:
        for start in (0, 1, 7):
            part = data[start : start + length]
            crc = 0x9E3779B9 * length & 0xFFFFFFFF
            expected = crc32c_with("libcrc32c", part, crc)
            for kernel in KERNELS:
                assert crc32c_with(kernel, part, crc) == expected, (kernel, start, length)


def test_every_bit_counts():
    page = bytearray(1024)
    for kernel in KERNELS:
        seen = {crc32c_with(kernel, page)}
        for bit in range(8 * len(page)):
            page[bit // 8] = 1 << bit % 8
            seen.add(crc32c_with(kernel, page))
            page[bit // 8] = 0
        assert len(seen) == 1 + 8 * len(page)


def test_a_version_that_cannot_run():
    with pytest.raises(ValueError, match="none of libcrc32c"):
        crc32c_with("md5", b"")

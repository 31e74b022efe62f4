"""CRC-32C: the known answers, and that it can be continued."""

import numpy as np
import pytest

from snapengine.checksum import crc32c_of


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

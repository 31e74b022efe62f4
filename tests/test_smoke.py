"""One snapshot of a buffer, end to end: what `make check-dist` runs against the installed wheel."""

import snapengine
from snapengine.image import open_image


def test_a_snapshot_of_a_buffer_comes_back(requires_uffd, tmp_path):
    size = 8 << 20
    before = bytes(range(256)) * (size // 256)
    buffer = bytearray(before)
    path = tmp_path / "buffer.img"
    with snapengine.snapshot(buffer, path, compress="zstd") as capture:
        buffer[:] = bytes(size)  # after the instant: none of it may be in the image
    assert capture.result.status == "completed"
    with open_image(path) as image:
        image.verify()
        restored = bytearray(size)
        image.restore_into(image.regions[0].name, restored)
    assert restored == before
    assert buffer == bytes(size)

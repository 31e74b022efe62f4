"""Encoders: which chunks are compressed, and which are stored raw."""

import pytest
from patientkit import PeerTarget
from waitkit import attempts

import snapengine
from snapengine.guest.image import check_image
from snapengine.guest.params import GuestParams
from snapengine.image import open_image

MIB = 1 << 20
# Level 15 is slow enough to fill this small pool; raw bytes would be written to the sink at once.
SLOW = {"memory_limit": 16 * MIB, "compress": "zstd:15"}


def save(socket, path, **options):
    """The result, and the number of chunks by encoding."""
    method = options.get("method", "write-tracking")
    target = PeerTarget(socket, method=method)
    with snapengine.snapshot(target, path, spill_dir=str(path.parent), **options) as capture:
        pass
    with open_image(path) as image:
        image.verify()
        check_image(image)
        return capture.result, image.info()["encodings"]


def test_a_walk_that_waits_stores_nothing_raw(guest, tmp_path):
    with guest(GuestParams(size=32 * MIB), 0) as socket:
        result, kinds = save(socket, tmp_path / "image", **SLOW)
    assert result.faults == 0
    assert kinds["zstd"] > 0
    assert kinds["raw"] == 0


def test_a_round_of_dirty_logging_does_not_wait_for_compression(guest, tmp_path):
    with guest(GuestParams(size=32 * MIB), 0) as socket:
        _, kinds = save(socket, tmp_path / "image", method="dirty-logging", **SLOW)
    assert kinds["raw"] > 0


@pytest.mark.parametrize("always", [False, True])
def test_writers_that_fault_are_not_held_up(guest, tmp_path, always):
    options = SLOW | {"compress": "zstd:15:always"} if always else SLOW
    with guest(GuestParams(size=32 * MIB)) as socket:
        # The writers may get no CPU while the queue is full: then no writer has to wait.
        for _ in attempts("no writer faulted while chunks waited for compression"):
            result, kinds = save(socket, tmp_path / "image", **options)
            assert not (always and kinds["raw"])
            if result.faults and (always or kinds["raw"]):
                break

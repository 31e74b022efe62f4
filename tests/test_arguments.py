"""Invalid options and arguments are refused before the sink and the target are opened."""

import os

import pytest

import snapengine
from snapengine.capture import arguments
from snapengine.capture.capture import Capture
from snapengine.errors import UnsupportedError
from snapengine.options import Options
from snapengine.process.target import ProcessTarget

MIB = 1 << 20


class Untouched(snapengine.BufferTarget):
    """It must not be opened."""

    def open(self, features):
        pytest.fail("the target was opened")


class Process(ProcessTarget):
    def check(self):
        pytest.fail("the process was looked at")

    def open(self, features):
        pytest.fail("the process was attached to")


def buffer(can_pause=True):
    calls = {"pause": lambda: None, "resume": lambda: None} if can_pause else {}
    return Untouched(bytearray(MIB), **calls)


def process(**more):
    return Process(os.getpid(), **more)


CASES = {
    "room": (buffer, {"memory_limit": 16 * MIB, "fault_threads": 64}, {}, ValueError, "too few for 6"),
    "room for encoders": (buffer, {"memory_limit": 16 * MIB, "encoder_threads": 64}, {}, ValueError, "too"),
    "spill": (buffer, {"spill_dir": "/nowhere"}, {}, FileNotFoundError, "/nowhere"),
    "no pause": (lambda: buffer(False), {"method": "dirty-logging"}, {}, ValueError, "give pause and resume"),
    "method": (process, {"method": "dirty-logging"}, {}, ValueError, "made for write-tracking, the options"),
    "no name": (buffer, {}, {"": b""}, ValueError, "has 0 bytes"),
    "long name": (buffer, {}, {"é" * 2049: b""}, ValueError, "has 4098 bytes; 1 to 4096"),
    "NUL": (buffer, {}, {"a\0b": b""}, ValueError, "contains a NUL"),
    "surrogate": (buffer, {}, {"\ud800": b""}, ValueError, "surrogate"),
    "name": (buffer, {}, {b"a": b""}, TypeError, "is no str"),
    "blob": (buffer, {}, {"a": "text"}, TypeError, "the blob 'a' is str, not bytes"),
    "taken": (process, {}, {"process": b""}, ValueError, "describes the process"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_before_anything_is_opened(tmp_path, case):
    make, options, vmstate, error, text = CASES[case]
    capture = snapengine.snapshot(make(), tmp_path / "image", vmstate=vmstate, **options)
    with pytest.raises(error, match=text):
        capture.start()
    assert list(tmp_path.iterdir()) == []
    assert capture.wait(0)


@pytest.mark.parametrize("options", [{"method": "dirty-logging"}, {"strict": True}])
def test_a_kernel_that_cannot(tmp_path, monkeypatch, options):
    class OldKernel(Capture):
        _session_extra = {"use_scan": False}  # noqa: RUF012

    monkeypatch.setattr(arguments, "has_wp_bits", lambda: False)
    capture = OldKernel(buffer(), tmp_path / "image", Options(**options), {})
    with pytest.raises(UnsupportedError, match=r"Linux (6\.7|5\.14)"):
        capture.start()
    assert list(tmp_path.iterdir()) == []


def test_what_fits_just_so(requires_uffd, tmp_path):
    """The pool has room for the largest number of fault threads that is accepted."""
    most = max(n for n in range(1, 65) if _fits(n))
    assert most < 64
    with snapengine.snapshot(
        bytearray(17 * MIB), tmp_path / "image", memory_limit=16 * MIB, fault_threads=most
    ) as capture:
        pass
    assert capture.result.status == "completed"


def _fits(threads):
    try:
        arguments.check_before_open(
            buffer(), Options(memory_limit=16 * MIB, fault_threads=threads), {}, {}
        )
    except ValueError:
        return False
    return True

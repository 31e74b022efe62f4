"""The instant T that a capture reports: on both clocks, and compared with the memory."""

import dataclasses
import json
import os
import struct
import subprocess
import sys
import threading
import time

import pytest
import streamkit
from capturekit import anonymous, saved, snap
from patientkit import ProcessTarget
from targetkit import Target
from waitkit import PATIENCE_S

import snapengine
from snapengine.capture.instant import to_unix_ns
from snapengine.image import open_image
from snapengine.qemu.from_stream import ingest
from snapengine.report.result_table import figures_rows
from snapengine.storage.sinks import MemorySink

MIB = 1 << 20
SECOND = 10**9
COMMAND = [sys.executable, "-m", "snapengine.cli"]


def clocks():
    return time.monotonic_ns(), time.time_ns()


def check_between(result, before, after):
    """The largest difference in rate between CLOCK_MONOTONIC and a wall clock that NTP slews."""
    assert before[0] <= result.t_monotonic_ns <= after[0]
    assert before[1] - SECOND // 1000 <= result.t_unix_ns <= after[1] + SECOND // 1000


def test_the_conversion():
    assert to_unix_ns(0) == 0
    before, now, after = time.time_ns(), time.monotonic_ns(), time.time_ns()
    assert before - SECOND // 1000 <= to_unix_ns(now) <= after + SECOND // 1000
    assert to_unix_ns(now - 5 * SECOND) - to_unix_ns(now) == pytest.approx(-5 * SECOND, abs=SECOND // 1000)


@pytest.mark.usefixtures("requires_uffd")
@pytest.mark.parametrize("arming", ["plain", "two-step"])
def test_it_is_between_the_callers_readings_around_start(tmp_path, arming):
    capture = snapengine.snapshot(anonymous(4 * MIB), tmp_path / "image", arming=arming)
    before = clocks()
    capture.start()
    after = clocks()
    capture.wait()
    check_between(capture.result, before, after)


@pytest.mark.usefixtures("requires_uffd")
def test_it_is_in_the_pause_of_dirty_logging(tmp_path):
    times = []
    target = snapengine.BufferTarget(
        anonymous(4 * MIB), pause=lambda: times.append(clocks()), resume=lambda: times.append(clocks())
    )
    result = snap(target, tmp_path / "image", method="dirty-logging")
    check_between(result, *times)


@pytest.mark.usefixtures("requires_uffd", "programs")
@pytest.mark.parametrize("cut", ["soft", "stop"])
def test_another_process(tmp_path, cut):
    with Target("compute", 4) as target:
        capture = snapengine.snapshot(ProcessTarget(target.pid, cut=cut), tmp_path / "image")
        before = clocks()
        capture.start()
        after = clocks()
        capture.wait()
    check_between(capture.result, before, after)


@pytest.mark.usefixtures("requires_uffd")
@pytest.mark.parametrize("arming", ["plain", "two-step"])
def test_it_is_between_the_last_write_in_the_image_and_the_next_one(tmp_path, arming):
    """A writer writes the time into the memory. The write in the image began before T, and the next write
    ended after T."""
    memory = anonymous(4 * MIB)
    words = memoryview(memory).cast("Q")
    writes = []
    stop = threading.Event()
    begun = threading.Event()

    def write():
        while not stop.is_set():
            stamp = time.monotonic_ns()
            words[MIB // 8] = stamp  # one store; struct.pack_into() would store zeros before
            writes.append((stamp, time.monotonic_ns()))
            begun.set()

    def wait_for_a_write():
        count = len(writes)
        deadline = time.monotonic() + PATIENCE_S
        while len(writes) < count + 2 and time.monotonic() < deadline:
            time.sleep(0.0001)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert begun.wait(PATIENCE_S)
        result = snap(memory, tmp_path / "image", wait_for_a_write, arming=arming)
    finally:
        stop.set()
        writer.join()
    (last,) = struct.unpack_from("<Q", saved(tmp_path / "image"), MIB)
    following = min(end for stamp, end in writes if stamp > last)
    assert last <= result.t_monotonic_ns <= following


@pytest.mark.usefixtures("requires_uffd")
def test_image_and_commands_say_what_the_result_says(tmp_path):
    path = tmp_path / "image"
    result = snap(bytearray(100_000), path)
    with open_image(path) as image:
        assert image.stats["t_monotonic_ns"] == result.t_monotonic_ns
        assert image.stats["t_unix_ns"] == result.t_unix_ns
    told = json.loads(subprocess.check_output([*COMMAND, "info", "--json", path]))
    assert (told["t_monotonic_ns"], told["t_unix_ns"]) == (result.t_monotonic_ns, result.t_unix_ns)
    east = subprocess.check_output(
        [*COMMAND, "info", path], text=True, env={**os.environ, "TZ": "XXX-05:30"}
    )
    (line,) = [line for line in east.splitlines() if line.startswith("instant")]
    moved = time.gmtime(result.t_unix_ns // SECOND + 5 * 3600 + 30 * 60)
    micros = result.t_unix_ns % SECOND // 1000
    assert line.split(maxsplit=1)[1] == f"{time.strftime('%Y-%m-%d %H:%M:%S', moved)}.{micros:06d} +05:30"


def test_an_ingested_stream_does_not_say_it():
    sink = MemorySink()
    with open(os.memfd_create("stream"), "w+b") as file:
        file.write(streamkit.stream([("pc.ram", 0, b"x" * 4096)]))
        file.seek(0)
        result = ingest(file.fileno(), sink)
    assert (result.t_monotonic_ns, result.t_unix_ns) == (0, 0)
    assert dict(figures_rows(result))["instant"] == "not known"
    none = dataclasses.replace(result, status="not-converged")
    assert dict(figures_rows(none))["instant"] == "none: there is no image"

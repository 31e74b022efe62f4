"""`qemu analyze`: its statistics match the stream, and its sizes match the images that `ingest` writes."""

import json
import os
import subprocess
import sys

import pytest
import streamkit as kit
from test_from_stream import many_pages
from waitkit import PATIENCE_S

from snapengine.errors import StreamError
from snapengine.options import Options
from snapengine.qemu.analyze import analyze
from snapengine.qemu.from_stream import ingest
from snapengine.report.stream_plot import bins

DATA = kit.stream(kit.SOME_PAGES)


def analyzed(path, **how):
    with path.open("rb") as file:
        return analyze(file.fileno(), **how)


def test_figures(tmp_path):
    (tmp_path / "stream").write_bytes(DATA)
    found = analyzed(tmp_path / "stream", spill_dir=str(tmp_path))
    assert found.stream_bytes == len(DATA)
    assert found.machine_type == kit.MACHINE
    assert found.ram_blocks == kit.BLOCKS
    assert found.ram_end
    assert (found.page_records, found.zero_records, found.duplicate_records) == (8, 2, 4)
    assert (found.data_pages, found.zero_pages, found.absent_pages, found.pages_total) == (4, 2, 62, 68)
    assert found.times_sent == {0: 62, 1: 2, 2: 4}
    assert [section.name for section in found.devices] == ["timer", "cpu"]
    sizes = found.head_bytes, found.ram_bytes, found.description_bytes
    assert sum(sizes) + sum(section.size for section in found.devices) == len(DATA)
    assert os.listdir(tmp_path) == ["stream"]


def test_images_are_as_large_as_it_says(tmp_path):
    stream = kit.stream(many_pages(3000), blocks=[("pc.ram", 3000 * 4096)])
    (tmp_path / "stream").write_bytes(stream)
    found = analyzed(tmp_path / "stream", compress="zstd:3")
    assert list(found.image_bytes) == ["none", "zstd:3"]
    assert found.duplicate_records == 6000 - (3000 - found.times_sent[0])
    for way, size in found.image_bytes.items():
        with (tmp_path / "stream").open("rb") as file:
            result = ingest(file.fileno(), "null:", Options(compress=way))
        assert abs(result.image_bytes - size) < 32  # the digits of the times in the statistics vary


def test_a_histogram_of_many_bars():
    shown = bins({times: 10 for times in range(1, 101)})
    assert len(shown) == 24
    assert sum(shown.values()) == 1000
    assert shown["≥ 24"] == 770


def command(*words, **how):
    line = [sys.executable, "-m", "snapengine.cli", "qemu", "analyze", *map(str, words)]
    return subprocess.run(line, capture_output=True, check=False, timeout=PATIENCE_S, **how)


def test_command(tmp_path):
    (tmp_path / "stream").write_bytes(DATA)
    done = command("stream", "--plot", "out.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    words = done.stdout.decode()
    for word in (kit.MACHINE, "4 with data, 2 zero, 62 not in it", "4 superseded", "pc.bios", "timer"):
        assert word in words
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    done = command("-", "--json", input=DATA)
    found = json.loads(done.stdout)
    assert found["times_sent"] == {"0": 62, "1": 2, "2": 4}
    assert found["devices"][0]["name"] == "timer"


def test_command_refuses(tmp_path):
    (tmp_path / "stream").write_bytes(DATA[:-1])
    done = command("stream", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(b"snapengine: error: stream: the stream ends early")
    assert command("stream", "--compress", "none?", cwd=tmp_path).returncode == 2
    assert command("none", cwd=tmp_path).returncode == 1
    with pytest.raises(StreamError):
        analyzed(tmp_path / "stream")

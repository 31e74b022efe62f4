"""Names are bytes: names of processes, threads, files, memory files, regions, blobs and images."""

import contextlib
import io
import json
import mmap
import os
import subprocess
import sys

import pytest
from image_kit import HOLE, opened
from targetkit import VALUES, Target

import snapengine
from snapengine.base.names import decode, encode, escape, from_argument, one_line, printable, unescape
from snapengine.errors import NoSuchRegionError
from snapengine.export.elf_core import export_core
from snapengine.image import open_image
from snapengine.image.writer import Writer
from snapengine.kernel.procmaps import parse_line, read_maps
from snapengine.process.record import process_of
from snapengine.process.target import ProcessTarget
from snapengine.regions import Region
from snapengine.storage.sinks import FileSink, MemorySink

COMMAND = [sys.executable, "-m", "snapengine.cli"]
NOT_TEXT = b"caf\xe9 \xff"
CUT_NAME = "worker-线程池-1".encode()[:15]  # the kernel truncates here, inside a character
NASTY = b"a\x1b[31m\rTracerPid:\t1\r\x0bVmPin:\t9 kB\x85 \\x"


def run(*arguments, **keywords):
    keywords = {"capture_output": True, "timeout": 120} | keywords
    return subprocess.run([*COMMAND, *arguments], check=False, **keywords)


# --- the helper -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"plain", NOT_TEXT, NASTY, CUT_NAME, "käse".encode(), bytes(range(1, 256))])
def test_every_byte_is_kept_and_nothing_controls_a_terminal(data):
    name = decode(data)
    assert encode(name) == data
    assert unescape(escape(name)) == name
    json.dumps(escape(name), ensure_ascii=False).encode()
    assert printable(name).isprintable()
    assert from_argument(os.fsdecode(data)) == name
    printable(name).encode()


def test_printable_names_stay_and_others_can_be_told_apart():
    assert printable("käse-线") == "käse-线"
    assert printable(decode(b"\xe9")) == r"\xe9"
    assert printable(r"\xe9") == r"\\xe9"
    assert printable("\x1b[2J") == r"\x1b[2J"
    assert printable("\ud800") == r"\ud800"
    assert one_line("a\n\tb\x1b]0;x\x07 \r\nc") == r"a b\x1b]0;x\x07 c"
    with pytest.raises(ValueError, match="lone surrogate"):
        encode("\ud800")


# --- in an image ----------------------------------------------------------------------------------------


def image_with(names, blobs=()):
    sink = MemorySink()
    writer = Writer(sink)
    writer.begin([(Region(name, 0x10000 * (1 + i), 4096), i) for i, name in enumerate(names)])
    writer.py_chunk([(0, len(names), HOLE)], b"")
    for name in blobs:
        writer.vmstate(name, b"x")
    writer.finish({})
    sink.commit()
    return sink.getvalue()


def test_names_of_regions_and_blobs_are_bytes_in_the_image():
    name = decode(NOT_TEXT)
    data = image_with([name], [name])
    assert NOT_TEXT in data
    with opened(data) as image:
        assert image.regions[0].name == name
        assert dict(image.vmstate) == {name: b"x"}
        info = json.loads(json.dumps(image.info(), ensure_ascii=False).encode())
        assert unescape(info["regions"][0]["name"]) == name
        assert list(info["vmstate"]) == [escape(name)]
        assert image.read(name, 0, 1) == image.read(printable(name), 0, 1) == b"\0"
        os.close(image.restore_memfd(name))


def test_a_region_is_restored_into_a_memory_file_whatever_its_name():
    with opened(image_with(["界" * 200])) as image:
        os.close(image.restore_memfd(0))


def test_one_of_several_regions_of_a_name():
    with opened(image_with(["[heap]", "other", "[heap]"])) as image:
        with pytest.raises(NoSuchRegionError, match=r"2 regions .*: use \[heap\]@10000") as caught:
            image.region("[heap]")
        assert isinstance(caught.value, KeyError)
        assert "'" not in str(caught.value)[:1]
        assert image.region("[heap]@30000").addr == 0x30000
        with pytest.raises(NoSuchRegionError, match="no region nix; it has"):
            image.region("nix")


def test_regions_are_named_on_the_command_line_as_they_are_shown(tmp_path):
    path, name = tmp_path / "x.img", decode(b"a\xe9\x1b[0m")
    path.write_bytes(image_with([name, "[heap]", "[heap]"], [name]))
    shown = run("info", path)
    assert shown.returncode == 0
    assert b"\x1b" not in shown.stdout + shown.stderr
    assert printable(name).encode() in shown.stdout
    for given in (printable(name), encode(name), "[heap]@20000"):
        done = run("restore", path, given, "-o", "-")
        assert (done.returncode, done.stdout) == (0, bytes(4096)), done.stderr
    for given in ("[heap]", b"\x1b[31m"):
        done = run("restore", path, given, "-o", "-")
        assert done.returncode == 1
        assert b"internal" not in done.stderr
        assert b"\x1b" not in done.stderr
        assert done.stderr.count(b"\n") == 1
    json.loads(run("info", "--json", path).stdout)


# --- of a process ---------------------------------------------------------------------------------------


KINDS = {
    "process": NOT_TEXT,
    "process-nasty": NASTY[:15],
    "thread": "worker-线程池-1".encode(),
    "file": b"caf\xe9",
    "removed": b"a\r\x1b[31mb\n",
    "memfd": b"a b\n/c\r\x85\xff (deleted)",
    "heap": b"-",
}


@pytest.mark.parametrize("cut", ["soft", "stop"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_process_with_names_that_are_no_text(requires_uffd, programs, tmp_path, kind, cut):
    text, image_path = KINDS[kind], tmp_path / "x.img"
    if kind in ("file", "removed"):
        folder = b"/dev/shm" if kind == "removed" else os.fsencode(tmp_path)
        text = folder + b"/%d-" % os.getpid() + text
    with contextlib.ExitStack() as stack:
        target = stack.enter_context(Target("named", kind.partition("-")[0], os.fsdecode(text)))
        start, size = target.words[VALUES], target.words[VALUES + 1]
        assert target.words[1] == 0
        with snapengine.snapshot(ProcessTarget(target.pid, cut=cut), image_path) as capture:
            pass
        assert capture.result.lost_pages == 0
        json.dumps(capture.result.to_json(), ensure_ascii=False).encode()
        pid = str(target.pid)
        checks = [run("info", image_path), run("info", "--json", image_path), run("verify", image_path),
                  run("doctor", "--pid", pid), run("doctor", "--json", "--pid", pid)]  # fmt: skip
    for done in checks:
        assert done.returncode == 0, done.stderr
        assert b"\x1b" not in done.stdout + done.stderr
        assert b"\r" not in done.stdout + done.stderr
    json.loads(checks[1].stdout)
    json.loads(checks[4].stdout)
    with open_image(image_path) as image:
        names = [region.name for region in image.regions]
        assert len(set(names)) == len(names)
        if kind != "file" or cut == "stop":
            assert content(image, start, size) == b"n" * size
        process = process_of(image)
        if kind == "thread" and cut == "stop":
            assert CUT_NAME in [encode(thread.comm) for thread in process.threads]
        if kind.startswith("process"):
            assert encode(process.comm) == text
            assert cut == "soft" or text in [encode(thread.comm) for thread in process.threads]
        for region in image.regions:
            shown = printable(region.name)
            assert image.region(shown) == region
        export_core(image, tmp_path / "core", lost="omit")


def content(image, start, size):
    """The bytes of an address range that may lie in several regions."""
    found = b""
    while len(found) < size:
        at = start + len(found)
        (region,) = [r for r in image.regions if r.addr <= at < r.addr + r.length]
        length = min(region.addr + region.length - at, size - len(found))
        found += image.read(region, at - region.addr, length)
    return found


def test_a_carriage_return_in_the_map_of_a_peer():
    fd = os.memfd_create(b"a\rb")
    try:
        os.ftruncate(fd, 4096)
        with mmap.mmap(fd, 4096):
            (mine,) = [m for m in read_maps() if "memfd:a\rb" in m.path]
            with open("/proc/self/maps", "rb") as file:
                found = [parse_line(line.removesuffix(b"\n")) for line in file]
            assert mine.start in [mapping.start for mapping in found]
    finally:
        os.close(fd)


# --- of a file ------------------------------------------------------------------------------------------


LONG = ["a" * 255, "快" * 85, "é" * 127, "🙂" * 62, "\udce9" * 255]


@pytest.mark.parametrize("name", [*LONG, "-", "a\n\x1bb"])
def test_every_name_that_the_file_system_takes(tmp_path, name):
    path = os.path.join(os.fspath(tmp_path), name)
    sink = FileSink(path)
    os.write(sink.fd, b"image")
    (partial,) = os.listdir(os.fsencode(tmp_path))
    assert len(partial) <= 255
    sink.commit()
    assert os.listdir(os.fsencode(tmp_path)) == [os.fsencode(name)]


def test_a_name_that_is_too_long_is_refused_before_anything_is_saved(tmp_path):
    with pytest.raises(snapengine.SinkError, match="File name too long"):
        FileSink(tmp_path / ("界" * 86))
    assert os.listdir(tmp_path) == []


def test_what_a_killed_process_left_is_removed_and_what_is_written_stays(tmp_path):
    path = tmp_path / "x.img"
    stale = tmp_path / ".x.img.0123abcd.partial"
    names = (".x.img.0123abcd.part", ".y.img.0123abcd.partial", "x.img.partial")
    foreign = [tmp_path / name for name in names]
    for file in (stale, *foreign):
        file.write_bytes(b"cut")
    living = FileSink(path)
    assert not stale.exists()
    other = FileSink(path)
    for sink, data in ((living, b"one"), (other, b"two")):
        os.write(sink.fd, data)
        sink.commit()
    assert path.read_bytes() == b"two"
    assert sorted(os.listdir(tmp_path)) == sorted([path.name, *(file.name for file in foreign)])


def test_a_closed_object_as_name_of_an_image():
    file = io.BytesIO(image_with(["a"]))
    file.name = decode(NOT_TEXT)
    with open_image(file) as image:
        assert image.name == decode(NOT_TEXT)

"""The record of a process, packed and parsed: this process, unusual names, damaged images."""

import contextlib
import dataclasses
import json
import mmap
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from image_kit import opened

from snapengine.base.names import escape, printable, unescape
from snapengine.errors import CorruptImageError, ImageError, TargetGoneError, UnsupportedVersionError
from snapengine.image.sections import ImageRegion
from snapengine.image.writer import Writer
from snapengine.kernel.procmaps import Mapping, read_maps
from snapengine.process.describe import process_info, process_rows
from snapengine.process.record import (
    PROCESS_BLOBS,
    NotCaptured,
    ProcessRecord,
    check_sizes,
    process_of,
    read_process,
)
from snapengine.process.thread_state import ThreadState
from snapengine.storage.sinks import MemorySink

STRANGE = "/a b\n\\x41\t\udcff\x1b[2Jé\u202e\\\\"


def thread(tid, comm="worker", xstate=b"x" * 2440):
    return ThreadState(tid, comm, bytes([tid % 256]) * 216, bytes(512), xstate, 1 << 63 | 5)


def record(**changes):
    mappings = [
        Mapping(0x1000, 0x3000, "r-xp", 0, "08:01", 12, "/bin/" + STRANGE),
        Mapping(0x3000, 0x4000, "rw-p", 0x2000, "08:01", 12, "/bin/" + STRANGE),
        Mapping(0xFFFFFFFFFF600000, 0xFFFFFFFFFF601000, "--xp", 0, "00:00", 0, "[vsyscall]"),
    ]
    values = {
        "pid": 77, "ppid": 1, "uid": 1000, "gid": 2**32 - 1, "comm": "\udc80 x", "exe": "/bin/" + STRANGE,
        "cmdline": ["", STRANGE, "-x"], "cut": "stop", "mappings": mappings, "auxv": bytes(range(32)),
        "threads": [thread(77), thread(78, "\udcfe", b"")],
        "not_captured": [NotCaptured(0x1000, 0x2000, "r-xp", STRANGE, "not writable")],
    }  # fmt: skip
    return ProcessRecord(**(values | changes))


def image_with(blobs, regions=()):
    sink = MemorySink()
    writer = Writer(sink)
    writer.begin(list(regions))
    for name, blob in blobs.items():
        writer.vmstate(name, blob, level=1)
    writer.finish({})
    sink.commit()
    return opened(sink.getvalue())


def altered(**changes):
    """The blobs with changed members in the JSON object; None removes a member."""
    blobs = record().to_vmstate()
    fields = json.loads(blobs["process"]) | changes
    text = json.dumps({key: value for key, value in fields.items() if value is not None})
    return blobs | {"process": text.encode()}


# --- a live process ---------------------------------------------------------------------------------------


def test_this_process():
    found = read_process(os.getpid(), "soft")
    assert (found.pid, found.ppid) == (os.getpid(), os.getppid())
    assert (found.uid, found.gid) == (os.getuid(), os.getgid())
    assert found.exe == os.readlink("/proc/self/exe")
    assert found.comm == Path("/proc/self/comm").read_text().rstrip("\n")
    assert found.cmdline == Path("/proc/self/cmdline").read_text().split("\0")[:-1]
    assert len(found.auxv) % 16 == 0
    assert struct.unpack("<QQ", found.auxv[-16:]) == (0, 0)
    assert any(mapping.path == "[stack]" for mapping in found.mappings)
    assert (found.threads, found.not_captured) == ([], [])
    assert ProcessRecord.from_vmstate(found.to_vmstate()) == found


def test_threads_and_what_is_not_captured_are_given():
    left = [NotCaptured(0, 4096, "r--p", "", "no reason")]
    found = read_process(os.getpid(), "stop", threads=[thread(5)], not_captured=left)
    assert found == dataclasses.replace(read_process(os.getpid(), "stop"), threads=[thread(5)],
                                        not_captured=left, mappings=found.mappings)  # fmt: skip


def test_a_program_and_arguments_with_strange_names(tmp_path):
    name = os.fsencode(tmp_path) + b"/s\nl\\e\xffp"
    shutil.copy("/bin/sh", name)
    arguments = [name, b"-c", b"echo; read line", b"", b"0\xfe\n"]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"\n"  # Popen returns before execve(2) is complete
            found = read_process(process.pid, "soft")
        finally:
            process.kill()
    assert os.fsencode(found.exe) == name
    assert os.fsencode(found.comm) == b"s\nl\\e\xffp"
    assert [os.fsencode(argument) for argument in found.cmdline] == arguments
    assert any(os.fsencode(m.path) == name.replace(b"\n", b"\\012") for m in found.mappings)
    assert ProcessRecord.from_vmstate(found.to_vmstate()) == found


def test_a_carriage_return_in_the_name_of_a_mapped_file(tmp_path):
    path = tmp_path / "one\rtwo\r"
    path.write_bytes(bytes(4096))
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 4096, access=mmap.ACCESS_READ):
        assert any(mapping.path == str(path) for mapping in read_maps())


def test_processes_without_memory():
    with pytest.raises(TargetGoneError, match="no such process"):
        read_process(2**22 + 1, "soft")
    with subprocess.Popen(["true"], stdin=subprocess.DEVNULL) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(TargetGoneError, match="any more"):
            read_process(process.pid, "soft")


# --- blobs ------------------------------------------------------------------------------------------------


def test_round_trip():
    blobs = record().to_vmstate()
    assert set(blobs) == set(PROCESS_BLOBS)
    assert blobs["process"].isascii()
    assert json.loads(blobs["process"])["version"] == 1
    assert ProcessRecord.from_vmstate(blobs) == record()


def test_round_trip_through_an_image():
    with image_with(record().to_vmstate()) as image:
        assert process_of(image) == record()
        assert process_info(process_of(image), image.regions)["pid"] == 77
    with image_with({"cpu": b"x"}) as image:
        assert process_of(image) is None
        assert process_info(process_of(image), image.regions) is None


def test_the_blob_of_a_soft_cut():
    soft = record(cut="soft", threads=[])
    assert set(soft.to_vmstate()) == {"process", "process.auxv"}
    assert ProcessRecord.from_vmstate(soft.to_vmstate()) == soft
    with pytest.raises(ValueError, match="soft cut"):
        record(cut="soft").to_vmstate()
    with pytest.raises(CorruptImageError, match="a soft cut has registers"):
        ProcessRecord.from_vmstate(altered(cut="soft"))


def test_threads_to_the_byte():
    blob = record(threads=[thread(258, "ab", b"x" * 576)]).to_vmstate()["process.threads"]
    assert blob[:8] == bytes.fromhex("01000000 01000000")
    assert blob[8:24] == bytes.fromhex("02010000 40020000 0500000000000080")
    assert blob[24:40] == b"ab".ljust(16, b"\0")
    assert blob[40:256] == bytes([2]) * 216
    assert blob[256:768] == bytes(512)
    assert blob[768:] == b"x" * 576


@pytest.mark.parametrize(
    "wrong",
    [
        {"regs": bytes(215)}, {"fpregs": b""}, {"xstate": bytes(575)}, {"xstate": bytes(65537)}, {"tid": 0},
        {"tid": 2**31}, {"comm": "x" * 16}, {"comm": "a\0b"}, {"sigmask": -1}, {"tid": 78},
    ],
)  # fmt: skip
def test_threads_that_cannot_be_packed(wrong):
    threads = [dataclasses.replace(thread(77), **wrong), thread(78)]
    with pytest.raises(ValueError, match=r"thread|is no thread id"):
        record(threads=threads).to_vmstate()


def test_a_record_that_is_too_large_is_not_written():
    with pytest.raises(ValueError, match=r"process\.auxv: 65552 bytes"):
        record(auxv=bytes(65552)).to_vmstate()


@given(st.binary(max_size=40))
@example(b"\\")
@example(b"\\xff\xff\\\\")
def test_escape_keeps_every_byte(name):
    name = name.replace(b"\0", b"")
    text = name.decode("utf-8", "surrogateescape")
    assert unescape(escape(text)) == text
    escape(text).encode()  # plain Unicode: no surrogate is left
    assert printable(text).isprintable()


def test_escapes():
    assert escape("a\\b\udcffé") == r"a\\b\xffé"
    for wrong in ("\\", r"\n", r"\x41", r"\xFF", "\ud800", "\udcff", "a\0b"):
        with pytest.raises(ValueError, match=r"escape|surrogates|NUL"):
            unescape(wrong)


# --- false values in images -------------------------------------------------------------------------------

PAGE = {"start": 4096, "end": 8192, "perms": "r--p", "path": "", "reason": "r"}
LINE = {"start": 4096, "end": 8192, "perms": "r--p", "offset": 0, "device": "00:00", "inode": 0, "path": ""}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"pid": None}, "no valid 'pid'"),
        ({"pid": True}, "no valid 'pid'"),
        ({"pid": 1.0}, "no valid 'pid'"),
        ({"pid": -1}, "'pid' is out of range"),
        ({"pid": 2**31}, "'pid' is out of range"),
        ({"uid": 2**32}, "'uid' is out of range"),
        ({"comm": 3}, "no valid 'comm'"),
        ({"comm": "a\0b"}, "NUL"),
        ({"exe": "\\q"}, "unknown escape"),
        ({"cmdline": "x"}, "no valid 'cmdline'"),
        ({"cmdline": ["x", None]}, "not a list of strings"),
        ({"cut": "hard"}, "'cut' is malformed"),
        ({"mappings": [3]}, "is not a JSON object"),
        ({"mappings": [LINE | {"end": 4096}]}, "are no pages"),
        ({"mappings": [LINE | {"start": 4097}]}, "are no pages"),
        ({"mappings": [LINE | {"end": 2**64}]}, "'end' is out of range"),
        ({"mappings": [LINE | {"path": "x" * 16385}]}, "'path' is too long"),
        ({"mappings": [LINE | {"perms": "rwxps"}]}, "'perms' is malformed"),
        ({"mappings": [LINE | {"device": "x:y"}]}, "'device' is malformed"),
        ({"mappings": [LINE | {"inode": 2**64}]}, "'inode' is out of range"),
        ({"mappings": [LINE, LINE]}, "out of order"),
        ({"not_captured": [PAGE | {"perms": "rw"}]}, "'perms' is malformed"),
        ({"not_captured": [PAGE | {"reason": None}]}, "no valid 'reason'"),
    ],
)
def test_a_wrong_member(changes, text):
    with pytest.raises(CorruptImageError, match=text) as caught:
        ProcessRecord.from_vmstate(altered(**changes), "a.img")
    assert str(caught.value).startswith("a.img: the process record: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "blob",
    [b"", b"{}x", b"[]", b"3", b"\xff\xfe{\0}\0", b"[" * 100000, b'{"pid":' + b"9" * 5000 + b"}", b'{"a":3'],
)  # fmt: skip
def test_what_is_no_object(blob):
    with pytest.raises(CorruptImageError):
        ProcessRecord.from_vmstate({"process": blob})


def test_a_newer_version_and_unknown_members():
    assert ProcessRecord.from_vmstate(altered(news=[1])) == record()
    with pytest.raises(UnsupportedVersionError, match="version 2"):
        ProcessRecord.from_vmstate(altered(version=2))
    with pytest.raises(KeyError):
        ProcessRecord.from_vmstate({})


@pytest.mark.parametrize(
    ("at", "value", "text"),
    [
        (0, 2, "version 2"),
        (4, 2**32 - 1, "cut short"),
        (4, 1, "bytes follow"),
        (8, 0, "no thread id"),
        (12, 2**32 - 1, "XSAVE area"),
        (12, 575, "XSAVE area"),
        (12, 65536, "cut short"),
        (8, 78, "twice"),
        (36, 1 << 24, "not padded"),
    ],
)
def test_wrong_threads(at, value, text):
    blobs = record().to_vmstate()
    blob = bytearray(blobs["process.threads"])
    struct.pack_into("<I", blob, at, value)
    with pytest.raises(CorruptImageError, match=text):
        ProcessRecord.from_vmstate(blobs | {"process.threads": bytes(blob)})


def test_sizes_are_checked_before_anything_is_read():
    with pytest.raises(CorruptImageError, match=r"process\.threads has 268435457 bytes"):
        check_sizes({"process.threads": (256 << 20) + 1}, "image")
    with pytest.raises(CorruptImageError, match="not made of pairs"):
        ProcessRecord.from_vmstate(record().to_vmstate() | {"process.auxv": bytes(17)})
    with pytest.raises(CorruptImageError, match="too many values"):
        ProcessRecord.from_vmstate({"process": b"[" + b"[]," * (1 << 21) + b"[]]"})
    with image_with(record().to_vmstate() | {"process.auxv": bytes(65 << 10)}) as image:
        with pytest.raises(CorruptImageError, match=r"process\.auxv has"):
            assert process_of(image)
        with pytest.raises(CorruptImageError):
            process_info(process_of(image), image.regions)


GARBAGE = st.fixed_dictionaries(
    {"process": st.binary(max_size=200)},
    optional={"process.auxv": st.binary(max_size=40), "process.threads": st.binary(max_size=900)},
)


@settings(max_examples=300, deadline=None)
@given(GARBAGE)
def test_garbage(blobs):
    with pytest.raises(ImageError):
        ProcessRecord.from_vmstate(blobs)


SOUND = record().to_vmstate()


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(sorted(SOUND)), st.data())
def test_flipped_bits_and_cuts(name, data):
    blob = bytearray(SOUND[name])
    bit = data.draw(st.integers(0, 8 * len(blob) - 1))
    blob[bit // 8] ^= 1 << bit % 8
    blob = blob[: data.draw(st.sampled_from((len(blob), bit // 8)))]
    with contextlib.suppress(ImageError):
        found = ProcessRecord.from_vmstate(SOUND | {name: bytes(blob)})
        assert ProcessRecord.from_vmstate(found.to_vmstate()) == found


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(json.loads(SOUND["process"]))), JSON)
def test_any_json_in_any_place(key, value):
    blobs = altered(**{key: value})
    with contextlib.suppress(ImageError):
        assert ProcessRecord.from_vmstate(blobs).to_vmstate().keys() <= PROCESS_BLOBS.keys()


# --- info -------------------------------------------------------------------------------------------------


def test_info():
    places = ((0x3000, 0x1000), (0x2000, 0x800))
    regions = [ImageRegion("r", addr, length, 4096, "anon", addr) for addr, length in places]
    info = process_info(record(), regions)
    assert (info["mappings"], info["mapped_bytes"]) == (3, 0x4000)
    assert (info["captured_mappings"], info["captured_bytes"]) == (2, 0x1800)
    assert info["threads"] == [{"tid": 77, "comm": "worker"}, {"tid": 78, "comm": r"\xfe"}]
    assert json.dumps(info, ensure_ascii=False).encode()  # no surrogate that a terminal cannot print
    assert info["not_captured"][0]["reason"] == "not writable"


def test_lines_cannot_control_a_terminal():
    rows = process_rows(process_info(record(), []))
    text = dict(rows)
    assert all(value.isprintable() for value in text.values())
    assert r"\x1b[2J" in text["command"]
    assert text["process"].startswith(r"77 (\x80 x)")
    assert "all threads were stopped" in text["cut"]
    assert "1, 4.00 KiB: not writable" in text["not captured"]
    many = record(threads=[thread(tid) for tid in range(1, 30)])
    assert dict(process_rows(process_info(many, [])))["threads"].endswith("8 (worker) and 21 more")

"""JSON in an image whose members have wrong types: every consumer raises an `ImageError`, or the member is
unknown and ignored. No other exception may escape, and all output must be printable."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys

import pytest
from image_forge import Piece, copy_of, put_together, take_apart
from image_kit import sample

from snapengine import cli
from snapengine.cli import image as cli_image
from snapengine.errors import ImageError
from snapengine.export.elf_core import export_core
from snapengine.image import open_image
from snapengine.image.stream import stream_image
from snapengine.kernel.procmaps import Mapping
from snapengine.process.record import NotCaptured, ProcessRecord, process_of
from snapengine.qemu.blobs import DEVICES, MACHINE, VIA_DEVICES, VIA_STREAM, machine_of
from snapengine.qemu.machine import differences
from snapengine.qemu.restore import stream_ends
from snapengine.result import Result

WRONG = [None, True, False, -1, 1.5, 1 << 64, 10**400, "", "text", "\ud800", "\x1b[2J\n", [], [1], ["x"],
         [[1]], [[1, "x"]], [None], {}, {"a": 1}, {"p50": 1}, [{}], [{"name": 5}]]  # fmt: skip
FIGURES = Result(
    method="write-tracking", status="completed", image_bytes=1, region_bytes=4096, nonzero_bytes=4096,
    pages_total=1, pages_saved=1, zero_pages=0, hole_pages=0, duplicate_pages=0, faults=3, rounds=1, arm_ns=9,
    stop_ns=5, duration_ns=100, fault_ns={"p50": 1, "p99": 2, "max": 3}, peak_buffer_bytes=7, spilled_bytes=1,
    lost_pages=1, lost_runs=[(4096, 4096)], warnings=["w"], cut="stop", injection_ns=1, pause_ns=1,
    not_captured=[{"start": 0, "end": 4096, "perms": "---p", "path": "x", "reason": "y"}],
    stop_parts_ns={"arm": 4}, fault_histogram=[(1, 3)],
).to_json()  # fmt: skip
MACHINE_OF_ALL = {
    "version": 1, "via": VIA_DEVICES, "machine_type": "pc-i440fx-7.2", "qemu": "7.2.22", "accelerator": "kvm",
    "ram_blocks": [{"name": "ram", "used": 40960, "total": 40960, "page_size": 4096}],
    "stream": {"bytes": 1, "pages": 1, "zero_pages": 0, "repeated": 0, "ram_end": True},
    "cpus": ["qemu64"], "devices": [{"path": "/machine/x", "type": "y"}],
    "memory_backends": [{"id": "m", "size": 4096, "share": True}],
    "disks": [{"device": "d", "node": "n", "file": "f"}], "command_line": ["qemu"],
}  # fmt: skip
PROCESS = json.loads(
    ProcessRecord(
        pid=7, ppid=1, uid=0, gid=0, comm="cat", cmdline=["cat", "x"], exe="/bin/cat", cut="soft",
        mappings=[Mapping(0x10000, 0x1A000, "rw-p", 0, "00:00", 0, "[heap]")],
        not_captured=[NotCaptured(0x20000, 0x21000, "---p", "", "why")],
    ).to_vmstate()["process"]
)  # fmt: skip


def image_with(*, figures=FIGURES, blobs=()) -> bytes:
    forge = copy_of(take_apart(sample().data))
    forge.of(b"STAT").payload = json.dumps(figures | {"image_bytes": 10**15}).encode()
    at = forge.at(b"STAT")
    forge.pieces[at:at] = [
        Piece(b"VMST", blob if isinstance(blob, bytes) else json.dumps(blob).encode(), name.encode(), flags=1)
        for name, blob in blobs
    ]
    return put_together(forge)


def wrong_types(document, path=()):
    """(where, changed document): each member, at any depth, missing or of each other type."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        for other in WRONG:
            yield (*path, key, other), changed(document, key, other)
        if isinstance(document, dict):
            yield (*path, key, "missing"), {name: one for name, one in document.items() if name != key}
        if isinstance(value, dict | list):
            for where, inner in wrong_types(value, (*path, key)):
                yield where, changed(document, key, inner)


def changed(document, key, value):
    copy = document.copy()
    copy[key] = value
    return copy


def consume(data: bytes, folder) -> str:
    """The exceptions other than `ImageError` that consumers let escape. A refused image is not printed."""
    path = folder / "odd.img"
    path.write_bytes(data)
    outcomes: set[str] = set()
    for use in (both_infos, info_of, info_through_a_pipe, cores, machine):
        if use in (info_of, info_through_a_pipe) and "refused" in outcomes:
            continue
        try:
            use(path)
            outcomes.add("read")
        except ImageError:
            outcomes.add("refused")
        except Exception as error:
            outcomes.add(f"{use.__name__}: {type(error).__name__}: {error}")
    return ", ".join(sorted(outcomes - {"read", "refused"}))


def shown(words) -> str:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(words)
    if code:
        assert "internal" not in err.getvalue(), err.getvalue()
        raise ImageError(err.getvalue())
    return out.getvalue()


def both_infos(path):
    """The file and the pipe must agree."""
    from_file, from_pipe = None, None
    with contextlib.suppress(ImageError):
        from_file = cli_image.read_info(str(path))
    with contextlib.suppress(ImageError):
        from_pipe = cli_image.complete_info(read_to_its_end(path))
    if from_file is None or from_pipe is None:
        assert from_file is from_pipe
        raise ImageError("refused")


def read_to_its_end(path):
    with open(path, "rb") as file:
        stream = stream_image(file)
        for _ in stream:
            pass
        return stream


def info_of(path):
    for text in (shown(["info", str(path)]), shown(["verify", str(path)])):
        assert text.replace("\n", "").isprintable(), repr(text)
    shown(["info", "--json", str(path)]).encode()


def info_through_a_pipe(path):
    with open(path, "rb") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(NoSeek(file)))
        shown(["info", "-"]).encode()


class NoSeek(io.RawIOBase):
    """A pipe."""

    def __init__(self, file) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        return self._file.readinto(buffer)

    def seekable(self) -> bool:
        return False


def cores(path):
    with open_image(path) as image:
        if process_of(image) is not None:
            export_core(image, path.with_name("core"), lost="omit")


def machine(path):
    with open_image(path) as image:
        saved = machine_of(image)
        if saved is not None and saved["via"] in (VIA_DEVICES, VIA_STREAM):
            differences(saved, MACHINE_OF_ALL)
            stream_ends(image, saved)


@pytest.mark.parametrize("of", ["figures", "machine", "process"])
def test_wrong_types_anywhere(of, tmp_path):
    document = {"figures": FIGURES, "machine": MACHINE_OF_ALL, "process": PROCESS}[of]
    escaped = {}
    count = 0
    for where, other in wrong_types(document):
        if of == "figures":
            image = image_with(figures=other)
        elif of == "machine":
            image = image_with(blobs=[(MACHINE, other), (DEVICES, bytes(16))])
        else:
            image = image_with(blobs=[("process", other), ("process.auxv", b"")])
        count += 1
        if what := consume(image, tmp_path):
            escaped[where] = what
    assert count > 300
    assert escaped == {}


def test_as_it_should_be(tmp_path):
    """Control: every consumer reads the unchanged documents."""
    path = tmp_path / "good.img"
    blobs = [(MACHINE, MACHINE_OF_ALL), (DEVICES, bytes(16)), ("process", PROCESS), ("process.auxv", b"")]
    path.write_bytes(image_with(blobs=blobs))
    info_of(path)
    info_through_a_pipe(path)
    machine(path)
    cores(path)
    assert os.path.getsize(path.with_name("core")) > 4096
    with open_image(path) as image:
        assert image.stats["fault_ns"] == FIGURES["fault_ns"]


@pytest.mark.parametrize(
    "block",
    [{"name": "n" * 256, "used": 4096}, {"name": "\u20ac" * 86, "used": 4096}, {"name": "a", "used": 4095},
     {"name": "a", "used": 1 << 45}, {"name": "a", "used": True}],
)  # fmt: skip
def test_a_ram_block_that_no_stream_can_have(block, tmp_path):
    path = tmp_path / "odd.img"
    path.write_bytes(image_with(blobs=[(MACHINE, MACHINE_OF_ALL | {"ram_blocks": [block]}),
                                       (DEVICES, bytes(16))]))  # fmt: skip
    with open_image(path) as image, pytest.raises(ImageError, match=r"odd\.img"):
        stream_ends(image, machine_of(image))


def test_names_that_a_terminal_obeys(tmp_path):
    forge = copy_of(take_apart(sample().data))
    regions = forge.of(b"REGN").payload
    forge.of(b"REGN").payload = regions.replace(b"ram", b"\x1b[J").replace(b"io", b"\r\x01")
    forge.of(b"VMST").meta = b"\x1b]0;title\x07"
    path = tmp_path / "odd.img"
    path.write_bytes(put_together(forge))
    text = shown(["info", str(path)])
    assert "\\x1b[J" in text
    assert "\\r\\x01" in text
    assert text.replace("\n", "").isprintable()
    with open_image(path) as image:
        for number in range(2):
            os.close(image.restore_memfd(number))

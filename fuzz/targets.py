"""What is fuzzed: one function a target, which takes the fuzzer's bytes and raises if an invariant is broken.

A hostile input may be refused by the documented error, in bounded time and memory (libFuzzer watches both),
and by nothing else. Where two ways read the same thing they must agree, and what is read and written again is
equal.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import streamkit
from draw import Draw
from image_forge import Forge, copy_of, put_together, take_apart
from image_kit import read_everything, sample, stream_everything
from test_hostile_records import FIGURES, MACHINE_OF_ALL, PROCESS, WRONG
from test_rules import byte_changes, field_changes, order_changes, reference_changes

from snapengine.errors import HandoverError, ImageError, MachineError, StreamError
from snapengine.handover.message import ArrayScanner, parse_offer
from snapengine.image import open_image
from snapengine.image.sections import ImageRegion
from snapengine.kernel.procfs import status
from snapengine.kernel.procmaps import Mapping, read_maps
from snapengine.process.record import ProcessRecord
from snapengine.process.threads_blob import pack_threads, parse_threads
from snapengine.qemu.blobs import check_machine
from snapengine.qemu.from_stream import ingest
from snapengine.qemu.machine import VERSION, describe, differences, disks, refuse_busy
from snapengine.qemu.ram_blocks import RamBlock, parse_table, ram_blocks
from snapengine.qemu.to_stream import write_stream
from snapengine.restore.stream import restore_stream
from snapengine.storage.sinks import MemorySink


@cache
def sound() -> Forge:
    """The image that the mutations start from."""
    return take_apart(sample().data)


def image(data: bytes) -> None:
    """Records changed, then all numbers and checksums made right: file and pipe must agree."""
    draw: Any = Draw(data)
    forge = copy_of(sound())
    while draw.left():
        change = draw.choice((field_changes, order_changes, byte_changes, reference_changes))
        with contextlib.suppress(IndexError, ValueError):  # nothing is left to be changed
            change(draw, forge)
    try:
        made = put_together(forge)
    except (IndexError, ValueError, struct.error):
        return
    raw_image(made)


def raw_image(data: bytes) -> None:
    """The bytes of an image as they are."""
    verdicts = {read.__name__: _read(read, data) for read in (read_everything, stream_everything)}
    assert len(set(verdicts.values())) == 1, verdicts


def _read(read: Callable[[bytes], None], data: bytes) -> bool:
    try:
        read(data)
    except ImageError:
        return False
    return True


def process_record(data: bytes) -> None:
    """The blobs of an attached process: what is read can be written, and is then read as the same."""
    draw = Draw(data)
    text = json.dumps(changed_document(draw, PROCESS)).encode()
    blobs = {"process": text, "process.auxv": draw.take(draw.randrange(64))}
    if draw.randrange(2):
        blobs["process.threads"] = draw.take(2000)
    _process(blobs)


def raw_process_record(data: bytes) -> None:
    """The JSON as it is."""
    _process({"process": data})


def _process(blobs: dict[str, bytes]) -> None:
    try:
        record = ProcessRecord.from_vmstate(blobs)
    except ImageError:
        return
    assert ProcessRecord.from_vmstate(record.to_vmstate()) == record


def threads(data: bytes) -> None:
    """The registers of the threads."""
    try:
        found = parse_threads(data)
    except ValueError:
        return
    assert pack_threads(found) == data


def changed_document(draw: Draw, document: Any) -> Any:
    """A JSON document with some members changed, missing or of other types."""
    made = json.loads(json.dumps(document))
    for _ in range(draw.randrange(4)):
        place = made
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw.choice(keys)
            if isinstance(place[key], dict | list) and draw.randrange(2):
                place = place[key]
                continue
            if draw.randrange(4) == 3:
                del place[key]
            else:
                others = [*WRONG, draw.randrange(1 << 64), draw.take(9).decode("latin-1")]
                place[key] = copy.deepcopy(draw.choice(others))
            break
    return made


def figures(data: bytes) -> None:
    """The STAT record, by the file's reader and the pipe's."""
    draw = Draw(data)
    forge = copy_of(sound())
    text = json.dumps(changed_document(draw, FIGURES | {"image_bytes": 10**12})).encode()
    forge.of(b"STAT").payload = text
    raw_image(put_together(forge))


def machine_record(data: bytes) -> None:
    """The description of a machine, and its comparison with another."""
    draw = Draw(data)
    blob = data if draw.randrange(4) == 3 else json.dumps(changed_document(draw, MACHINE_OF_ALL)).encode()
    try:
        differences(check_machine(blob, "image"), MACHINE_OF_ALL)
    except ImageError:
        return


def handover(data: bytes) -> None:
    """A peer's message: whole and byte by byte it is the same."""
    whole, pieces = ArrayScanner(), ArrayScanner()
    outcomes = []
    for scanner, parts in ((whole, [data]), (pieces, [data[at : at + 1] for at in range(len(data))])):
        try:
            for part in parts:
                scanner.feed(part)
            outcomes.append(parse_offer(scanner.data) if scanner.complete else None)
        except HandoverError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


class Monitor:
    """A monitor whose answers the fuzzer gives."""

    def __init__(self, draw: Draw) -> None:
        self._draw = draw

    def execute(self, command: str, arguments: Any = None) -> Any:
        return changed_document(self._draw, {"answer": ANSWERS.get(command, {})}).get("answer")

    def human(self, line: str) -> str:
        return self._draw.take(20).decode("latin-1")


TABLE = """  Block Name    PSize  Offset  Used  Total  HVA  RO
  pc.ram    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000 0x00007f0000000000  rw
"""
ANSWERS: dict[str, Any] = {
    "query-version": {"qemu": {"major": 7, "minor": 2, "micro": 22}},
    "qom-get": "pc-i440fx-7.2-machine",
    "qom-list": [{"name": "device[0]", "type": "child<x>"}],
    "query-block": [{"device": "d", "inserted": {"node-name": "n", "file": "f"}}],
    "query-cpus-fast": [{"qom-path": "/machine/x"}],
    "query-memdev": [{"id": "m", "size": 4096, "share": True}],
    "query-kvm": {"enabled": True},
    "query-migrate": {"status": "completed", "blocked-reasons": ["why"]},
    "query-status": {"status": "running", "running": True},
    "x-query-ramblock": {"human-readable-text": TABLE},
}


def qmp(data: bytes) -> None:
    """QEMU's answers."""
    draw = Draw(data)
    monitor: Any = Monitor(draw)
    what = draw.randrange(4)
    with contextlib.suppress(MachineError):
        if what == 0:
            made = describe(monitor, 0, [RamBlock("ram", 4096, 0, 4096, 4096)], "device-state")
            assert made["version"] == VERSION
        elif what == 1:
            ram_blocks(monitor)
            disks(monitor)
        elif what == 2:
            refuse_busy(monitor)
        else:
            parse_table(TABLE + draw.take(400).decode("latin-1"))


def proc(data: bytes) -> None:
    """/proc as the kernel writes it, with any bytes in its names: what is parsed is what was written."""
    draw = Draw(data)
    wanted, lines, at = [], [], 4096
    for _ in range(draw.randrange(6)):
        start = at + draw.randrange(9) * 4096
        at = start + draw.randrange(1, 9) * 4096
        perms = draw.choice(("rw-p", "r-xp", "---p", "rw-s"))
        offset, inode = draw.randrange(1 << 32), draw.randrange(1 << 32)
        name = draw.take(draw.randrange(20)).replace(b"\n", b"\\012")
        name = b"/" + name if name else b""
        path = name.decode("utf-8", "surrogateescape")
        wanted.append(Mapping(start, at, perms, offset, "08:01", inode, path))
        head = b"%08x-%08x %s %08x 08:01 %d" % (start, at, perms.encode(), offset, inode)
        lines.append((head.ljust(73) + name if name else head) + b"\n")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        Path(folder, "maps").write_bytes(b"".join(lines))
        assert read_maps(f"self/root{folder}") == wanted
        Path(folder, "status").write_bytes(b"Name:\t" + draw.take(15).replace(b"\n", b" ") + b"\nPid:\t7\n")
        assert status(f"{folder}/status")["Pid"] == "7"


def stream(data: bytes) -> None:
    """A migration stream: refused by a StreamError, or made an image that is sound, and a stream again."""
    if not data:
        return
    direct = bool(data[0] & 1)
    sink = MemorySink()
    if not _ingested(data[1:], sink, direct):
        return
    made = sink.getvalue()
    with open_image(io.BytesIO(made)) as image:
        image.verify()
        if direct or sum(region.length for region in image.regions) > 1 << 24:
            return
        again = os.memfd_create("again", os.MFD_CLOEXEC)
        try:
            write_stream(image, again)
            os.lseek(again, 0, os.SEEK_SET)
            second = MemorySink()
            ingest(again, second)
        finally:
            os.close(again)
    assert _memory(made) == _memory(second.getvalue())


def _ingested(data: bytes, sink: MemorySink, direct: bool) -> bool:
    fd = os.memfd_create("stream", os.MFD_CLOEXEC)
    try:
        os.write(fd, data)
        os.lseek(fd, 0, os.SEEK_SET)
        ingest(fd, sink, direct=direct)
    except StreamError:
        return False
    finally:
        os.close(fd)
    return True


def _memory(image: bytes) -> dict[str, bytes]:
    found: dict[str, bytearray] = {}

    def allocate(region: ImageRegion) -> bytearray:
        return found.setdefault(region.name, bytearray(region.length))

    restore_stream(io.BytesIO(image), allocate)
    return {name: bytes(memory) for name, memory in found.items()}


TARGETS: dict[str, Callable[[bytes], None]] = {
    each.__name__: each
    for each in (
        image, raw_image, figures, process_record, raw_process_record, threads, machine_record, handover, qmp,
        proc, stream,
    )
}  # fmt: skip


def seeds(name: str) -> list[bytes]:
    """Inputs to begin with, beside the corpus."""
    whole = streamkit.stream(streamkit.SOME_PAGES)
    made: dict[str, list[bytes]] = {
        "raw_image": [sample().data[:4096]],
        "raw_process_record": [json.dumps(PROCESS).encode()],
        "threads": [pack_threads([])],
        "handover": [b'[{"base_host_virt_addr": 4096, "size": 4096, "offset": 0, "page_size": 4096, '
                     b'"name": "a", "kind": "anon", "snapengine": {"version": 1, "controls": ["pause"]}}]'],
        "stream": [bytes([direct]) + one for direct in (0, 1) for one in (whole, whole[:200])],
    }  # fmt: skip
    return made.get(name, [bytes([number] * 8) for number in range(8)])

"""The state of a process at T besides its memory: read from /proc, and stored as blobs in the image.

FORMAT.md defines the blobs (section "Blobs of an attached process"). An image may be hostile:
`ProcessRecord.from_vmstate` checks all values, and allocates nothing by a size that the image only claims.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from snapengine.base.jsonfields import Fields, parse_object
from snapengine.base.names import decode, escape
from snapengine.errors import CorruptImageError, ImageError, TargetGoneError, UnsupportedVersionError
from snapengine.image.describe import HasBlobs
from snapengine.kernel.procmaps import Mapping as MemoryMapping
from snapengine.kernel.procmaps import read_maps
from snapengine.process.thread_state import ThreadState
from snapengine.process.threads_blob import pack_threads, parse_threads
from snapengine.regions import PAGE_BYTES
from snapengine.result import NotCaptured

__all__ = ["PROCESS_BLOBS", "Cut", "ProcessRecord", "check_sizes", "process_of", "read_process"]

Cut = Literal["soft", "stop"]
VERSION = 1
PATH_MAX = 4 * PAGE_BYTES  # the kernel shows at most a page, and escapes line feeds after that
PROCESS_BLOBS = {"process": 64 << 20, "process.auxv": 64 << 10, "process.threads": 256 << 20}
"""The reserved names, and the maximum size of each blob in bytes."""

PERMS = re.compile(r"[r-][w-][x-][ps]")
DEVICE = re.compile(r"[0-9a-f]{2,8}:[0-9a-f]{2,8}")
CUT = re.compile(r"soft|stop")


@dataclass(frozen=True)
class ProcessRecord:
    """One process at T. Text from the kernel is decoded with surrogateescape, which preserves every byte.

    ``uid`` and ``gid`` are the real ids. ``exe`` is the path that /proc/PID/exe names, or "" if that cannot
    be read. ``cut`` says how T was made: ``"soft"``, while the threads ran, or ``"stop"``, with all of them
    stopped. Only registers of a stop cut match the memory, so a soft cut has no ``threads``. ``mappings``
    are those of /proc/PID/maps, in its order and with its escapes; ``auxv`` is /proc/PID/auxv.
    """

    pid: int
    ppid: int
    uid: int
    gid: int
    comm: str
    cmdline: list[str]
    exe: str
    cut: Cut
    mappings: list[MemoryMapping]
    auxv: bytes = b""
    threads: list[ThreadState] = field(default_factory=list)
    not_captured: list[NotCaptured] = field(default_factory=list)

    def to_vmstate(self) -> dict[str, bytes]:
        """The blobs of the image. ``ValueError``: the record exceeds a limit of the reader."""
        blobs = {"process": self._pack(), "process.auxv": self.auxv}
        if self.threads:
            blobs["process.threads"] = pack_threads(self.threads)
        if self.threads and self.cut == "soft":
            raise ValueError("the registers of a soft cut do not belong to its memory")
        for name, blob in blobs.items():
            if len(blob) > PROCESS_BLOBS[name]:
                raise ValueError(f"{name}: {len(blob)} bytes, more than {PROCESS_BLOBS[name]}")
        return blobs

    def _pack(self) -> bytes:
        record = {
            "version": VERSION,
            "pid": self.pid,
            "ppid": self.ppid,
            "uid": self.uid,
            "gid": self.gid,
            "comm": escape(self.comm),
            "cmdline": [escape(argument) for argument in self.cmdline],
            "exe": escape(self.exe),
            "cut": self.cut,
            "mappings": [_mapping_object(mapping) for mapping in self.mappings],
            "not_captured": [not_captured_object(item) for item in self.not_captured],
        }
        return json.dumps(record, separators=(",", ":")).encode("ascii")

    @classmethod
    def from_vmstate(cls, vmstate: Mapping[str, bytes], image_name: str = "image") -> ProcessRecord:
        """Parse the record in an image's blobs (see `check_sizes` for blobs that are not yet in memory).

        `CorruptImageError`: it is malformed. `UnsupportedVersionError`: a newer version. ``KeyError``: the
        image has no process record. ``image_name`` is for messages.
        """
        blobs = {name: vmstate[name] for name in PROCESS_BLOBS if name == "process" or name in vmstate}
        check_sizes({name: len(blob) for name, blob in blobs.items()}, image_name)
        try:
            return _parse(blobs)
        except ImageError as error:
            raise type(error)(f"{image_name}: {error}") from None
        except ValueError as error:
            raise CorruptImageError(f"{image_name}: the process record: {error}") from None


def check_sizes(sizes: Mapping[str, int], image_name: str) -> None:
    """`CorruptImageError` if a blob is larger than a process can make it; call this before reading them."""
    for name, limit in PROCESS_BLOBS.items():
        if sizes.get(name, 0) > limit:
            raise CorruptImageError(f"{image_name}: the blob {name} has {sizes[name]} bytes")


def process_of(image: HasBlobs) -> ProcessRecord | None:
    """The attached process that the image was taken of; None: the image is of another kind of target.

    `CorruptImageError`, `UnsupportedVersionError`: its record cannot be used.
    """
    if "process" not in image.vmstate:
        return None
    check_sizes(image.vmstate.sizes(), image.name)
    return ProcessRecord.from_vmstate(image.vmstate, image.name)


def _mapping_object(mapping: MemoryMapping) -> dict[str, Any]:
    return {
        "start": mapping.start,
        "end": mapping.end,
        "perms": mapping.perms,
        "offset": mapping.offset,
        "device": mapping.device,
        "inode": mapping.inode,
        "path": escape(mapping.path),
    }


def not_captured_object(item: NotCaptured) -> dict[str, Any]:
    """The item in JSON types, as in the blob."""
    return {
        "start": item.start,
        "end": item.end,
        "perms": item.perms,
        "path": escape(item.path),
        "reason": escape(item.reason),
    }


def _parse(blobs: dict[str, bytes]) -> ProcessRecord:
    fields = parse_object(blobs["process"])
    version = fields.number("version", 32)
    if version != VERSION:
        raise UnsupportedVersionError(f"the process record has version {version}; this reads {VERSION}")
    auxv = blobs.get("process.auxv", b"")
    if len(auxv) % 16:
        raise ValueError("the auxiliary vector is not made of pairs")
    threads = parse_threads(blobs["process.threads"]) if "process.threads" in blobs else []
    cut: Cut = "soft" if fields.text("cut", CUT) == "soft" else "stop"
    if cut == "soft" and threads:
        raise ValueError("a soft cut has registers")
    return ProcessRecord(
        pid=fields.number("pid", 31),
        ppid=fields.number("ppid", 31),
        uid=fields.number("uid", 32),
        gid=fields.number("gid", 32),
        comm=fields.text("comm"),
        cmdline=fields.names("cmdline"),
        exe=fields.text("exe"),
        cut=cut,
        mappings=_mappings(fields.objects("mappings")),
        auxv=auxv,
        threads=threads,
        not_captured=[_not_captured(item) for item in fields.objects("not_captured")],
    )


def _range(item: Fields) -> tuple[int, int]:
    start, end = item.number("start", 64), item.number("end", 64)
    if start >= end or start % PAGE_BYTES or end % PAGE_BYTES:
        raise ValueError(f"{start:#x}-{end:#x} are no pages")
    return start, end


def _path(item: Fields) -> str:
    path = item.text("path")
    if len(path) > PATH_MAX:
        raise ValueError("a 'path' is too long")
    return path


def _mappings(items: Iterable[Fields]) -> list[MemoryMapping]:
    found = [
        MemoryMapping(
            *_range(item),
            perms=item.text("perms", PERMS),
            offset=item.number("offset", 64),
            device=item.text("device", DEVICE),
            inode=item.number("inode", 64),
            path=_path(item),
        )
        for item in items
    ]
    for one, two in itertools.pairwise(found):
        if two.start < one.end:
            raise ValueError(f"the mappings are out of order at {two.start:#x}")
    return found


def _not_captured(item: Fields) -> NotCaptured:
    return NotCaptured(*_range(item), item.text("perms", PERMS), path=_path(item), reason=item.text("reason"))


def read_process(
    pid: int,
    cut: Cut,
    *,
    mappings: list[MemoryMapping] | None = None,
    threads: Iterable[ThreadState] = (),
    not_captured: Iterable[NotCaptured] = (),
) -> ProcessRecord:
    """The process as /proc shows it now (proc(5)). The caller supplies what /proc does not have, and the
    `mappings` if they were listed already.

    `TargetGoneError`: the process does not exist (any more), or has no memory. ``PermissionError``: this
    user may not read it.
    """
    try:
        status = _status(_read(pid, "status"))
        return ProcessRecord(
            pid=pid,
            ppid=status["PPid"],
            uid=status["Uid"],
            gid=status["Gid"],
            comm=decode(_read(pid, "comm").removesuffix(b"\n")),
            cmdline=_arguments(_read(pid, "cmdline")),
            exe=_executable(pid),
            cut=cut,
            mappings=_live_mappings(pid) if mappings is None else mappings,
            auxv=_read(pid, "auxv"),
            threads=list(threads),
            not_captured=list(not_captured),
        )
    except (FileNotFoundError, ProcessLookupError):
        raise TargetGoneError(f"process {pid}: there is no such process (any more)") from None


def _read(pid: int, name: str) -> bytes:
    with open(f"/proc/{pid}/{name}", "rb") as file:
        return file.read()


def _status(data: bytes) -> dict[str, int]:
    """The first number of the lines PPid, Uid and Gid: for the last two, the real id."""
    lines = (line.partition(b":") for line in data.split(b"\n"))
    return {key.decode(): int(rest.split()[0]) for key, _, rest in lines if key in (b"PPid", b"Uid", b"Gid")}


def _arguments(data: bytes) -> list[str]:
    return [decode(argument) for argument in data.removesuffix(b"\0").split(b"\0")] if data else []


def _executable(pid: int) -> str:
    try:
        return decode(os.readlink(f"/proc/{pid}/exe".encode()))
    except (FileNotFoundError, PermissionError):  # a record without this name is still a record
        return ""


def _live_mappings(pid: int) -> list[MemoryMapping]:
    mappings = read_maps(pid)
    if not mappings:
        raise TargetGoneError(f"process {pid} has no memory: it has ended, or is a kernel thread")
    return mappings

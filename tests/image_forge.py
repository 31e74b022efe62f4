"""Split an image into its records, change any of them, and put the image together again.

`put_together` recomputes all dependent values (sizes, numbers, checksums, index, figures, trailer), so the
change that a test has made is the only error.
"""

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass, field, replace

from snapengine.base.checksum import crc32c_of
from snapengine.image.records import read_record
from snapengine.storage.stream_source import StreamSource

HEADER = struct.Struct("<8sHHIQ16s16sI")
RECORD = struct.Struct("<4sHHQQIIQI")
INDEX = struct.Struct("<QQQQII")
TRAILER = struct.Struct("<QQQQQQQ16s")
HEADER_NAMES = ("magic", "major", "minor", "header_bytes", "features", "id", "parent", "reserved")
INDEX_NAMES = ("offset", "record_bytes", "first_page", "last_page", "entries", "type")
TRAILER_NAMES = ("regn", "stat", "indx", "records", "chunks", "vmstate", "bytes", "id")
LAST, IGNORE = 1, 1 << 15


@dataclass
class Piece:
    """One record. ``lies``: header fields that are written with these values, right or wrong."""

    type: bytes
    payload: bytes = b""
    meta: bytes = b""
    encoding: int = 0
    flags: int = 0
    arg: int = 0
    raw_bytes: int = -1
    lies: dict[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return 48 + len(self.meta) + len(self.payload)


@dataclass
class Forge:
    """A whole image. ``index`` and ``trailer`` change values that `put_together` computes: by number of the
    index entry, and by name."""

    header: dict[str, object]
    pieces: list[Piece]
    index: dict[int, dict[str, int]] = field(default_factory=dict)
    trailer: dict[str, object] = field(default_factory=dict)
    entries: list[int] | None = None
    """The numbers of the correct index entries that are written, in this order; None: all."""
    stat_size: bool = True

    def of(self, kind: bytes, number: int = 0) -> Piece:
        return [piece for piece in self.pieces if piece.type == kind][number]

    def at(self, kind: bytes, number: int = 0) -> int:
        return [at for at, piece in enumerate(self.pieces) if piece.type == kind][number]


def take_apart(data: bytes) -> Forge:
    """The records of a valid image."""
    header = dict(zip(HEADER_NAMES, HEADER.unpack_from(data), strict=True))
    pieces, offset = [], 64
    while offset < len(data):
        one = read_record(StreamSource(io.BytesIO(data[offset:])), 0)
        payload = data[offset + one.payload_offset : offset + one.end]
        raw = one.raw_bytes if one.encoding else -1
        pieces.append(Piece(one.type, payload, one.meta, one.encoding, one.flags, one.arg, raw))
        offset += one.end
    return Forge(header, pieces)


def copy_of(forge: Forge) -> Forge:
    """A copy that shares nothing with the original."""
    pieces = [replace(piece, lies=dict(piece.lies)) for piece in forge.pieces]
    index = {number: dict(changes) for number, changes in forge.index.items()}
    return replace(forge, header=dict(forge.header), pieces=pieces, index=index, trailer=dict(forge.trailer))


def put_together(forge: Forge) -> bytes:
    """The image's bytes."""
    pieces = [replace(piece) for piece in forge.pieces]
    entries = _true_index(pieces)
    chosen = list(range(len(entries))) if forge.entries is None else forge.entries
    listed = [entries[number] for number in chosen]
    _fill_index(pieces, len(listed), b"")
    offsets = _offsets(pieces)
    at = [offsets[number] for number, piece in enumerate(pieces) if piece.type in (b"CHNK", b"VMST")]
    for entry, number in zip(listed, chosen, strict=True):
        entry["offset"] = at[number]
    for number, changes in forge.index.items():
        listed[number] |= changes
    packed = b"".join(INDEX.pack(*(entry[name] for name in INDEX_NAMES)) for entry in listed)
    _fill_index(pieces, len(listed), packed)
    total = offsets[-1]
    for piece in pieces:
        if piece.type == b"STAT" and forge.stat_size and piece.encoding == 0:
            piece.payload = _with_size(piece.payload, total)
        elif piece.type == b"TRLR" and len(piece.payload) == TRAILER.size and piece.encoding == 0:
            piece.payload = _trailer(forge, pieces, offsets)
    head = HEADER.pack(*(forge.header[name] for name in HEADER_NAMES))
    parts = [head, struct.pack("<I", crc32c_of(head))]
    return b"".join(parts + [_packed(piece, seq) for seq, piece in enumerate(pieces)])


def _packed(piece: Piece, seq: int) -> bytes:
    fields = {
        "type": piece.type, "encoding": piece.encoding, "flags": piece.flags,
        "stored_bytes": len(piece.payload),
        "raw_bytes": piece.raw_bytes if piece.raw_bytes >= 0 else len(piece.payload),
        "meta_bytes": len(piece.meta), "arg": piece.arg, "seq": seq, "payload_crc": crc32c_of(piece.payload),
    }  # fmt: skip
    head = RECORD.pack(*(fields | piece.lies).values())
    crc = crc32c_of(piece.meta, crc32c_of(head))
    return head + struct.pack("<I", crc) + piece.meta + piece.payload


def _offsets(pieces: list[Piece]) -> list[int]:
    offsets = [64]
    for piece in pieces:
        offsets.append(offsets[-1] + piece.size)
    return offsets


def _true_index(pieces: list[Piece]) -> list[dict[str, int]]:
    entries = []
    for piece in pieces:
        kind = int.from_bytes(piece.type, "little")
        if piece.type == b"CHNK":
            words = [word for (word,) in struct.iter_unpack("<Q", piece.meta[: len(piece.meta) // 8 * 8])]
            first = [word & ((1 << 40) - 1) for word in words] or [0]
            last = [(word & ((1 << 40) - 1)) + (word >> 40 & ((1 << 22) - 1)) for word in words] or [0]
            entry = {"first_page": min(first), "last_page": max(last), "entries": len(words)}
        elif piece.type == b"VMST":
            raw = piece.raw_bytes if piece.raw_bytes >= 0 else len(piece.payload)
            entry = {"first_page": piece.arg, "last_page": raw, "entries": 0}
        else:
            continue
        entries.append({"offset": 0, "record_bytes": piece.size, "type": kind} | entry)
    return entries


def _fill_index(pieces: list[Piece], count: int, packed: bytes) -> None:
    """All entries go into the first INDX. If there are several INDX records, they keep their content."""
    indexes = [piece for piece in pieces if piece.type == b"INDX"]
    if len(indexes) == 1 and indexes[0].encoding == 0:
        indexes[0].payload = packed or bytes(INDEX.size * count)
        indexes[0].arg = indexes[0].lies.get("arg", count)


def _with_size(text: bytes, total: int) -> bytes:
    """The JSON of a STAT record with another image_bytes, of the same length."""
    changed = re.sub(rb'("image_bytes": )\d+', rb"\g<1>%d" % total, text.rstrip(b" "))
    return changed.ljust(len(text)) if len(changed) <= len(text) else text


def _trailer(forge: Forge, pieces: list[Piece], offsets: list[int]) -> bytes:
    def first(kind: bytes) -> int:
        return next((offsets[at] for at, piece in enumerate(pieces) if piece.type == kind), 0)

    def count(kind: bytes) -> int:
        return sum(piece.type == kind for piece in pieces)

    true = {
        "regn": first(b"REGN"), "stat": first(b"STAT"), "indx": first(b"INDX"), "records": len(pieces),
        "chunks": count(b"CHNK"), "vmstate": count(b"VMST"), "bytes": offsets[-1], "id": forge.header["id"],
    }  # fmt: skip
    return TRAILER.pack(*((true | forge.trailer)[name] for name in TRAILER_NAMES))

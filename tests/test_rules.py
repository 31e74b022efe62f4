"""The rules of FORMAT.md: the readers of files and of pipes find the same errors."""

from __future__ import annotations

import io
import json
import random
import struct
import tracemalloc

import pytest
import zstandard
from image_forge import IGNORE, LAST, Forge, Piece, copy_of, put_together, take_apart
from image_kit import noise, opened, read_everything, sample, stream_everything

from snapengine.errors import ImageError, UnsupportedVersionError
from snapengine.image.stream import stream_image
from snapengine.image.writer import Writer
from snapengine.regions import KINDS, Region
from snapengine.storage.sinks import MemorySink

SOUND = take_apart(sample().data)


def verdict(read, image: bytes) -> str:
    """Whether the image is refused; an exception other than `ImageError` fails the test."""
    try:
        read(image)
    except ImageError:
        return "refused"
    return "read"


def changed(change) -> bytes:
    forge = copy_of(SOUND)
    change(forge)
    return put_together(forge)


def insert(at, piece):
    return lambda forge: forge.pieces.insert(at(forge), piece)


def header(**fields):
    return lambda forge: forge.header.update(fields)


def on(kind, number=0, **fields):
    def change(forge: Forge):
        for name, value in fields.items():
            setattr(forge.of(kind, number), name, value)

    return change


def lie(kind, number=0, **fields):
    return lambda forge: forge.of(kind, number).lies.update(fields)


def region(**fields):
    names = ("addr", "length", "first_page", "page_size", "kind", "name_bytes")

    def change(forge: Forge):
        payload = forge.of(b"REGN").payload
        values = dict(zip(names, struct.unpack_from("<QQQIHH", payload), strict=True)) | fields
        forge.of(b"REGN").payload = struct.pack("<QQQIHH", *values.values()) + payload[32:]

    return change


def region_named(name: bytes):
    """The first region by another name of three bytes."""
    return lambda forge: on(b"REGN", payload=forge.of(b"REGN").payload.replace(b"ram", name))(forge)


def entry(number, **fields):
    return lambda forge: forge.index.update({number: fields})


def move(kind, to, number=0):
    def change(forge: Forge):
        forge.pieces.insert(to(forge), forge.pieces.pop(forge.at(kind, number)))

    return change


def stats(text: bytes):
    def change(forge: Forge):
        forge.of(b"STAT").payload = text.ljust(400)

    return change


def figure(**members):
    """One additional member of the figures; all others are unchanged."""
    more = json.dumps(members).encode()[1:-1]
    return lambda forge: on(b"STAT", payload=forge.of(b"STAT").payload.rstrip()[:-1] + b", " + more + b"}")(
        forge
    )


def before(kind, number=0):
    return lambda forge: forge.at(kind, number)


def behind(kind, number=0):
    return lambda forge: forge.at(kind, number) + 1


def split_regions(forge: Forge):
    """Both regions in a record of their own."""
    whole = forge.of(b"REGN").payload
    (name_bytes,) = struct.unpack_from("<H", whole, 30)
    cut = 32 + name_bytes
    forge.pieces[0:1] = [Piece(b"REGN", whole[:cut], arg=1), Piece(b"REGN", whole[cut:], arg=1, flags=LAST)]


def between_regions(other):
    def change(forge: Forge):
        split_regions(forge)
        forge.pieces.insert(1, other)

    return change


def packed(kind, number=0):
    def change(forge: Forge):
        one = forge.of(kind, number)
        one.raw_bytes = len(one.payload)
        one.payload, one.encoding = zstandard.ZstdCompressor().compress(one.payload), 1

    return change


PADDING = Piece(b"PADD", meta=bytes(9), flags=IGNORE)
UNKNOWN = Piece(b"NEWS", b"what a later version wrote", b"meta", encoding=7, flags=IGNORE | 4)

FORBIDDEN = {
    "header_bytes short": header(header_bytes=60),
    "header_bytes long": header(header_bytes=128),
    "reserved": header(reserved=1),
    "page_size 0": region(page_size=0),
    "page_size odd": region(page_size=4095),
    "page_size of anon": region(page_size=2 << 20),
    "page_size of hugetlb": region(kind=KINDS.index("hugetlb")),
    "page_size no power": region(kind=KINDS.index("hugetlb"), page_size=3 << 20),
    "page_size huge": region(kind=KINDS.index("hugetlb"), page_size=1 << 31),
    "region kind": region(kind=4),
    "region length": region(length=0),
    "region name with a NUL": region_named(b"r\0m"),
    "region meta": on(b"REGN", meta=b"m"),
    "region count": lie(b"REGN", arg=1),
    "region not last": on(b"REGN", flags=0),
    "no regions": lambda forge: forge.pieces.pop(0),
    "regions late": move(b"REGN", behind(b"CHNK")),
    "regions twice": lambda forge: forge.pieces.insert(3, forge.pieces[0]),
    "regions behind the figures": lambda forge: forge.pieces.insert(forge.at(b"INDX"), forge.pieces[0]),
    "padding between regions": between_regions(PADDING),
    "unknown between regions": between_regions(UNKNOWN),
    "padding first": insert(before(b"REGN"), PADDING),
    "unknown first": insert(before(b"REGN"), UNKNOWN),
    "padding behind the figures": insert(behind(b"STAT"), PADDING),
    "padding behind the index": insert(behind(b"INDX"), PADDING),
    "padding payload": insert(before(b"CHNK"), Piece(b"PADD", b"x", bytes(9), flags=IGNORE)),
    "padding too long": insert(before(b"CHNK"), Piece(b"PADD", meta=bytes(64), flags=IGNORE)),
    "padding not zero": insert(before(b"CHNK"), Piece(b"PADD", meta=b"\1", flags=IGNORE)),
    "padding flag missing": insert(before(b"CHNK"), Piece(b"PADD", meta=bytes(9))),
    "padding flags": insert(before(b"CHNK"), Piece(b"PADD", meta=bytes(9), flags=IGNORE | LAST)),
    "padding arg": insert(before(b"CHNK"), Piece(b"PADD", meta=bytes(9), flags=IGNORE, arg=1)),
    "padding encoding": insert(before(b"CHNK"), Piece(b"PADD", meta=bytes(9), flags=IGNORE, encoding=1)),
    "unknown needed": insert(before(b"CHNK"), Piece(b"NEWS", b"x")),
    "chunk is a last part": on(b"CHNK", flags=LAST),
    "chunk map odd": lambda forge: on(b"CHNK", meta=forge.of(b"CHNK").meta + b"1234")(forge),
    "chunk map empty": on(b"CHNK", meta=b""),
    "chunk number": on(b"CHNK", arg=5),
    "chunk behind the figures": move(b"CHNK", before(b"INDX")),
    "vmstate name empty": on(b"VMST", meta=b""),
    "vmstate name long": on(b"VMST", meta=b"n" * 4097),
    "vmstate name with a NUL": on(b"VMST", meta=b"a\0b"),
    "vmstate twice": lambda forge: forge.pieces.insert(forge.at(b"VMST") + 1, forge.of(b"VMST")),
    "vmstate without an end": on(b"VMST", flags=0),
    "vmstate part": on(b"VMST", arg=1),
    "vmstate part too large": on(b"VMST", payload=bytes((1 << 20) + 1)),
    "vmstate behind the index": move(b"VMST", before(b"TRLR")),
    "figures meta": on(b"STAT", meta=b"m"),
    "figures twice": lambda forge: forge.pieces.insert(forge.at(b"STAT"), forge.of(b"STAT")),
    "figures early": move(b"STAT", before(b"CHNK")),
    "no figures": lambda forge: forge.pieces.pop(forge.at(b"STAT")),
    "figures not ASCII": stats('{"method": "ü"}'.encode()),
    "figures are a list": stats(b"[1]"),
    "figures NaN": figure(method="x", more=float("nan")),
    "figures too deep": figure(own=json.loads("[" * 40 + "]" * 40)),
    "figures no text": figure(own="\ud800"),
    "figures number": stats(b"7"),
    "figures without a size": stats(b"{}"),
    "index meta": on(b"INDX", meta=b"m"),
    "index count": lie(b"INDX", arg=3),
    "index not last": on(b"INDX", flags=0),
    "index early": move(b"INDX", before(b"STAT")),
    "no index": lambda forge: forge.pieces.pop(forge.at(b"INDX")),
    "index lacks a chunk": lambda forge: setattr(forge, "entries", [1, 2, 3, 4, 5]),
    "index lacks a blob": lambda forge: setattr(forge, "entries", [0, 2, 3, 4, 5]),
    "index out of order": lambda forge: setattr(forge, "entries", [0, 2, 1, 3, 4, 5]),
    "index before the records": entry(0, offset=64),
    "index into the figures": entry(4, record_bytes=1 << 20),
    "index type": entry(0, type=7),
    "index of padding": entry(0, type=int.from_bytes(b"PADD", "little")),
    "index chunk pages": entry(0, first_page=1),
    "index chunk entries": entry(0, entries=2),
    "index blob part": entry(1, first_page=1),
    "index blob size": entry(1, last_page=8),
    "index blob entries": entry(1, entries=1),
    "index blob bytes": entry(1, record_bytes=61),
    "index blob empty": entry(1, record_bytes=0),
    "trailer of another": lambda forge: forge.trailer.update(id=bytes(16)),
    "trailer records": lambda forge: forge.trailer.update(records=3),
    "trailer chunks": lambda forge: forge.trailer.update(chunks=2),
    "trailer blobs": lambda forge: forge.trailer.update(vmstate=2),
    "trailer stat": lambda forge: forge.trailer.update(stat=65),
    "trailer meta": on(b"TRLR", meta=b"m"),
    "trailer size": on(b"TRLR", payload=bytes(80)),
    "trailer flags": on(b"TRLR", flags=LAST),
    "trailer twice": lambda forge: forge.pieces.append(forge.of(b"TRLR")),
    "behind the trailer": lambda forge: forge.pieces.append(UNKNOWN),
    "packed trailer": lambda forge: (on(b"TRLR", payload=bytes(72))(forge), packed(b"TRLR")(forge)),
    "flags": on(b"CHNK", flags=2),
    "encoding": on(b"CHNK", encoding=2),
    "sequence": lie(b"CHNK", seq=9),
}
ALLOWED = {
    "as it was": lambda forge: None,
    "a later minor version": header(minor=3, reserved=9),
    "padding": insert(before(b"CHNK"), PADDING),
    "padding without a byte": insert(before(b"VMST"), Piece(b"PADD", flags=IGNORE)),
    "unknown among the memory": insert(before(b"CHNK", 1), UNKNOWN),
    "unknown behind the figures": insert(behind(b"STAT"), UNKNOWN),
    "unknown behind the index": insert(behind(b"INDX"), UNKNOWN),
    "regions in two parts": split_regions,
    "huge pages": region(kind=KINDS.index("hugetlb-shared"), page_size=1 << 30),
    "own figures": figure(own=[1.5, None, {"deep": {"er": True}}], text="\U0001f600"),
    "known type to ignore": on(b"VMST", flags=LAST | IGNORE),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_the_format_forbids_is_refused(what):
    image = changed(FORBIDDEN[what])
    assert (verdict(read_everything, image), verdict(stream_everything, image)) == ("refused", "refused")


@pytest.mark.parametrize("what", ALLOWED)
def test_what_the_format_allows_is_read(what):
    image = changed(ALLOWED[what])
    assert (verdict(read_everything, image), verdict(stream_everything, image)) == ("read", "read")


@pytest.mark.parametrize(
    ("kind", "size"), [("anon", 2 << 20), ("shared", 0), ("hugetlb", 4096), ("hugetlb-shared", 3 << 20)]
)
def test_the_writer_refuses_what_no_reader_takes(kind, size):
    with pytest.raises(ValueError, match="page size"):
        Writer(MemorySink()).begin([(Region("ram", 0, 2 << 20, size, kind), 0)])


@pytest.mark.parametrize("name", ["a\0b", "\0"])
def test_no_name_holds_a_nul(name):
    writer = Writer(MemorySink())
    with pytest.raises(ValueError, match="NUL"):
        writer.begin([(Region(name, 0, 4096), 0)])
    writer.begin([(Region("ram", 0, 4096), 0)])
    with pytest.raises(ValueError, match="NUL"):
        writer.vmstate(name, b"")


NUMBERS = (0, 1, 2, 3, 7, 8, 40, 48, 64, 4095, 4096, 1 << 16, 1 << 20, 1 << 31, (1 << 32) - 1)
WIDE = (*NUMBERS, 1 << 32, 1 << 40, 1 << 62, (1 << 64) - 1)


def field_changes(draw: random.Random, forge: Forge) -> None:
    """Change a field of a record, and recompute the values that depend on it."""
    one = draw.choice(forge.pieces)
    what = draw.randrange(6)
    if what == 0:
        one.flags = draw.choice((0, 1, 2, 3, IGNORE, IGNORE | 1, 0xFFFF))
    elif what == 1:
        one.arg = draw.choice(NUMBERS)
        one.lies["arg"] = one.arg
    elif what == 2:
        one.lies[draw.choice(("stored_bytes", "raw_bytes", "seq"))] = draw.choice(WIDE)
    elif what == 3:
        one.encoding = draw.randrange(3)
    elif what == 4:
        one.meta = draw.choice((b"", bytes(8), one.meta[:-1], one.meta + b"\0", one.meta * 2, b"\xff"))
    else:
        one.type = draw.choice((b"REGN", b"CHNK", b"VMST", b"PADD", b"STAT", b"INDX", b"TRLR", b"NEWS"))


def order_changes(draw: random.Random, forge: Forge) -> None:
    """Remove, duplicate, move or insert a record."""
    at, to = draw.randrange(len(forge.pieces)), draw.randrange(len(forge.pieces))
    what = draw.randrange(4)
    if what == 0:
        forge.pieces.pop(at)
    elif what == 1:
        forge.pieces.insert(to, forge.pieces[at])
    elif what == 2:
        forge.pieces.insert(to, forge.pieces.pop(at))
    else:
        forge.pieces.insert(to, draw.choice((PADDING, UNKNOWN, Piece(b"CHNK"), Piece(b"INDX", flags=LAST))))


def byte_changes(draw: random.Random, forge: Forge) -> None:
    """Change bytes in the payload or the meta of a record."""
    one = draw.choice(forge.pieces)
    name = draw.choice(("payload", "meta"))
    data = bytearray(getattr(one, name))
    for _ in range(draw.randrange(1, 4)):
        if data:
            at = draw.randrange(min(len(data), 200))
            data[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, data[at] ^ 1 << draw.randrange(8)))
    setattr(one, name, bytes(data))


def reference_changes(draw: random.Random, forge: Forge) -> None:
    """Change the index or the trailer."""
    if draw.randrange(2):
        name = draw.choice(("offset", "record_bytes", "first_page", "last_page", "entries", "type"))
        value = draw.choice(NUMBERS if name in ("entries", "type") else WIDE)
        forge.index[draw.randrange(2)] = {name: value}
    else:
        name = draw.choice(("regn", "stat", "indx", "records", "chunks", "vmstate", "bytes"))
        forge.trailer[name] = draw.choice(WIDE)


def mutant(seed: int) -> bytes:
    draw = random.Random(seed)
    forge = copy_of(SOUND)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        draw.choice((field_changes, order_changes, byte_changes, reference_changes))(draw, forge)
    try:
        return put_together(forge)
    except (IndexError, struct.error):  # an index entry of a removed record
        return put_together(copy_of(SOUND))


def test_both_readers_agree_on_any_image():
    images = {seed: mutant(seed) for seed in range(3000)}
    found = {n: (verdict(read_everything, one), verdict(stream_everything, one)) for n, one in images.items()}
    assert {seed: each for seed, each in found.items() if each[0] != each[1]} == {}
    read = sum(each[0] == "read" for each in found.values())
    assert 50 < read < 2000  # otherwise the mutations test nothing


def test_a_later_version_is_told_from_damage():
    for change in (insert(before(b"CHNK"), Piece(b"NEWS", b"x")), on(b"CHNK", flags=2), header(major=2)):
        for read in (read_everything, stream_everything):
            with pytest.raises(UnsupportedVersionError):
                read(changed(change))


def test_a_pipe_keeps_blobs_as_they_are_stored():
    """Otherwise a few bytes of zstd could take any amount of memory."""
    sink = MemorySink()
    writer = Writer(sink)
    writer.begin([(Region("ram", 0, 4096), 0)])
    writer.py_chunk([(0, 1, 0)], noise(1, 5))
    writer.vmstate("zeros", bytes(50 << 20), level=1)
    writer.finish({})
    sink.commit()
    tracemalloc.start()
    try:
        stream = stream_image(io.BytesIO(sink.getvalue()))
        for _ in stream:
            pass
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert stream.vmstate.sizes() == {"zeros": 50 << 20}
    assert most < 10 << 20
    assert stream.vmstate["zeros"] == bytes(50 << 20)
    with opened(sink.getvalue()) as image:
        assert image.vmstate.sizes() == stream.vmstate.sizes()

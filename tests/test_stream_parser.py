"""The parser of migration streams: what it keeps, what it rejects at which offset, and its memory use."""

import bz2
import contextlib
import gzip
import lzma
import os
import threading

import pytest
import streamkit as kit
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from snapengine.errors import CaptureCancelled, StreamError
from snapengine.image import records
from snapengine.qemu.stream_pages import CountingSpool, Spool
from snapengine.qemu.stream_parser import HEAD_MAX_BYTES, RAM_MAX_BYTES, StreamParser
from snapengine.qemu.tail import check_tail, device_sections

VALID = kit.stream(kit.SOME_PAGES)
RAM_OFFSET = len(b"QEVM") + 4 + len(kit.configuration())


def parse(source):
    """Parse all of a stream; return the parser."""
    return run(StreamParser(source))


def run(parser):
    parser.read_head()
    if hasattr(parser, "open_tables"):
        parser.open_tables()
    parser.read_pages()
    parser.read_tail()
    check_tail(parser.tail, parser.offset, parser.name)
    return parser


def counts_of(source):
    """Parse all of a stream with a CountingSpool; return it."""
    with contextlib.closing(CountingSpool(source)) as counted:
        return run(counted)


def refused(data, *words):
    """Parsing raises StreamError with these words; returns its offset."""
    with pytest.raises(StreamError) as caught:
        parse(data)
    for word in words:
        assert word in str(caught.value)
    assert str(caught.value).endswith(f"(at byte {caught.value.offset})")
    return caught.value.offset


def test_parts_are_kept_byte_for_byte():
    parser = parse(VALID)
    assert parser.head == kit.head()
    assert parser.tail == kit.tail()
    assert parser.machine_type == kit.MACHINE
    assert parser.ram_blocks == kit.BLOCKS
    assert parser.section_id == kit.RAM_ID
    assert parser.total_pages == 68
    assert parser.has_end
    assert (parser.pages, parser.zeros) == (8, 2)
    assert parser.offset == len(VALID)


def test_background_snapshot_has_no_end():
    parser = parse(kit.stream(kit.SOME_PAGES, end=False))
    assert not parser.has_end
    assert parser.tail == kit.tail()


def test_known_subsections_are_kept():
    config = kit.configuration(
        kit.subsection("configuration/target-page-bits", kit.u32(12)),
        kit.subsection("configuration/uuid", bytes(range(16))),
        kit.capabilities(),
    )
    parser = parse(kit.head(config=config) + kit.section(kit.record(0, None, "pc.ram")) + kit.tail())
    assert parser.head == kit.head(config=config)


def test_without_a_configuration():
    parser = parse(kit.head(config=b"") + kit.section() + kit.tail())
    assert parser.machine_type is None


def test_switchover_command_is_passed_over():
    pages = kit.section(kit.record(0, None, "pc.ram"))
    command = b"\x08" + bytes([0, 11, 0, 0])
    assert parse(kit.head() + pages + command + kit.section(kind=3) + kit.tail()).has_end


def test_continue_reaches_over_sections():
    parts = kit.section(kit.record(0, None, "pc.bios")), kit.section(kit.record(4096, kit.filled(1)))
    assert counts_of(kit.head() + b"".join(parts) + kit.tail()).histogram() == {0: 66, 1: 2}


def test_times_sent():
    counted = counts_of(VALID)
    assert counted.histogram() == {0: 68 - 6, 1: 2, 2: 4}
    assert (counted.data_pages, counted.zero_pages, counted.repeats) == (4, 2, 4)


BIG = 1 << 43
REFUSED = {
    "nothing": (b"", 0, ["ends early"]),
    "another file": (bytes(100), 0, ["not a migration stream of QEMU"]),
    "a core": (b"\x7fELF" + bytes(100), 0, ["not a migration stream", "an ELF file"]),
    "gzip": (gzip.compress(VALID), 0, ["compressed by gzip", "zcat"]),
    "bzip2": (bz2.compress(VALID), 0, ["compressed by bzip2"]),
    "xz": (lzma.compress(VALID), 0, ["compressed by xz", "xzcat"]),
    "zstd": (zstandard.compress(VALID), 0, ["compressed by zstd", "zstdcat"]),
    "libvirt, another version": (kit.libvirt_save(VALID, version=3), 0, ["save file of libvirt", "version"]),
    "libvirt, not completed": (kit.libvirt_save(VALID, b"LibvirtQemudPart"), 0, ["never completed"]),
    "libvirt, gzip": (
        kit.libvirt_save(gzip.compress(VALID), form=1), 0, ["compressed by gzip", "tail -c +157 FILE | zcat"],
    ),
    "libvirt, sparse": (kit.libvirt_save(VALID, form=6), 0, ["format sparse", "save it as raw"]),
    "libvirt, unknown format": (kit.libvirt_save(VALID, form=99), 0, ["unknown format (99)"]),
    "libvirt, no XML": (kit.libvirt_save(VALID, data_bytes=0), 0, ["damaged header"]),
    "libvirt, endless XML": (kit.libvirt_save(VALID, data_bytes=1 << 31), 0, ["damaged header"]),
    "libvirt, a cookie outside": (kit.libvirt_save(VALID, cookie=65), 0, ["damaged header"]),
    "libvirt, cut off": (kit.libvirt_save(VALID)[:100], 100, ["ends early"]),
    "libvirt, no stream": (
        kit.libvirt_save(bytes(200)), 156, ["a save file of libvirt", "not a migration stream"],
    ),
    "qcow2": (b"QFI\xfb" + kit.u32(3) + bytes(100), 0, ["a qcow2 disk image"]),
    "an image": (records.MAGIC + bytes(100), 0, ["an image of snapengine already"]),
    "version": (b"QEVM" + kit.u32(2) + bytes(50), 4, ["version 2"]),
    "endless machine type": (b"QEVM" + kit.u32(3) + b"\x07" + kit.u32(1 << 31), 9, ["machine type"]),
    "x-ignore-shared": (
        kit.head(config=kit.configuration(kit.capabilities("x-ignore-shared"))), RAM_OFFSET,
        ["configuration/capabilities", "x-ignore-shared"],
    ),
    "mapped-ram": (
        kit.head(config=kit.configuration(kit.capabilities("mapped-ram"))), RAM_OFFSET, ["mapped-ram"],
    ),
    "pages of 16 KiB": (
        kit.head(config=kit.configuration(kit.subsection("configuration/target-page-bits", kit.u32(14)))),
        RAM_OFFSET, ["target-page-bits", "2^14"],
    ),
    "unknown subsection": (
        kit.head(config=kit.configuration(kit.subsection("configuration/x", b""))), RAM_OFFSET,
        ["configuration/x"],
    ),
    "subsection of another version": (
        kit.head(config=kit.configuration(kit.subsection("configuration/uuid", bytes(16), 2))), RAM_OFFSET,
        ["configuration/uuid", "version 2"],
    ),
    "other section first": (
        b"QEVM" + kit.u32(3) + kit.configuration() + kit.ram_start(name="dirty-bitmap"), RAM_OFFSET,
        ["dirty-bitmap"],
    ),
    "device state first": (
        b"QEVM" + kit.u32(3) + kit.configuration() + kit.device("virtio-mem", b"", 3), RAM_OFFSET,
        ["virtio-mem"],
    ),
    "other section later": (
        kit.head() + b"\x01" + kit.u32(9) + kit.text("vfio"), len(kit.head()), ["vfio"],
    ),
    "part of another section": (kit.head() + kit.section(section_id=9), len(kit.head()), ["section 9"]),
    "RAM of version 3": (
        b"QEVM" + kit.u32(3) + kit.configuration() + kit.ram_start(version=3), RAM_OFFSET,
        ["ram", "version 3"],
    ),
    "postcopy": (
        b"QEVM" + kit.u32(3) + kit.configuration() + b"\x08\0\3\0\x10" + bytes(16), RAM_OFFSET,
        ["POSTCOPY_ADVISE"],
    ),
    "unknown command": (kit.head() + b"\x08\0\x63\0\0", len(kit.head()), ["number 99"]),
    "too much RAM": (
        b"QEVM" + kit.u32(3) + kit.configuration() + kit.ram_start([("a", BIG), ("b", BIG), ("c", 4096)]),
        RAM_OFFSET + 17, [f"{2 * BIG + 4096} bytes"],
    ),
    "no RAM": (b"QEVM" + kit.u32(3) + kit.configuration() + kit.ram_start([]), RAM_OFFSET + 17, ["0 bytes"]),
    "a block of no length": (kit.head([("a", 0), ("b", 4096)]), RAM_OFFSET + 25, ["'a' with 0 bytes"]),
    "half a page": (kit.head([("a", 4096 + 2048), ("b", 2048)]), RAM_OFFSET + 25, ["'a' with 6144 bytes"]),
    "a block twice": (kit.head([("a", 4096), ("a", 4096)]), RAM_OFFSET + 35, ["'a'"]),
    "blocks beyond the total": (
        b"QEVM" + kit.u32(3) + kit.configuration() + kit.ram_start([("a", 8192)], total=4096),
        RAM_OFFSET + 25, ["'a' with 8192 bytes", "4096"],
    ),
    "a name that is no text": (
        kit.head([("abc", 4096)]).replace(b"abc", b"\xff\xfe\xfd"), RAM_OFFSET + 26, ["not text"],
    ),
    "a name that rings": (
        kit.head([("abc", 4096)]).replace(b"abc", b"a\7c"), RAM_OFFSET + 26, ["not text"],
    ),
    "multifd": (
        b"QEVM" + kit.u32(3) + kit.configuration() + kit.ram_start([("a", 4096)], end=0x200),
        RAM_OFFSET + 35, ["multifd"],
    ),
    "no footer": (kit.head()[:-5] + kit.section(), len(kit.head()) - 5, ["footer"]),
    "footer of another": (kit.head()[:-1] + b"\x07" + kit.section(), len(kit.head()) - 5, ["footer"]),
    "xbzrle": (kit.head() + kit.section(kit.u64(0x40)), len(kit.head()) + 5, ["xbzrle"]),
    "compressed": (kit.head() + kit.section(kit.u64(0x100)), len(kit.head()) + 5, ["compressed"]),
    "RDMA": (kit.head() + kit.section(kit.u64(0x80)), len(kit.head()) + 5, ["RDMA"]),
    "unknown flag": (kit.head() + kit.section(kit.u64(0x400)), len(kit.head()) + 5, ["0x400"]),
    "two kinds of page at once": (kit.head() + kit.section(kit.u64(0x0A)), len(kit.head()) + 5, ["0xa"]),
    "a page of no block": (kit.head() + kit.section(kit.record(0, None)), len(kit.head()) + 5, ["any block"]),
    "an unknown block": (
        kit.head() + kit.section(kit.record(0, None, "pc.rom")), len(kit.head()) + 5, ["not in its list"],
    ),
    "a page beyond its block": (
        kit.head() + kit.section(kit.record(64 * 4096, None, "pc.ram")), len(kit.head()) + 5,
        ["beyond the end"],
    ),
    "a page of ones": (
        kit.head() + kit.section(kit.record(0, None, "pc.ram")[:-1] + b"\1"), len(kit.head()) + 5,
        ["one byte"],
    ),
    "pages behind the END": (
        kit.head() + kit.section(kind=3) + kit.section(), len(kit.head()) + len(kit.section()), ["not open"],
    ),
    "no device": (kit.head() + kit.section() + b"\0", len(kit.head()) + len(kit.section()), ["EOF"]),
    "garbage": (kit.head() + b"\x55" * 100, len(kit.head()), ["0x55"]),
    "too long a head": (
        b"QEVM" + kit.u32(3) + kit.configuration(*[kit.subsection("configuration/uuid", bytes(16))] * 30000),
        None, ["1 MiB"],
    ),
    "too many blocks": (
        b"QEVM" + kit.u32(3) + kit.configuration() + kit.ram_start([(str(n), 4096) for n in range(1025)]),
        None, ["1024 blocks"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    data, offset, words = REFUSED[case]
    path = tmp_path / "stream"
    path.write_bytes(data)
    with path.open("rb") as file:  # some are longer than the limit for a bytes object
        found = refused(file.fileno(), *words)
    assert offset is None or found == offset


def test_every_truncation_is_found():
    """Except the one at the EOF byte: QEMU can be configured to omit the description that follows it."""
    whole = len(kit.stream(kit.SOME_PAGES, description=None))
    assert parse(VALID[:whole]).tail == kit.tail(None)
    for length in set(range(len(VALID))) - {whole}:
        with pytest.raises(StreamError) as caught:
            parse(VALID[:length])
        assert caught.value.offset == length


@pytest.mark.parametrize("description", [None, b"{}", b'{"a": "' + bytes(1536).replace(b"\0", b"x") + b'"}'])
def test_the_end_is_found(description):
    data = kit.stream(kit.SOME_PAGES, description=description)
    sections = device_sections(parse(data).tail)
    assert [(one.name, one.instance) for one in sections] == [("timer", 0), ("cpu", 0)]
    assert sum(one.size for one in sections) == kit.tail(None).rindex(b"\0")


def test_bytes_behind_the_end_are_refused():
    refused(VALID + b"x", "ends early")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_mutations_end_in_a_result_or_a_stream_error(data):
    changed = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(changed) - 1))
        kind = data.draw(st.sampled_from(["set", "cut", "insert", "flip"]))
        if kind == "set":
            changed[place] = data.draw(st.integers(0, 255))
        elif kind == "flip":
            changed[place] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del changed[place : place + data.draw(st.integers(1, 5000))]
        else:
            changed[place:place] = data.draw(st.binary(min_size=1, max_size=300))
        if not changed:
            break
    counted, error = None, None
    try:
        counted = counts_of(bytes(changed))
    except StreamError as caught:
        error = caught
    if counted is None:
        assert 0 <= error.offset <= len(changed)
    else:
        assert counted.offset == len(changed)
        assert sum(counted.histogram().values()) == counted.total_pages


def resident():
    """Resident bytes of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def test_stated_sizes_cost_nothing():
    half = RAM_MAX_BYTES // 8  # ext4 has no larger files
    blocks = [("a", half), ("b", half)]
    before = resident()
    pages = [("b", half // 4096 - 1, kit.filled(1)), ("a", 0, None), ("a", half // 8192, kit.filled(2))]
    with contextlib.closing(Spool(kit.stream(pages, blocks=blocks))) as spool:
        run(spool)
        assert (spool.data_pages, spool.zero_pages) == (2, 1)
        assert resident() - before < 32 << 20


@pytest.mark.parametrize("piece", [1, 7, 4096, 100_000])
def test_a_pipe_may_give_pieces(piece):
    pages = kit.SOME_PAGES if piece < 100 else [("pc.ram", n % 64, kit.filled(n)) for n in range(700)]
    data = kit.stream(pages)
    read_end, write_end = os.pipe()

    def feed():
        with os.fdopen(write_end, "wb", buffering=0) as pipe:
            for start in range(0, len(data), piece):
                pipe.write(data[start : start + piece])

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        parser = parse(read_end)
    finally:
        os.close(read_end)
        thread.join()
    assert parser.offset == len(data)
    assert parser.tail == kit.tail()
    assert parser.pages + parser.zeros == len(pages)


def test_cancel_ends_a_wait():
    read_end, write_end = os.pipe()
    parser = StreamParser(read_end, name="slow")
    timer = threading.Timer(0.1, parser.cancel)
    timer.start()
    with pytest.raises(CaptureCancelled, match="slow"):
        parser.read_head()
    timer.join()
    os.close(read_end)
    os.close(write_end)


def test_what_cannot_be_read(tmp_path):
    fd = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(IsADirectoryError):
        parse(fd)
    os.close(fd)
    with pytest.raises(ValueError, match="descriptor"):
        StreamParser(bytes(HEAD_MAX_BYTES + 1))


def test_order_of_calls():
    parser = StreamParser(VALID)
    with pytest.raises(ValueError, match="order"):
        parser.read_pages()
    parser.read_head()
    with pytest.raises(ValueError, match="order"):
        parser.read_head()

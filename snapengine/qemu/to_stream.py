"""An image back into a migration stream that `-incoming` of QEMU accepts.

    head │ PART ram (a block) │ PART ram (the next block) … │ END ram │ tail

Head and tail are blobs of the image, or made anew. The END section is always written: streams of `migrate`
have it, those of background-snapshot do not, and QEMU (7.2 and 10.0) takes both; so there is one form only.
Commands that stood between the sections of the RAM are left out: they concern sections that are refused.
Blocks come one after the other, the pages of a block in the order of the image's chunks, so that each chunk
is read once.
"""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from snapengine.errors import CorruptImageError, ImageError, StreamError
from snapengine.image import Image
from snapengine.image.sections import ImageRegion
from snapengine.qemu.blobs import HEAD, NAME_MAX_BYTES, TAIL
from snapengine.qemu.stream_parser import HEAD_MAX_BYTES, RAM_MAX_BYTES, TAIL_MAX_BYTES, StreamParser
from snapengine.qemu.stream_sender import PageSender
from snapengine.storage.pipes import enlarge_pipe

__all__ = ["SMALL_BLOCK_BYTES", "Meter", "Sent", "make_head", "stream_blobs", "write_stream"]

SMALL_BLOCK_BYTES = 64 << 20
RAM_SECTION_ID = 2
Holes = Literal["small", "send", "skip"]

_MAGIC_VERSION = struct.pack(">4sI", b"QEVM", 3)
_START, _PART, _END, _CONFIGURATION, _FOOTER = 0x01, 0x02, 0x03, 0x07, 0x7E
_MEM_SIZE, _EOS = 0x04, 0x10


class Meter:
    """How far `write_stream` is. Any thread may look."""

    def __init__(self) -> None:
        self.senders: list[PageSender] = []

    @property
    def sent_bytes(self) -> int:
        """Bytes of RAM records that the reader has taken."""
        return sum(sender.sent_bytes for sender in self.senders)


@dataclass(frozen=True, slots=True)
class Sent:
    """What `write_stream` wrote: pages of 4096 bytes, bytes of the whole stream."""

    data_pages: int
    zero_pages: int
    stream_bytes: int


def make_head(machine_type: str | None, blocks: Sequence[tuple[str, int]]) -> bytes:
    """The head of a stream for a machine type such as "pc-i440fx-7.2" and its RAM blocks.

    Parameters
    ----------
    machine_type:
        None leaves the configuration section out: for a machine with ``migration.send-configuration=off``.
    blocks:
        (name, bytes in use), in the machine's order; multiples of 4096.

    Raises
    ------
    ValueError
        No block, or one that a stream cannot describe.
    """
    head = bytearray(_MAGIC_VERSION)
    if machine_type is not None:
        text = machine_type.encode()
        head += struct.pack(">BI", _CONFIGURATION, len(text)) + text
    head += struct.pack(">BIB3sII", _START, RAM_SECTION_ID, 3, b"ram", 0, 4)
    total = sum(used for _, used in blocks)
    if total > RAM_MAX_BYTES:
        raise ValueError(f"{total} bytes of RAM are not what a stream can describe")
    head += struct.pack(">Q", total | _MEM_SIZE)
    for name, used in blocks:
        text = name.encode()
        if len(text) > NAME_MAX_BYTES:
            raise ValueError(f"RAM block {name[:80]!r}: the name is longer than {NAME_MAX_BYTES} bytes")
        head += struct.pack(">B", len(text)) + text + struct.pack(">Q", used)
    head += struct.pack(">Q", _EOS) + _footer(RAM_SECTION_ID)
    _parse_head(bytes(head))  # what this package would not read it does not write
    return bytes(head)


def stream_blobs(image: Image) -> tuple[bytes, bytes]:
    """The head and the tail that came with a stream. ImageError: there are none, or they are too large."""
    sizes = image.vmstate.sizes()
    for name, limit in ((HEAD, HEAD_MAX_BYTES), (TAIL, TAIL_MAX_BYTES)):
        if name not in sizes:
            raise ImageError(f"{image.name}: has no blob {name}: it did not come from a migration stream")
        if sizes[name] > limit:
            raise ImageError(f"{image.name}: the blob {name} has {sizes[name]} bytes; {limit} are allowed")
    head = image.vmstate[HEAD]
    try:
        _parse_head(head)
    except ValueError as error:
        raise CorruptImageError(f"{image.name}: the blob {HEAD}: {error}") from None
    return head, image.vmstate[TAIL]


def write_stream(
    image: Image, fd: int, head: bytes | None = None, tail: bytes | None = None, *, holes: Holes = "small",
    meter: Meter | None = None,
) -> Sent:  # fmt: skip
    """Write the machine's stream into `fd`, a blocking or non-blocking descriptor that remains the caller's.

    Parameters
    ----------
    image:
        Its regions are the RAM blocks of the head, by name and length.
    head, tail:
        None: the blobs that the image holds.
    holes:
        A hole reads as zeros, and so does untouched RAM of a machine that waits for its stream; sending it
        would populate nothing but cost time. Not so of blocks that QEMU fills from files at its start
        (firmware, option ROMs, ACPI tables), which are small. So "small" sends the holes of blocks of up to
        64 MiB as zero pages; "send" those of all blocks, for a machine whose RAM is not fresh; "skip" none.
    meter:
        Tells other threads how far the stream is.

    Raises
    ------
    ImageError
        The image does not fit the head, or is damaged: the reader then has half a stream.
    StreamError
        The head is no head of a stream.
    OSError
        `fd` does not take it (EPIPE: the reader went away).
    """
    if head is None or tail is None:
        own_head, own_tail = stream_blobs(image)
        head = own_head if head is None else head
        tail = own_tail if tail is None else tail
    parser = _parse_head(head)
    regions = _regions_of(image, parser.ram_blocks)
    senders = [_sender(image, region, fd) for region in regions]  # before the reader gets half a stream
    if meter is not None:
        meter.senders = senders
    enlarge_pipe(fd)
    total = _write_all(fd, head)
    data = zeros = 0
    for region, sender in zip(regions, senders, strict=True):
        total += _write_all(fd, struct.pack(">BI", _PART, parser.section_id))
        sender.send_zeros(holes == "send" or (holes == "small" and region.length <= SMALL_BLOCK_BYTES))
        sender.send_data()
        total += _write_all(fd, struct.pack(">Q", _EOS) + _footer(parser.section_id))
        total += sender.sent_bytes
        data += sender.data_pages
        zeros += sender.zero_pages
    end = struct.pack(">BIQ", _END, parser.section_id, _EOS) + _footer(parser.section_id)
    total += _write_all(fd, end) + _write_all(fd, tail)
    return Sent(data, zeros, total)


def _parse_head(head: bytes) -> StreamParser:
    parser = StreamParser(head, name="head")
    parser.read_head()
    if len(parser.head) != len(head):
        raise StreamError(f"head: {len(head) - len(parser.head)} bytes too many", len(parser.head))
    return parser


def _regions_of(image: Image, blocks: list[tuple[str, int]]) -> list[ImageRegion]:
    """The regions in the order of the blocks; each block has one, and each region is a block."""
    regions = {region.name: region for region in image.regions}
    wanted = dict(blocks)
    if len(regions) != len(image.regions) or regions.keys() != wanted.keys():
        odd = sorted(regions.keys() ^ wanted.keys()) or sorted(regions)
        raise ImageError(f"{image.name}: regions and RAM blocks differ: {', '.join(odd)}")
    for name, used in blocks:
        if regions[name].length != used or regions[name].addr % 4096:
            found = f"{regions[name].length} bytes at {regions[name].addr:#x}"
            raise ImageError(f"{image.name}: {name}: {found} where the RAM block has {used}")
    return [regions[name] for name, _ in blocks]


def _sender(image: Image, region: ImageRegion, fd: int) -> PageSender:
    runs = image.checked_runs(region, 0, region.length)
    low = region.start_byte
    sender = PageSender(image.index, runs, low, low + region.length)
    sender.open(fd, region.name.encode())
    return sender


def _footer(section_id: int) -> bytes:
    return struct.pack(">BI", _FOOTER, section_id)


def _write_all(fd: int, data: bytes) -> int:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:
            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            poll.poll(50)
    return len(data)

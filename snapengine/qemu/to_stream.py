"""Conversion of an image to a migration stream that QEMU's `-incoming` accepts.

    head │ PART ram (a block) │ PART ram (the next block) … │ END ram │ tail

Head and tail are blobs of the image, or are passed by the caller. The END section is always written: streams
of `migrate` have it, those of background-snapshot do not, and QEMU (7.2 and 10.0) accepts both. Commands
between the RAM sections of the original stream are omitted: they concern sections that the parser rejects.
Blocks are written one after the other, and the pages of a block in the order of the image's chunks, so that
each chunk is read once.
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
    """Progress of `write_stream`. Any thread may read it."""

    def __init__(self) -> None:
        self.senders: list[PageSender] = []

    @property
    def sent_bytes(self) -> int:
        """Bytes of RAM records written so far."""
        return sum(sender.sent_bytes for sender in self.senders)


@dataclass(frozen=True, slots=True)
class Sent:
    """Statistics of `write_stream`: pages of 4096 bytes, and bytes of the whole stream."""

    data_pages: int
    zero_pages: int
    stream_bytes: int


def make_head(machine_type: str | None, blocks: Sequence[tuple[str, int]]) -> bytes:
    """Build the head of a stream for a machine type and its RAM blocks.

    Parameters
    ----------
    machine_type:
        For example "pc-i440fx-7.2". None omits the configuration section, for a machine with
        ``migration.send-configuration=off``.
    blocks:
        (name, bytes in use), in the machine's order. Sizes are multiples of 4096.

    Raises
    ------
    ValueError
        There is no block, or a stream cannot describe one.
    """
    head = bytearray(_MAGIC_VERSION)
    if machine_type is not None:
        text = machine_type.encode()
        head += struct.pack(">BI", _CONFIGURATION, len(text)) + text
    head += struct.pack(">BIB3sII", _START, RAM_SECTION_ID, 3, b"ram", 0, 4)
    total = sum(used for _, used in blocks)
    if total > RAM_MAX_BYTES:
        raise ValueError(f"{total} bytes of RAM are more than the {RAM_MAX_BYTES} that are supported")
    head += struct.pack(">Q", total | _MEM_SIZE)
    for name, used in blocks:
        text = name.encode()
        if len(text) > NAME_MAX_BYTES:
            raise ValueError(f"RAM block {name[:80]!r}: the name is longer than {NAME_MAX_BYTES} bytes")
        head += struct.pack(">B", len(text)) + text + struct.pack(">Q", used)
    head += struct.pack(">Q", _EOS) + _footer(RAM_SECTION_ID)
    _parse_head(bytes(head))  # never write a head that this package would reject
    return bytes(head)


def stream_blobs(image: Image) -> tuple[bytes, bytes]:
    """Return head and tail of the original stream. Raises ImageError if they are missing or too large."""
    sizes = image.vmstate.sizes()
    for name, limit in ((HEAD, HEAD_MAX_BYTES), (TAIL, TAIL_MAX_BYTES)):
        if name not in sizes:
            raise ImageError(f"{image.name}: has no blob {name}: it was not made from a migration stream")
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
    """Write the machine's stream to `fd`, a blocking or non-blocking descriptor. The caller closes it.

    Parameters
    ----------
    image:
        An image whose regions match the RAM blocks of the head by name and length.
    head, tail:
        None: use the blobs of the image.
    holes:
        Which holes to send as zero pages. Untouched RAM of a new QEMU reads as zeros anyway, so sending its
        holes only costs time. Blocks that QEMU fills from files at its start (firmware, option ROMs, ACPI
        tables) do need their holes, and are small. "small" sends the holes of blocks of up to 64 MiB.
        "send" sends all holes, for a machine whose RAM has been used. "skip" sends none.
    meter:
        Reports progress to other threads.

    Raises
    ------
    ImageError
        The image does not match the head, or is damaged. In the second case the reader has a partial stream.
    StreamError
        The head is malformed.
    OSError
        Writing to `fd` failed (EPIPE: the reader closed it).
    """
    if head is None or tail is None:
        own_head, own_tail = stream_blobs(image)
        head = own_head if head is None else head
        tail = own_tail if tail is None else tail
    parser = _parse_head(head)
    regions = _regions_of(image, parser.ram_blocks)
    senders = [_sender(image, region, fd) for region in regions]  # checks the image before any write
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
        raise StreamError(f"head: {len(head) - len(parser.head)} bytes follow its end", len(parser.head))
    return parser


def _regions_of(image: Image, blocks: list[tuple[str, int]]) -> list[ImageRegion]:
    """Return the regions in the order of the blocks. Regions and blocks must match one to one."""
    regions = {region.name: region for region in image.regions}
    wanted = dict(blocks)
    if len(regions) != len(image.regions) or regions.keys() != wanted.keys():
        unmatched = sorted(regions.keys() ^ wanted.keys()) or sorted(regions)
        raise ImageError(f"{image.name}: regions and RAM blocks differ: {', '.join(unmatched)}")
    for name, used in blocks:
        if regions[name].length != used or regions[name].addr % 4096:
            found = f"{regions[name].length} bytes at {regions[name].addr:#x}"
            raise ImageError(f"{image.name}: {name}: {found}, but the RAM block has {used} bytes")
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

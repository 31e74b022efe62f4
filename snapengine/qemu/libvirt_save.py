"""The header of libvirt's save files, which `virsh save` and `virsh snapshot-create-as --memspec` write.

    header (92 bytes) │ XML of the domain, NUL, [cookie, NUL], padding │ migration stream
                       └──────────────── data_bytes ─────────────────┘

Source: the structure virQEMUSaveHeader of libvirt (version 2; since 0.9), little or big endian like its host.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

HEADER_BYTES = 92
DATA_MAX_BYTES = 16 << 20  # the XML of a domain has some KiB
VERSION = 2
MAGIC = b"LibvirtQemudSave"
PARTIAL = b"LibvirtQemudPart"  # libvirt writes `MAGIC` over it at the end
# How the stream is stored, by number, and the program that unpacks it.
FORMATS = ("raw", "gzip", "bzip2", "xz", "lzop", "zstd", "sparse")
UNPACK = {"gzip": "zcat", "bzip2": "bzcat", "xz": "xzcat", "lzop": "lzop -dc", "zstd": "zstdcat"}


@dataclass(frozen=True, slots=True)
class SaveHeader:
    """What a header says."""

    data_bytes: int
    """Bytes between the header and the stream."""
    cookie_offset: int
    """Where the cookie begins in these bytes; 0: there is none."""

    def domain_xml(self, data: bytes) -> bytes:
        """Return the XML of the domain in `data`, the bytes between header and stream."""
        end = self.cookie_offset or len(data)
        return data[:end].split(b"\0", 1)[0]


def parse_header(header: bytes) -> SaveHeader:
    """Parse the first `HEADER_BYTES` of a file. Raises ValueError that says what it is and what to do."""
    magic, *words = struct.unpack("<16s5I", header[:36])
    if words[0] != VERSION:
        magic, *words = struct.unpack(">16s5I", header[:36])
    version, data_bytes, _running, form, cookie = words
    if magic == PARTIAL:
        raise ValueError("a save file of libvirt that was never completed")
    if magic != MAGIC or version != VERSION:
        raise ValueError("a save file of libvirt of an unknown version")
    if not 0 < data_bytes <= DATA_MAX_BYTES or not 0 <= cookie <= data_bytes:
        raise ValueError("a save file of libvirt with a damaged header")
    name = FORMATS[form] if form < len(FORMATS) else f"an unknown format ({form})"
    if name in UNPACK:
        start = HEADER_BYTES + data_bytes + 1
        raise ValueError(
            f"a save file of libvirt, compressed by {name}: "
            f"pass what `tail -c +{start} FILE | {UNPACK[name]}` prints"
        )
    if name != "raw":
        raise ValueError(f"a save file of libvirt in the format {name}, not a stream: save it as raw")
    return SaveHeader(data_bytes, cookie)

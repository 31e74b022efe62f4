"""Recognition, by magic number, of files that a user may mistake for a migration stream."""

from __future__ import annotations

# Sources: the specifications of the formats.
_KINDS = {
    b"\x1f\x8b\x08": "compressed by gzip: decompress it first (zcat)",
    b"\xfd7zX": "compressed by xz: decompress it first (xzcat)",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: decompress it first (zstdcat)",
    b"BZh": "compressed by bzip2: decompress it first (bzcat)",
    b"\x89LZO": "compressed by lzop: decompress it first (lzop -dc)",
    b"\x04\x22\x4d\x18": "compressed by lz4: decompress it first (lz4cat)",
    b"QFI\xfb": "a qcow2 disk image",
    b"\x7fELF": "an ELF file, as dump-guest-memory and virsh dump --memory-only write",
    b"\x89SNP": "an image of snapengine already",
}


def identify(magic: bytes) -> str:
    """Describe a file with these first bytes, with a hint what to do; "" if they are unknown."""
    return next((kind for start, kind in _KINDS.items() if magic.startswith(start)), "")

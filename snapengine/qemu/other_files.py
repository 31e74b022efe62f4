"""Files that are not migration streams, though a user may pass them as one: recognised by their first
bytes."""

from __future__ import annotations

# Each with a hint what to do. Sources: the formats' own specifications; libvirt's qemu_saveimage.h.
_KINDS = {
    b"\x1f\x8b\x08": "compressed by gzip: give what `zcat` prints of it",
    b"\xfd7zX": "compressed by xz: give what `xzcat` prints of it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: give what `zstdcat` prints of it",
    b"BZh": "compressed by bzip2: give what `bzcat` prints of it",
    b"\x89LZO": "compressed by lzop: give what `lzop -dc` prints of it",
    b"\x04\x22\x4d\x18": "compressed by lz4: give what `lz4cat` prints of it",
    b"Libv": "a save file of libvirt (virsh save): the stream follows its header and the domain's XML",
    b"QFI\xfb": "a qcow2 disk image",
    b"\x7fELF": "an ELF file, as dump-guest-memory and virsh dump --memory-only write",
    b"\x89SNP": "an image of snapengine already",
}


def what_it_is(magic: bytes) -> str:
    """What a file with these first bytes is, and what to do with it; "" if unknown."""
    return next((kind for start, kind in _KINDS.items() if magic.startswith(start)), "")

"""Headers and notes of ELF cores for x86-64. `snapengine.export.elf_core` computes the layout of the file.

Layouts: elf(5), core(5); <linux/elfcore.h>, which glibc shows as <sys/procfs.h>, for NT_PRSTATUS and
NT_PRPSINFO; the kernel's fs/binfmt_elf.c (6.1) for NT_FILE. Debuggers rely on the order of the notes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from snapengine.base.names import encode
from snapengine.process.record import ProcessRecord
from snapengine.process.thread_state import ThreadState
from snapengine.regions import PAGE_BYTES

PN_XNUM = 0xFFFF  # with at least this number of segments, section header 0 has the count
PT_LOAD, PT_NOTE = 1, 4
PF_X, PF_W, PF_R = 1, 2, 4
NT_PRSTATUS, NT_FPREGSET, NT_PRPSINFO, NT_AUXV = 1, 2, 3, 6
NT_FILE = 0x46494C45
NT_X86_XSTATE = 0x202

EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
PHDR = struct.Struct("<IIQQQQQQ")
SHDR = struct.Struct("<IIQQQQIIQQ")
NHDR = struct.Struct("<III")
# siginfo, cursig, pad, sigpend, sighold, pid, ppid, pgrp, sid, four times, registers, fpvalid, pad
PRSTATUS = struct.Struct("<12sh2xQQiiii64s216si4x")
# state, sname, zomb, nice, pad, flag, uid, gid, pid, ppid, pgrp, sid, fname, psargs
PRPSINFO = struct.Struct("<bcbb4xQIIiiii16s80s")


class Load(NamedTuple):
    """One PT_LOAD: the addresses [start, end). Their bytes are at ``position`` in the file, or, if not
    ``in_file``, are zeros without a range in the file."""

    start: int
    end: int
    flags: int
    position: int
    in_file: bool = True


class FileRange(NamedTuple):
    """One entry of NT_FILE: memory that a debugger may read from a file. ``offset`` is in bytes."""

    start: int
    end: int
    offset: int
    path: bytes


def elf_header(segments: int) -> bytes:
    """The ELF header. It is followed by `program_headers`, then `section_headers`."""
    extended = segments >= PN_XNUM
    shoff = EHDR.size + PHDR.size * segments if extended else 0
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")  # 64 bit, little-endian, version 1, System V
    counts = (min(segments, PN_XNUM), SHDR.size if extended else 0, int(extended), 0)
    return EHDR.pack(ident, 4, 62, 1, 0, EHDR.size, shoff, 0, EHDR.size, PHDR.size, *counts)


def section_headers(segments: int) -> bytes:
    """Section header 0, if the number of segments requires it (elf(5), PN_XNUM)."""
    return SHDR.pack(0, 0, 0, 0, 0, 0, 0, segments, 0, 0) if segments >= PN_XNUM else b""


def program_headers(notes_at: int, notes_bytes: int, loads: Sequence[Load]) -> Iterator[bytes]:
    """PT_NOTE and the PT_LOADs."""
    yield PHDR.pack(PT_NOTE, 0, notes_at, 0, 0, notes_bytes, 0, 4)
    for load in loads:
        size = load.end - load.start
        stored = size if load.in_file else 0
        yield PHDR.pack(PT_LOAD, load.flags, load.position, load.start, 0, stored, size, PAGE_BYTES)


def flags_of(perms: str) -> int:
    """The p_flags of "rwxp"."""
    return (perms[0] == "r") * PF_R | (perms[1] == "w") * PF_W | (perms[2] == "x") * PF_X


def notes(record: ProcessRecord, files: Sequence[FileRange]) -> bytes:
    """All notes. The registers of a thread follow its NT_PRSTATUS. The main thread is first.

    A soft cut has no NT_PRSTATUS. gdb then finds the threads with libthread_db and reports that their
    registers are unavailable. Registers of zeros would look like a thread that jumped to address 0.
    """
    threads = sorted(record.threads, key=lambda thread: thread.tid != record.pid)
    parts = [_note(NT_PRPSINFO, prpsinfo(record))]
    if record.auxv:
        parts.append(_note(NT_AUXV, record.auxv))
    if files:
        parts.append(_note(NT_FILE, file_note(files)))
    for thread in threads:
        parts.append(_note(NT_PRSTATUS, prstatus(thread, record.ppid)))
        parts.append(_note(NT_FPREGSET, thread.fpregs))
        if thread.xstate:
            parts.append(_note(NT_X86_XSTATE, thread.xstate, b"LINUX\0"))
    return b"".join(parts)


def prstatus(thread: ThreadState, ppid: int) -> bytes:
    """NT_PRSTATUS of a thread that was not stopped by a signal."""
    return PRSTATUS.pack(
        bytes(12), 0, 0, thread.sigmask, thread.tid, ppid, 0, 0, bytes(64), thread.regs, 1
    )  # fmt: skip


def prpsinfo(record: ProcessRecord) -> bytes:
    """NT_PRPSINFO of a running process. The arguments are truncated to 79 bytes, as by the kernel."""
    arguments = b" ".join(map(encode, record.cmdline))[:79]
    ids = (record.uid, record.gid, record.pid, record.ppid, 0, 0)
    return PRPSINFO.pack(0, b"R", 0, 0, 0, *ids, encode(record.comm)[:15], arguments)


def file_note(files: Sequence[FileRange]) -> bytes:
    """NT_FILE: count, page size, (start, end, offset in pages) of each entry, then the names."""
    numbers = (struct.pack("<QQQ", item.start, item.end, item.offset // PAGE_BYTES) for item in files)
    names = (item.path + b"\0" for item in files)
    return b"".join((struct.pack("<QQ", len(files), PAGE_BYTES), *numbers, *names))


def _note(kind: int, desc: bytes, owner: bytes = b"CORE\0") -> bytes:
    return NHDR.pack(len(owner), len(desc), kind) + _padded(owner) + _padded(desc)


def _padded(data: bytes) -> bytes:
    return data.ljust(-(-len(data) // 4) * 4, b"\0")

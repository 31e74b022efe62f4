"""The blob `process.threads`: the registers of every thread, packed (FORMAT.md defines it to the byte)."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from snapengine.base.names import decode, encode
from snapengine.process.thread_state import ThreadState

HEAD = struct.Struct("<II")
THREAD = struct.Struct("<IIQ16s216s512s")
VERSION = 1
XSTATE_MIN_BYTES = 576  # the legacy area and the XSAVE header (Intel SDM, volume 1, 13.4)
XSTATE_MAX_BYTES = 1 << 16  # AMX makes it 11 KiB
MAX_TID = (1 << 31) - 1


def pack_threads(threads: Sequence[ThreadState]) -> bytes:
    """Pack the blob. ``ValueError``: a register set has a wrong size, or a name is too long."""
    parts = [HEAD.pack(VERSION, len(threads))]
    if len({thread.tid for thread in threads}) < len(threads):
        raise ValueError("a thread is there twice")
    for thread in threads:
        comm = encode(thread.comm)
        _check(thread.tid, len(thread.xstate))
        if (len(thread.regs), len(thread.fpregs)) != (216, 512):
            raise ValueError(f"thread {thread.tid}: registers of a wrong size")
        if len(comm) > 15 or b"\0" in comm or not 0 <= thread.sigmask < 1 << 64:
            raise ValueError(f"thread {thread.tid}: its name or signal mask is impossible")
        head = (thread.tid, len(thread.xstate), thread.sigmask, comm, thread.regs, thread.fpregs)
        parts += THREAD.pack(*head), thread.xstate
    return b"".join(parts)


def parse_threads(blob: bytes) -> list[ThreadState]:
    """The threads of the blob. ``ValueError`` says what is wrong; the stored count is not trusted."""
    if len(blob) < HEAD.size:
        raise ValueError("the threads are cut short")
    version, count = HEAD.unpack_from(blob)
    if version != VERSION:
        raise ValueError(f"the threads have version {version}")
    threads: dict[int, ThreadState] = {}
    position = HEAD.size
    while len(threads) < count:
        if position + THREAD.size > len(blob):
            raise ValueError("the threads are cut short")
        tid, xstate_bytes, sigmask, comm, regs, fpregs = THREAD.unpack_from(blob, position)
        position += THREAD.size
        _check(tid, xstate_bytes)
        xstate = blob[position : position + xstate_bytes]
        position += xstate_bytes
        if len(xstate) != xstate_bytes:
            raise ValueError("the threads are cut short")
        if tid in threads:
            raise ValueError(f"thread {tid} is there twice")
        threads[tid] = ThreadState(tid, _name(tid, comm), regs, fpregs, xstate, sigmask)
    if position != len(blob):
        raise ValueError("bytes follow the last thread")
    return list(threads.values())


def _check(tid: int, xstate_bytes: int) -> None:
    if not 0 < tid <= MAX_TID:
        raise ValueError(f"{tid} is no thread id")
    if xstate_bytes and not XSTATE_MIN_BYTES <= xstate_bytes <= XSTATE_MAX_BYTES:
        raise ValueError(f"thread {tid}: an XSAVE area of {xstate_bytes} bytes")


def _name(tid: int, comm: bytes) -> str:
    name, _, padding = comm.partition(b"\0")
    if len(name) > 15 or padding.strip(b"\0"):
        raise ValueError(f"thread {tid}: its name is not padded with zeros")
    return decode(name)

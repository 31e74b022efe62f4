"""The RAM blocks of a QEMU process: names, sizes, and where they are in its memory.

Source: the command `x-query-ramblock` (QEMU 6.2). Its table has an address since QEMU 8.0; before, the
block's own record is looked for in the heap of the process.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace

from snapengine.errors import MachineError
from snapengine.kernel.procmaps import Mapping, covering, read_maps
from snapengine.qemu.monitor import Monitor
from snapengine.qemu.replies import ask
from snapengine.regions import PAGE_BYTES

UNITS = {"B": 0, "KiB": 10, "MiB": 20, "GiB": 30}
LINE = re.compile(
    r"\s*(?P<name>.*?)\s+(?P<size>\d{1,7}) (?P<unit>B|KiB|MiB|GiB)"
    r"\s+0x(?P<offset>[0-9a-f]{1,16})\s+0x(?P<used>[0-9a-f]{1,16})\s+0x(?P<total>[0-9a-f]{1,16})"
    r"(?:\s+0x(?P<addr>[0-9a-f]{1,16})\s+(?P<access>r[ow]))?\s*\Z"
)
HEAP_BYTES = 1 << 30  # most that is searched
HOST_BEFORE = 16  # bytes from a block's address to its sizes in its record (QEMU 6.2 to 7.2)
NAME_WITHIN = 128  # bytes between the sizes and its name


@dataclass(frozen=True, slots=True)
class RamBlock:
    """One block. ``used`` and ``total`` are bytes (it may grow to ``total``), ``page_size`` is that of the
    host memory, ``offset`` is QEMU's own number for the block's first byte (ram_addr_t, not an address
    of the guest). ``addr`` is the block's address in the QEMU process; 0: not known."""

    name: str
    page_size: int
    offset: int
    used: int
    total: int
    addr: int = 0


def parse_table(text: str) -> list[RamBlock]:
    """The blocks of the table that `x-query-ramblock` prints. Raises MachineError.

    Blocks without a name are left out: QEMU does not migrate them (they are windows into devices).
    """
    blocks = []
    for line in text.splitlines()[1:]:
        if not line.strip():
            continue
        match = LINE.match(line)
        if match is None:
            raise MachineError(
                f"QEMU's table of RAM blocks has a line that is not understood: {line.strip()!r}"
            )
        block = RamBlock(
            name=match["name"],
            page_size=int(match["size"]) << UNITS[match["unit"]],
            offset=int(match["offset"], 16),
            used=int(match["used"], 16),
            total=int(match["total"], 16),
            addr=int(match["addr"] or "0", 16),
        )
        if block.name and block.used:
            blocks.append(block)
    if len({block.name for block in blocks}) < len(blocks) or not blocks:
        raise MachineError("QEMU's table of RAM blocks is empty, or has a name twice")
    return blocks


def ram_blocks(monitor: Monitor) -> list[RamBlock]:
    """The machine's blocks; ``addr`` may be missing, see `locate`. Raises MachineError."""
    return parse_table(ask(monitor, "x-query-ramblock").plain("human-readable-text"))


def locate(blocks: Iterable[RamBlock], pid: int) -> list[RamBlock]:
    """The blocks with their addresses in process `pid`. Raises MachineError, OSError.

    Each block's record in the heap of QEMU holds offset, used and total length as three neighbouring 64-bit
    words, shortly before them the block's address, and behind them its name. All five must fit, and a
    writable mapping must hold the block; so no other bytes can be taken for it.
    """
    mappings = read_maps(pid)
    wanted = list(blocks)
    found = {block.name: block.addr for block in wanted if block.addr}
    if len(found) < len(wanted):
        for memory in _heap(pid, mappings):
            for block in wanted:
                if block.name not in found and (addr := _search(memory, block, mappings)):
                    found[block.name] = addr
    lost = [block.name for block in wanted if block.name not in found]
    if lost:
        raise MachineError(
            f"process {pid}: the address of RAM block {lost[0]!r} is not known (QEMU before 8.0)"
        )
    return [replace(block, addr=found[block.name]) for block in wanted]


def _heap(pid: int, mappings: list[Mapping]) -> Iterable[bytes]:
    """The brk heap of the process, where its main thread allocates."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for mapping in mappings:
            if mapping.path == "[heap]" and mapping.end - mapping.start <= HEAP_BYTES:
                yield os.pread(memory.fileno(), mapping.end - mapping.start, mapping.start)


def _search(memory: bytes, block: RamBlock, mappings: list[Mapping]) -> int:
    sizes = struct.pack("<3Q", block.offset, block.used, block.total)
    name = block.name.encode() + b"\0"
    at = memory.find(sizes)
    while at >= 0:
        behind = memory[at + len(sizes) : at + len(sizes) + NAME_WITHIN + len(name)]
        if at >= HOST_BEFORE and name in behind:
            (addr,) = struct.unpack_from("<Q", memory, at - HOST_BEFORE)
            if _holds(mappings, addr, block):
                return int(addr)
        at = memory.find(sizes, at + 8)
    return 0


def _holds(mappings: list[Mapping], addr: int, block: RamBlock) -> bool:
    end = addr + -(-block.used // PAGE_BYTES) * PAGE_BYTES
    if addr % PAGE_BYTES or not addr:
        return False
    covered = covering(mappings, addr, end)
    return bool(covered) and all(mapping.perms.startswith("rw") for mapping in covered)

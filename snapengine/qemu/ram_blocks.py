"""The RAM blocks of a QEMU process: their names, sizes and addresses.

Source: the command `x-query-ramblock` (since QEMU 6.2). Its table has host addresses since QEMU 8.0. For
older versions the heap of the process is searched for QEMU's RAMBlock structures.
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
HEAP_BYTES = 1 << 30  # a larger heap is not searched
ADDR_BEFORE = 16  # bytes from the host address to the offset in a RAMBlock (QEMU 6.2 to 7.2)
NAME_WITHIN = 128  # largest distance in bytes from the sizes to the name


@dataclass(frozen=True, slots=True)
class RamBlock:
    """One RAM block.

    ``used`` and ``total`` are sizes in bytes; the block may grow to ``total``. ``page_size`` is that of the
    host memory. ``offset`` is QEMU's ram_addr_t of the first byte, which is not a guest address. ``addr`` is
    the address in the QEMU process; 0: unknown.
    """

    name: str
    page_size: int
    offset: int
    used: int
    total: int
    addr: int = 0


def parse_table(text: str) -> list[RamBlock]:
    """Return the blocks in the table that `x-query-ramblock` prints. Raises MachineError.

    Blocks without a name are omitted: they map device memory, and QEMU does not migrate them.
    """
    blocks = []
    for line in text.splitlines()[1:]:
        if not line.strip():
            continue
        match = LINE.match(line)
        if match is None:
            raise MachineError(f"QEMU's table of RAM blocks has a line of unknown format: {line.strip()!r}")
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
        raise MachineError("QEMU's table of RAM blocks is empty or contains a name twice")
    return blocks


def ram_blocks(monitor: Monitor) -> list[RamBlock]:
    """Return the machine's blocks; ``addr`` may be unknown (see `locate`). Raises MachineError."""
    return parse_table(ask(monitor, "x-query-ramblock").string("human-readable-text"))


def locate(blocks: Iterable[RamBlock], pid: int) -> list[RamBlock]:
    """Return the blocks with their addresses in process `pid`. Raises MachineError, OSError.

    A RAMBlock in QEMU's heap contains the offset, the used and the total length as three consecutive 64-bit
    words, the host address shortly before them, and the name after them. All five must match, and the block
    must be mapped writable; this excludes false matches.
    """
    mappings = read_maps(pid)
    wanted = list(blocks)
    found = {block.name: block.addr for block in wanted if block.addr}
    if len(found) < len(wanted):
        for memory in _heap(pid, mappings):
            for block in wanted:
                if block.name not in found and (addr := _search(memory, block, mappings)):
                    found[block.name] = addr
    missing = [block.name for block in wanted if block.name not in found]
    if missing:
        raise MachineError(
            f"process {pid}: the address of RAM block {missing[0]!r} is not found: use QEMU 8.0, which "
            "reports it, or --via-migration"
        )
    return [replace(block, addr=found[block.name]) for block in wanted]


def _heap(pid: int, mappings: list[Mapping]) -> Iterable[bytes]:
    """Yield the brk heap of the process, from which its main thread allocates."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for mapping in mappings:
            if mapping.path == "[heap]" and mapping.end - mapping.start <= HEAP_BYTES:
                yield os.pread(memory.fileno(), mapping.end - mapping.start, mapping.start)


def _search(memory: bytes, block: RamBlock, mappings: list[Mapping]) -> int:
    sizes = struct.pack("<3Q", block.offset, block.used, block.total)
    name = block.name.encode() + b"\0"
    at = memory.find(sizes)
    while at >= 0:
        following = memory[at + len(sizes) : at + len(sizes) + NAME_WITHIN + len(name)]
        if at >= ADDR_BEFORE and name in following:
            (addr,) = struct.unpack_from("<Q", memory, at - ADDR_BEFORE)
            if _is_mapped(mappings, addr, block):
                return int(addr)
        at = memory.find(sizes, at + 8)
    return 0


def _is_mapped(mappings: list[Mapping], addr: int, block: RamBlock) -> bool:
    end = addr + -(-block.used // PAGE_BYTES) * PAGE_BYTES
    if addr % PAGE_BYTES or not addr:
        return False
    covered = covering(mappings, addr, end)
    return bool(covered) and all(mapping.perms.startswith("rw") for mapping in covered)

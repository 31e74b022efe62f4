"""Hand-made migration streams, and the content of their pages."""

import struct

MACHINE = "pc-i440fx-7.2"
BLOCKS = [("pc.ram", 64 * 4096), ("/rom@etc/acpi/rsdp", 4096), ("pc.bios", 3 * 4096)]
RAM_ID = 2
ZERO, PAGE, EOS, CONTINUE = 0x02, 0x08, 0x10, 0x20
ZEROS = bytes(4096)


def u32(value):
    return struct.pack(">I", value)


def u64(value):
    return struct.pack(">Q", value)


def text(name):
    return bytes([len(name.encode())]) + name.encode()


def footer(section_id=RAM_ID):
    return b"\x7e" + u32(section_id)


def subsection(name, body, version=1):
    return b"\x05" + text(name) + u32(version) + body


def configuration(*subsections, machine=MACHINE):
    return b"\x07" + u32(len(machine)) + machine.encode() + b"".join(subsections)


def capabilities(*names):
    return subsection("configuration/capabilities", u32(len(names)) + b"".join(map(text, names)))


def ram_start(blocks=BLOCKS, *, total=None, version=4, name="ram", end=None):
    total = sum(used for _, used in blocks) if total is None else total
    listed = b"".join(text(block) + u64(used) for block, used in blocks)
    head = b"\x01" + u32(RAM_ID) + text(name) + u32(0) + u32(version)
    return head + u64(total | 4) + listed + u64(EOS if end is None else end) + footer()


def head(blocks=BLOCKS, config=None):
    return b"QEVM" + u32(3) + (configuration() if config is None else config) + ram_start(blocks)


def record(offset, data, block=None):
    """One page. `block` None: the block of the record before. Content None: a zero page."""
    flags = (ZERO if data is None else PAGE) | (CONTINUE if block is None else 0)
    return u64(offset | flags) + (b"" if block is None else text(block)) + (b"\0" if data is None else data)


def section(*records, kind=2, section_id=RAM_ID):
    return bytes([kind]) + u32(section_id) + b"".join(records) + u64(EOS) + footer(section_id)


def device(name, body, section_id, instance=0):
    begin = b"\x04" + u32(section_id) + text(name) + u32(instance) + u32(1)
    return begin + body + footer(section_id)


def tail(description=b'{"devices": []}'):
    # A device's data may look like its own footer, or like the mark of the description.
    devices = device("timer", bytes(24), 0) + device("cpu", b"\x7e" + u32(4) + b"\5\0\x06 state", 4)
    end = b"\0" if description is None else b"\0\x06" + u32(len(description)) + description
    return devices + end


def filled(number):
    """A page that is filled with its number."""
    return struct.pack("<I", number + 1) * 1024


def records_of(pages):
    """Records for a list of (block, page number, bytes or None), with CONTINUE where possible."""
    before = None
    for block, number, data in pages:
        yield record(number * 4096, data, None if block == before else block)
        before = block


def stream(pages, *, blocks=BLOCKS, end=True, description=b'{"devices": []}'):
    """A complete stream with these pages, in one PART section."""
    closing = section(kind=3) if end else b""
    return head(blocks) + section(*records_of(pages)) + closing + tail(description)


XML = b"<domain type='kvm'><name>vm</name></domain>"


def libvirt_save(data, magic=b"LibvirtQemudSave", *, version=2, form=0, data_bytes=64, cookie=0, order="<"):
    """The stream `data` in a save file of libvirt: header, XML and padding of 64 bytes."""
    header = struct.pack(f"{order}16s5I56x", magic, version, data_bytes, 1, form, cookie)
    return header + XML.ljust(64, b"\0") + data


def memory_of(pages, blocks=BLOCKS):
    """The RAM of a machine after it has loaded such a stream: block -> bytes."""
    memory = {name: bytearray(used) for name, used in blocks}
    for block, number, data in pages:
        memory[block][number * 4096 : number * 4096 + 4096] = ZEROS if data is None else data
    return {name: bytes(data) for name, data in memory.items()}


SOME_PAGES = [
    ("pc.ram", 0, filled(0)), ("pc.ram", 1, None), ("pc.ram", 2, filled(2)), ("pc.bios", 2, filled(3)),
    ("pc.ram", 2, filled(4)), ("pc.ram", 0, None), ("pc.ram", 63, ZEROS), ("pc.bios", 0, filled(5)),
    ("pc.bios", 0, filled(6)), ("pc.ram", 1, filled(7)),
]  # fmt: skip

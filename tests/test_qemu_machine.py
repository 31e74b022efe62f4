"""Parsing QEMU's replies about a machine: RAM block table, description, differences, monitor addresses."""

import io
import json
import socket
import threading

import pytest
from waitkit import PATIENCE_S

from snapengine.errors import MachineError
from snapengine.image import open_image
from snapengine.image.writer import Writer
from snapengine.qemu.command import command_of
from snapengine.qemu.machine import differences, version_warnings
from snapengine.qemu.monitor import Monitor, parse_address
from snapengine.qemu.ram_blocks import RamBlock, parse_table
from snapengine.storage.sinks import MemorySink

OLD = """\
              Block Name    PSize              Offset               Used              Total
                  pc.ram    4 KiB  0x0000000000000000 0x0000000010000000 0x0000000010000000
    /rom@etc/acpi/tables    4 KiB  0x0000000011100000 0x0000000000020000 0x0000000000200000
"""
NEW = """\
 Block Name    PSize              Offset               Used              Total                HVA  RO
     a name    2 MiB  0x0000000000000000 0x0000000010000000 0x0000000010000000 0x00007f12ebe00000  rw
               4 KiB  0x0000000020000000 0x0000000010000000 0x0000000010000000 0x00007f12ebe00000  rw
    pc.bios    4 KiB  0x0000000010000000 0x0000000000040000 0x0000000000040000 0x00007f1300000000  ro
"""
MACHINE = {
    "version": 1, "via": "device-state", "qemu": "7.2.0", "machine_type": "pc-i440fx-7.2",
    "accelerator": "kvm", "cpus": ["qemu64-x86_64-cpu"] * 2,
    "ram_blocks": [
        {"name": "pc.ram", "used": 1 << 28, "total": 1 << 28, "page_size": 4096},
        {"name": "/rom@etc/acpi/tables", "used": 1 << 17, "total": 1 << 21, "page_size": 4096},
    ],
    "devices": [{"path": "/machine/peripheral/net0", "type": "e1000"}],
}  # fmt: skip


# RAM blocks


def test_table_without_addresses():
    assert parse_table(OLD) == [
        RamBlock("pc.ram", 4096, 0, 1 << 28, 1 << 28),
        RamBlock("/rom@etc/acpi/tables", 4096, 0x11100000, 0x20000, 0x200000),
    ]


def test_table_with_addresses_leaves_out_blocks_without_a_name():
    assert parse_table(NEW) == [
        RamBlock("a name", 2 << 20, 0, 1 << 28, 1 << 28, 0x7F12EBE00000),
        RamBlock("pc.bios", 4096, 0x10000000, 0x40000, 0x40000, 0x7F1300000000),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        (OLD + OLD.splitlines()[1] + "\n", "twice"),
        (OLD + " pc.rom 4 KiB what is this\n", "unknown format: 'pc.rom 4 KiB what is this'"),
    ],
)
def test_tables_that_are_refused(text, words):
    with pytest.raises(MachineError, match=words):
        parse_table(text)


# the description


def changed(**members):
    return json.loads(json.dumps(MACHINE)) | members


def test_the_same_machine_does_not_differ():
    assert differences(MACHINE, changed()) == []


def test_a_block_that_qemu_resizes_may_differ_in_size():
    blocks = changed()["ram_blocks"]
    blocks[1]["used"] = 1 << 16
    assert differences(MACHINE, changed(ram_blocks=blocks)) == []


@pytest.mark.parametrize("known", [True, False])
def test_another_size_of_ram(known):
    saved = changed()
    if not known:  # an image of a stream has no maximum sizes of blocks
        for block in saved["ram_blocks"]:
            del block["total"]
    found = changed()
    found["ram_blocks"][0] |= {"used": 1 << 29, "total": 1 << 29}
    assert differences(saved, found) == [
        "RAM block pc.ram: 268435456 bytes were saved, this has 536870912",
    ]


def test_everything_that_differs_is_said():
    found = changed(qemu="10.0.2", machine_type="pc-q35-7.2", accelerator="other", cpus=["max-x86_64-cpu"])
    found["ram_blocks"][0]["name"] = "ram0"
    found["devices"] = []
    text = "\n".join(differences(MACHINE, found))
    for part in (
        "QEMU version: 7.2.0 was saved, this is 10.0.2",  # with another type it counts
        "machine type: pc-i440fx-7.2 was saved, this is pc-q35-7.2",
        "accelerator: kvm", "CPUs: 2 x qemu64-x86_64-cpu were saved, these are 1 x max-x86_64-cpu",
        "RAM block pc.ram (268435456 bytes) is missing", "RAM block ram0 (268435456 bytes) was not there",
        "device /machine/peripheral/net0 (e1000) is missing",
    ):  # fmt: skip
        assert part in text


INTERNAL = [
    {"path": f"/machine/unattached/device[{n}]", "type": kind}
    for n, kind in enumerate(["qemu64-x86_64-cpu", "isa-pit", "i8042", "i8042"])
]


def test_devices_of_qemu_itself_may_have_other_numbers():
    renumbered = [item | {"path": f"/machine/unattached/device[{9 - n}]"} for n, item in enumerate(INTERNAL)]
    assert differences(changed(devices=INTERNAL), changed(devices=renumbered)) == []
    one_less = differences(changed(devices=INTERNAL), changed(devices=INTERNAL[:-1]))
    assert one_less == ["device /machine/unattached/device (i8042) is missing"]


def test_another_version_of_qemu_with_the_same_versioned_type_is_a_warning():
    more = [*INTERNAL, {"path": "/machine/unattached/device[4]", "type": "acpi-erst"}]
    saved, found = changed(devices=INTERNAL), changed(devices=more, qemu="10.0.2")
    assert differences(saved, found) == []
    assert version_warnings(saved, found) == [
        "QEMU version: 7.2.0 was saved, this is 10.0.2",
        "device /machine/unattached/device (acpi-erst) was not there",
    ]
    found["devices"].append({"path": "/machine/peripheral/net0", "type": "e1000"})
    assert differences(saved, found) == ["device /machine/peripheral/net0 (e1000) was not there"]
    assert version_warnings(saved, changed(devices=INTERNAL)) == []


@pytest.mark.parametrize("kind", ["microvm", "none", "pc"])
def test_another_version_of_qemu_with_a_type_without_version_is_another_machine(kind):
    saved, found = changed(machine_type=kind), changed(machine_type=kind, qemu="7.2.1")
    assert differences(saved, found) == ["QEMU version: 7.2.0 was saved, this is 7.2.1"]
    assert version_warnings(saved, found) == []


# the command line

LIBVIRTS = '{"qom-type":"secret","id":"masterKey0","file":"/var/lib/libvirt/qemu/vm/master-key.aes"}'


def described(command_line):
    """An image of such a machine, without its memory."""
    sink = MemorySink()
    writer = Writer(sink)
    writer.begin([])
    writer.vmstate("qemu.machine", json.dumps(changed(command_line=command_line)).encode())
    writer.finish({})
    return open_image(io.BytesIO(sink.getvalue()))


def test_the_command_line_of_the_image():
    line = ["qemu", "-S", "-m", "1G", "-incoming", "tcp::1", "--daemonize", "-name", "-S-", "-loadvm", "x"]
    assert command_of(described(line)) == ["qemu", "-m", "1G", "-name", "-S-"]


@pytest.mark.parametrize("argument", [
    "socket,id=charmonitor,fd=22,server=on,wait=off", "tap,fds=21:22,id=net0", "tap,fd=3,vhost=on,vhostfd=4",
    "file=/dev/fdset/2,format=raw", "fd:7", '{"driver":"file","filename":"/dev/fdset/0"}', LIBVIRTS,
])  # fmt: skip
def test_a_command_line_that_needs_open_files(argument):
    with pytest.raises(MachineError, match=r"open in the process that started QEMU .*, as with libvirt"):
        command_of(described(["qemu", "-x", argument]))


def test_no_command_line():
    with pytest.raises(MachineError, match="has no command line of QEMU: give one behind --"):
        command_of(described([]))


# the monitor


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("/run/vm.qmp", "/run/vm.qmp"),
        ("unix:/run/vm.qmp,server=on", "/run/vm.qmp"),
        ("localhost:4444", ("localhost", 4444)),
        ("tcp::4444", ("localhost", 4444)),
        ("./a:1", "./a:1"),
    ],
)
def test_addresses(text, address):
    assert parse_address(text) == address


def test_an_address_without_port():
    with pytest.raises(ValueError, match="not tcp:HOST:PORT"):
        parse_address("tcp:host")


def test_nobody_listens(tmp_path):
    with pytest.raises(MachineError, match="no QEMU listens there"):
        Monitor(str(tmp_path / "none.sock"))


@pytest.mark.parametrize(
    ("greeting", "words", "seconds"),
    [(b"", "no greeting", 0.5), (b"HELO there\r\n", "not QMP", PATIENCE_S)],
)
def test_what_is_not_a_monitor(tmp_path, greeting, words, seconds):
    path = str(tmp_path / "other.sock")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        done = threading.Event()

        def serve():
            peer, _ = server.accept()
            with peer:
                peer.sendall(greeting)
                done.wait(PATIENCE_S)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with pytest.raises(MachineError, match=words):
                Monitor(path, seconds=seconds)
        finally:
            done.set()
            thread.join()

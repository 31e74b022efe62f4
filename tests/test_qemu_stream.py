"""With a real QEMU: what it sends becomes an image, and what is made of the image a machine goes on from."""

import contextlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import streamkit

import snapengine
from snapengine.qemu.regenerate import stream_blobs, write_stream

MIB = streamkit.MIB
EMULATORS = streamkit.emulators() or [None]


@pytest.fixture(params=EMULATORS, ids=lambda path: Path(path).name if path else "none")
def emulator(request):
    if request.param is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    print("QEMU", *streamkit.version(request.param))
    return request.param


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    return streamkit.build_guest(tmp_path_factory.mktemp("guest"))


@pytest.fixture
def started(emulator, disk, tmp_path):
    """``started(*arguments)``: a machine, ended with the test."""
    with contextlib.ExitStack() as stack:

        def start(*arguments, env=None):
            machine = streamkit.Machine(emulator, tmp_path, disk, *arguments, env=env)
            stack.callback(machine.close)
            return machine

        yield start


@pytest.fixture
def environment(tmp_path):
    """Where `snapengine` is a command, which is this package."""
    script = tmp_path / "bin" / "snapengine"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m snapengine.cli "$@"\n')
    script.chmod(0o755)
    root = str(Path(snapengine.__file__).parent.parent)
    return os.environ | {"PATH": f"{script.parent}:{os.environ['PATH']}", "PYTHONPATH": root}


def ready(machine):
    streamkit.wait_for(lambda: machine.serial.exists() and b"R" in machine.serial.read_bytes())


def rounds(machine, room):
    return int.from_bytes(machine.read(0x8000, 4, room), "little")


def goes_on(machine, room):
    """The guest makes rounds, and has left nothing out."""
    before = rounds(machine, room)
    streamkit.wait_for(lambda: rounds(machine, room) != before)
    machine.qmp("stop")
    assert streamkit.steps(machine.read(MIB, streamkit.HOT - MIB, room)) in ([], [1])
    machine.qmp("cont")


@pytest.mark.parametrize("way", ["background", "background, direct", "plain", "plain, zstd"])
def test_into_an_image_and_on_in_a_new_machine(started, environment, tmp_path, way):
    machine = started(env=environment)
    ready(machine)
    options = "--direct " if "direct" in way else "--compress zstd " if "zstd" in way else ""
    if "background" in way:
        machine.monitor("migrate_set_capability background-snapshot on")
    answer = machine.monitor(f'migrate "exec:snapengine ingest {options}- ./vm_state"')
    assert "continuing detached" in answer  # only a terminal can wait
    assert machine.wait_migration() == "completed"
    assert "completed" in machine.monitor("info migrate")
    streamkit.wait_for((tmp_path / "vm_state").exists)
    if "background" in way:
        goes_on(machine, tmp_path)
    machine.close()

    with snapengine.open_image(tmp_path / "vm_state") as image:
        image.verify()
        ram = image.read("pc.ram", 0, streamkit.MEMORY)
        blobs = stream_blobs(image)
        assert image.stats["duplicate_pages"] == 0 or way == "plain"
        with (tmp_path / "again").open("wb") as file:
            write_stream(image, file.fileno())
    assert streamkit.steps(ram[MIB : streamkit.HOT]) in ([], [1])
    data = (tmp_path / "again").read_bytes()
    assert data.startswith(blobs[0])
    assert data.endswith(blobs[1])

    resumed = started("-S", "-incoming", f"exec:cat {tmp_path / 'again'}")
    assert resumed.wait_migration() == "completed"
    assert resumed.read(MIB, streamkit.MEMORY - MIB, tmp_path) == ram[MIB:]
    resumed.qmp("cont")
    goes_on(resumed, tmp_path)


def test_a_head_from_scratch_and_a_stream_without_an_end(started, tmp_path):
    """What QEMU asks of a head and of the RAM's sections is no more than what is made."""
    from snapengine.qemu.ingest import ingest
    from snapengine.qemu.regenerate import make_head

    machine = started()
    ready(machine)
    machine.qmp("migrate", uri=f"exec:cat > {tmp_path / 'stream'}")
    assert machine.wait_migration() == "completed"
    machine.close()
    with (tmp_path / "stream").open("rb") as file:
        ingest(file.fileno(), tmp_path / "vm")
    with snapengine.open_image(tmp_path / "vm") as image, (tmp_path / "again").open("wb") as file:
        parser_head, tail = stream_blobs(image)
        blocks = [(region.name, region.length) for region in image.regions]
        machine_type = parser_head[13 : 13 + parser_head[12]].decode()
        write_stream(image, file.fileno(), make_head(machine_type, blocks), tail, holes="send")
        ram = image.read("pc.ram", 0, streamkit.MEMORY)
    resumed = started("-S", "-incoming", f"exec:cat {tmp_path / 'again'}")
    assert resumed.wait_migration() == "completed"
    assert resumed.read(MIB, streamkit.MEMORY - MIB, tmp_path) == ram[MIB:]


def test_a_capability_that_is_not_known(started, tmp_path):
    machine = started()
    machine.qmp("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])
    line = [sys.executable, "-m", "snapengine.cli", "ingest", "-", str(tmp_path / "vm")]
    environment = f"PYTHONPATH={shlex.quote(str(Path(snapengine.__file__).parent.parent))}"
    words = f"{environment} {shlex.join(line)} 2> {tmp_path / 'words'}"
    machine.qmp("migrate", uri=f"exec:{words}")
    streamkit.wait_for(lambda: (tmp_path / "words").exists() and (tmp_path / "words").read_text())
    assert "x-ignore-shared" in (tmp_path / "words").read_text()
    assert not (tmp_path / "vm").exists()


def test_a_migration_that_is_cancelled_leaves_nothing(started, environment, tmp_path):
    machine = started(env=environment)
    ready(machine)
    machine.qmp("migrate-set-parameters", **{"max-bandwidth": 1 << 20})
    machine.monitor('migrate -d "exec:snapengine ingest - ./vm_state"')
    streamkit.wait_for(lambda: machine.qmp("query-migrate").get("ram", {}).get("transferred", 0) > 100_000)
    machine.monitor("migrate_cancel")
    assert machine.wait_migration() == "cancelled"
    streamkit.wait_for(lambda: not [name for name in os.listdir(tmp_path) if "vm_state" in name])
    goes_on(machine, tmp_path)


def test_analyze(started, tmp_path):
    machine = started()
    ready(machine)
    machine.qmp("migrate", uri=f"exec:cat > {tmp_path / 'stream'}")
    assert machine.wait_migration() == "completed"
    line = [sys.executable, "-m", "snapengine.cli", "qemu", "analyze", str(tmp_path / "stream")]
    done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=60)
    assert "written by  " in done.stdout
    assert "i8254" in done.stdout
    assert "superseded" in done.stdout

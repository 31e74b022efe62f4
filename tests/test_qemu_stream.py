"""With a real QEMU: its migration stream becomes an image, and a machine loads the stream made from that."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from machinekit import MIB, until
from sweepkit import Sweep
from waitkit import PATIENCE_S

import snapengine
from snapengine.qemu.blobs import machine_of
from snapengine.qemu.from_stream import ingest
from snapengine.qemu.to_stream import make_head, stream_blobs, write_stream

GUEST = Sweep(memory=32 * MIB, hot=12 * MIB)


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """Put a `snapengine` command of this package on PATH, and change to an empty directory."""
    script = tmp_path / "bin" / "snapengine"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m snapengine.cli "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(snapengine.__file__).parent.parent))
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def ended(machine):
    """Wait for the end of QEMU's migration; return its status."""

    def look():
        status = machine.qmp("query-migrate").get("status")
        return status if status in ("completed", "failed", "cancelled") else None

    return until(look, "the migration does not end")


def goes_on(machine):
    """Check that the guest makes progress and that its memory is consistent."""
    machine.wait_progress()
    machine.qmp("stop")
    assert GUEST.faults(machine.read_ram()) == []
    machine.qmp("cont")


@pytest.mark.parametrize(
    "way",
    [
        "background",
        "background, direct",
        pytest.param("plain", marks=pytest.mark.host_optional),
        pytest.param("plain, zstd", marks=pytest.mark.host_optional),
    ],
)
def test_into_an_image_and_on_in_a_new_machine(machines, environment, way, request):
    accel = "tcg" if "background" in way else request.getfixturevalue("kvm")
    machine = machines(GUEST, accel=accel).ready()
    options = "--direct " if "direct" in way else "--compress zstd " if "zstd" in way else ""
    if "background" in way:
        machine.qmp.hmp("migrate_set_capability background-snapshot on")
    answer = machine.qmp.hmp(f'migrate "exec:snapengine ingest {options}- ./vm_state"')
    assert "continuing detached" in answer  # only a terminal can wait
    assert ended(machine) == "completed"
    assert "completed" in machine.qmp.hmp("info migrate")
    until((environment / "vm_state").exists, "no image")
    if "background" in way:
        goes_on(machine)
    machine.kill()

    with snapengine.open_image(environment / "vm_state") as image:
        image.verify()
        ram = image.read("pc.ram", 0, GUEST.memory)
        blobs = stream_blobs(image)
        assert image.stats["duplicate_pages"] == 0 or way == "plain"
        with (environment / "again").open("wb") as file:
            write_stream(image, file.fileno())
    assert GUEST.faults(ram) == []
    data = (environment / "again").read_bytes()
    assert data.startswith(blobs[0])
    assert data.endswith(blobs[1])

    resumed = machines.successor(machine)
    resumed.load(f"exec:cat {environment / 'again'}")
    assert resumed.read_ram(MIB) == ram[MIB:]
    resumed.qmp("cont")
    goes_on(resumed)


@pytest.mark.parametrize("send_configuration", [True, False])
def test_a_head_from_scratch_and_devices_from_elsewhere(machines, tmp_path, send_configuration):
    """A generated head and device state saved through QMP (without RAM) also make a valid stream."""
    machine = machines(GUEST).ready()
    machine.qmp("stop")
    machine.qmp("xen-save-devices-state", filename=str(tmp_path / "devices"), live=False)
    machine.migrate(f"exec:cat > {tmp_path / 'stream'}")
    machine.kill()
    with (tmp_path / "stream").open("rb") as file:
        ingest(file.fileno(), tmp_path / "vm")
    with snapengine.open_image(tmp_path / "vm") as image, (tmp_path / "again").open("wb") as file:
        machine_type = machine_of(image)["machine_type"] if send_configuration else None
        head = make_head(machine_type, [(region.name, region.length) for region in image.regions])
        write_stream(image, file.fileno(), head, (tmp_path / "devices").read_bytes()[8:], holes="send")
        ram = image.read("pc.ram", 0, GUEST.memory)
    off = [] if send_configuration else ["-global", "migration.send-configuration=off"]
    resumed = machines.successor(machine, *off)
    resumed.load(f"exec:cat {tmp_path / 'again'}")
    assert resumed.read_ram(MIB) == ram[MIB:]
    resumed.qmp("cont")
    goes_on(resumed)


def test_a_capability_that_is_not_known(machines, environment):
    machine = machines(GUEST)
    state = [{"capability": "x-ignore-shared", "state": True}]
    machine.qmp("migrate-set-capabilities", capabilities=state)
    words = environment / "words"
    machine.qmp("migrate", uri="exec:snapengine ingest - ./vm 2> words")
    until(lambda: words.exists() and words.read_text(), "no error message")
    assert "x-ignore-shared" in words.read_text()
    assert not (environment / "vm").exists()


def test_a_migration_that_is_cancelled_leaves_nothing(machines, environment):
    machine = machines(GUEST).ready()
    machine.qmp("migrate-set-parameters", max_bandwidth=MIB)
    machine.qmp.hmp('migrate -d "exec:snapengine ingest - ./vm_state"')

    def sent():
        return machine.qmp("query-migrate").get("ram", {}).get("transferred", 0)

    until(lambda: sent() > 100_000, "no migration")
    machine.qmp.hmp("migrate_cancel")
    assert ended(machine) == "cancelled"
    until(lambda: os.listdir(environment) == [], "a part of the image stays")
    goes_on(machine)


def test_analyze(machines, tmp_path):
    machine = machines(GUEST).ready()
    machine.migrate(f"exec:cat > {tmp_path / 'stream'}")
    line = [sys.executable, "-m", "snapengine.cli", "qemu", "analyze", str(tmp_path / "stream")]
    done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    assert "written by  " in done.stdout
    assert "i8254" in done.stdout
    assert "superseded" in done.stdout

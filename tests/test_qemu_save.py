"""Machines of an unmodified QEMU: save them while they run, kill them, restore them, check the guest."""

import os
import time

import pytest
from gatekit import GatedFile
from linuxkit import make_disk
from machinekit import MIB, until
from restorekit import restoring, saved_ram
from sweepkit import Sweep
from waitkit import PATIENCE_S

import snapengine
from snapengine.errors import MachineError
from snapengine.options import Options
from snapengine.qemu.monitor import Monitor
from snapengine.qemu.target import QemuTarget
from snapengine.qemu.via_migration import save_by_migration

ROUNDS = int(os.environ.get("QEMU_ROUNDS", "1"))
WAYS = ("attached", "attached-rounds", "migration", "migration-rounds")
EVERY_WAY = [
    pytest.param(way, accel, marks=[pytest.mark.host_optional] if accel == "kvm" else [])
    for way in WAYS
    for accel in ("tcg", "kvm")
    if (way, accel) != ("migration-rounds", "tcg")  # rejected: see test_qemu_refused
]
PARTS = {"stop", "device_state", "arm", "cont", "guest"}


def save(machine, path, way="attached", **fields):
    """Save a running machine; return the result."""
    method = "dirty-logging" if way.endswith("-rounds") else "write-tracking"
    if way.endswith("-rounds"):
        fields = {"downtime_limit": PATIENCE_S} | fields
    options = Options(method=method, **fields)
    with Monitor(str(machine.socket)) as monitor:
        if way.startswith("migration"):
            return save_by_migration(monitor, path, options)
        with snapengine.snapshot(QemuTarget(monitor), path, options) as capture:
            pass
        return capture.result


def save_with_faults(machine, path, **fields):
    """Save a machine while the sink is blocked until the guest has faulted on an unsaved page."""
    sink = GatedFile(path)
    with Monitor(str(machine.socket)) as monitor:
        options = Options(memory_limit=16 * MIB, **fields)
        with snapengine.snapshot(QemuTarget(monitor), sink, options) as capture:
            try:
                until(lambda: capture.progress().faults > 0, "no fault")
            finally:
                sink.gate.set()


def slow_sweep(accel):
    """Return a guest that writes little: dirty logging of a fast sweep would not converge."""
    return Sweep(hot=8 * MIB, noise=0.5, delay=2000 if accel == "tcg" else 0)


@pytest.mark.parametrize(("way", "accel"), EVERY_WAY, indirect=["accel"])
@pytest.mark.parametrize("turn", range(ROUNDS))
def test_a_sweep_is_one_state_and_goes_on(machines, accel, way, turn, tmp_path):
    guest = slow_sweep(accel) if way.endswith("-rounds") else Sweep(noise=0.5)
    machine = machines(guest, accel=accel).ready()
    before = machine.counter()
    result = save(machine, tmp_path / "vm.img", way)
    machine.wait_progress(1000)  # the source keeps running
    machine.qmp("stop")
    assert guest.faults(machine.read_ram()) == []
    machine.kill()
    assert result.status == "completed"
    assert result.lost_pages == 0
    assert result.image_bytes <= 1.005 * result.nonzero_bytes + MIB or way == "attached-rounds"
    with snapengine.open_image(tmp_path / "vm.img") as image:
        assert image.verify()
        assert guest.faults(saved_ram(image, machine)) == []
        with restoring(machines, image, machine, run=False) as new:
            assert guest.faults(new.read_ram()) == []
            assert 0 <= new.counter() - before < 1 << 31
            new.qmp("cont")
            new.wait_progress(10_000)
            new.qmp("stop")
            assert guest.faults(new.read_ram()) == []


@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", ["attached", "migration"])
@pytest.mark.parametrize("turn", range(ROUNDS))
def test_linux_goes_on_from_its_counter(machines, linux_guest, way, turn, tmp_path):
    disk = make_disk(tmp_path / "disk")
    machine = machines(linux_guest(disk=disk, rate=4000, batch=500, check="atleast")).ready()
    if way == "attached":
        save_with_faults(machine, tmp_path / "vm.img", compress="zstd:1")
    else:
        save(machine, tmp_path / "vm.img", way, compress="zstd:1")
    machine.guest.wait_round(machine, 2, start=len(machine.serial()))  # the source passes its self-check
    rounds = machine.guest.wait_round(machine)[0]
    machine.kill()
    with snapengine.open_image(tmp_path / "vm.img") as image, restoring(machines, image, machine) as new:
        assert new.guest.wait_round(new, 3)[0] > rounds


@pytest.mark.timeout(900)
def test_ram_and_disk_of_one_instant(machines, linux_guest, tmp_path):
    """The guest's check is exact: it fails if the disk is older or newer than the memory."""
    disk = make_disk(tmp_path / "disk")
    guest = linux_guest(disk=disk, rate=4000, batch=500, check="exact")
    machine = machines(guest).ready()
    with Monitor(str(machine.socket)) as monitor:
        target = QemuTarget(monitor, block_snapshots={"disk0": str(tmp_path / "after.qcow2")})
        with snapengine.snapshot(target, tmp_path / "vm.img") as capture:
            pass
    assert "block_snapshot" in capture.result.stop_parts_ns
    assert any("disk0 now uses" in warning for warning in capture.result.warnings)
    content = disk.read_bytes()
    machine.guest.wait_round(machine, 3, start=len(machine.serial()))  # it uses the new file
    assert disk.read_bytes() == content
    machine.kill()
    with snapengine.open_image(tmp_path / "vm.img") as image, restoring(machines, image, machine) as new:
        new.guest.wait_round(new, 3)


@pytest.mark.parametrize("ram", ["memfd", "file", pytest.param("hugetlb", marks=pytest.mark.host_optional)])
def test_every_kind_of_ram(machines, ram, request, tmp_path):
    if ram == "hugetlb":
        request.getfixturevalue("hugetlb")(80)
    machine = machines(Sweep(noise=0.5), ram=ram).ready()
    save(machine, tmp_path / "vm.img")
    machine.kill()
    with snapengine.open_image(tmp_path / "vm.img") as image:
        assert machine.guest.faults(saved_ram(image, machine)) == []
        with restoring(machines, image, machine) as new:
            new.wait_progress(10_000)
            new.qmp("stop")
            assert new.guest.faults(new.read_ram()) == []


@pytest.mark.parametrize("method", ["write-tracking", "dirty-logging"])
@pytest.mark.parametrize("ram", ["private", "memfd", "file"])
def test_zero_pages_that_a_guest_left_are_not_lost(machines, ram, method, tmp_path):
    """Part of the memory is cleared, another part is written continuously, and the sink is blocked."""
    machine = machines(Sweep(hot=8 * MIB, noise=0.5, delay=2000), ram=ram).ready()
    machine.write_ram(32 * MIB, bytes(24 * MIB))
    sink = GatedFile(tmp_path / "vm.img")
    options = Options(method=method, memory_limit=16 * MIB, downtime_limit=PATIENCE_S)
    with (
        Monitor(str(machine.socket)) as monitor,
        snapengine.snapshot(QemuTarget(monitor), sink, options) as capture,
    ):
        try:
            machine.wait_progress(1000)
        finally:
            sink.gate.set()
    assert capture.result.lost_pages == 0
    assert not any("punched" in warning for warning in capture.result.warnings)
    machine.kill()
    with snapengine.open_image(tmp_path / "vm.img") as image:
        content = saved_ram(image, machine)
    assert machine.guest.faults(content) == []
    assert not any(content[32 * MIB : 56 * MIB])


def test_what_the_stop_was_spent_on(machines, tmp_path):
    machine = machines(Sweep()).ready()
    result = save(machine, tmp_path / "vm.img")
    assert result.stop_parts_ns.keys() == PARTS
    parts = dict(result.stop_parts_ns)
    assert 0 < sum(parts.values()) - parts["guest"] <= parts["guest"]
    assert all(value >= 0 for value in parts.values())
    assert result.stop_ns == result.stop_parts_ns["guest"]
    assert result.injection_ns > 0
    with snapengine.open_image(tmp_path / "vm.img") as image:
        assert image.stats["stop_parts_ns"] == result.stop_parts_ns


def test_nothing_of_ours_stays_in_qemu(machines, tmp_path):
    machine = machines(Sweep()).ready()
    before = sorted(os.listdir(f"/proc/{machine.pid}/fd"))
    save(machine, tmp_path / "vm.img")
    assert machine.qmp("query-fdsets") == []
    until(lambda: sorted(os.listdir(f"/proc/{machine.pid}/fd")) == before, "a descriptor stays open in QEMU")


def test_a_paused_machine_stays_paused(machines, tmp_path):
    machine = machines(Sweep()).ready()
    machine.qmp("stop")
    for way in ("attached", "migration"):
        save(machine, tmp_path / "vm.img", way)
        assert not machine.qmp("query-status")["running"]
    ram = bytes(machine.read_ram())
    with snapengine.open_image(tmp_path / "vm.img") as image:
        assert saved_ram(image, machine) == ram
    with pytest.raises(MachineError, match=r"postmigrate.*\(cont\)"):
        save(machine, tmp_path / "again.img")
    machine.qmp("cont")
    save(machine, tmp_path / "again.img")


def test_migration_settings_are_as_before(machines, migration, tmp_path):
    method, accel = migration
    machine = machines(slow_sweep(accel), accel=accel).ready()
    machine.qmp("migrate-set-parameters", max_bandwidth=123 * MIB, downtime_limit=77)
    states = machine.qmp("query-migrate-capabilities")
    save(machine, tmp_path / "vm.img", "migration" if method == "write-tracking" else "migration-rounds")
    now = machine.qmp("query-migrate-parameters")
    assert (now["max-bandwidth"], now["downtime-limit"]) == (123 * MIB, 77)
    assert machine.qmp("query-migrate-capabilities") == states
    machine.wait_progress(100)


def test_snapshots_one_after_the_other(machines, tmp_path):
    machine = machines(Sweep()).ready()
    for number in range(4):
        save(machine, tmp_path / f"{number}.img", "migration" if number == 2 else "attached")
        with snapengine.open_image(tmp_path / f"{number}.img") as image:
            assert machine.guest.faults(saved_ram(image, machine)) == []
        machine.wait_progress(1000)


def test_rounds_that_never_end(machines, tmp_path):
    machine = machines(Sweep(noise=0.5)).ready()
    begin = time.monotonic()
    result = save(machine, tmp_path / "vm.img", "attached-rounds", max_seconds=1.0, rate_limit=MIB // 4)
    assert result.status == "not-converged"
    assert time.monotonic() - begin < PATIENCE_S, "what was queued went to the sink, though there is no image"
    assert os.listdir(tmp_path) == []
    machine.wait_progress(1000)

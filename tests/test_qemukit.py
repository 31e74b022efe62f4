"""Test of qemukit: both guests run and detect damage, and QEMU's own snapshots of them pass the checks."""

import os
import signal
import subprocess
import sys
import time

import pytest
from linuxkit import make_disk
from machinekit import MIB, until
from qemukit import Machine, Machines, Setup, find_qemu, qemu_version
from qmpkit import QmpError
from sweepkit import Sweep
from waitkit import attempts


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def restored(machines, machine, path):
    """Kill the machine; load the state in the file into a new QEMU, and return that."""
    machine.kill()
    new = machines.successor(machine)
    new.load(f"exec:cat {path}")
    return new


@pytest.mark.parametrize("noise", [None, 0.25])
def test_sweep_runs_and_a_stopped_one_is_one_state(machines, accel, noise):
    machine = machines(Sweep(noise=noise), accel=accel).ready()
    machine.wait_progress(100_000)
    for _ in range(5):
        machine.qmp("stop")
        assert machine.guest.faults(machine.read_ram()) == []
        machine.qmp("cont")
        machine.wait_progress()


def test_a_copy_of_a_running_sweep_fails_the_one_step_rule(machines, accel):
    machine = machines(Sweep(), accel=accel).ready()
    for _ in attempts("no copy without tracking is torn: the rule sees nothing"):
        if machine.guest.faults(machine.read_ram()):
            break


def test_one_stale_page_fails_the_one_step_rule(machines):
    machine = machines(Sweep()).ready()
    machine.wait_progress(100_000)
    machine.qmp("stop")
    ram = machine.read_ram()
    page = ram[30 * MIB : 30 * MIB + 4]
    ram[30 * MIB : 30 * MIB + 4] = (int.from_bytes(page, "little") - 1).to_bytes(4, "little")
    assert machine.guest.faults(ram)


@pytest.mark.parametrize("background", [False, True], ids=["migrate", "background-snapshot"])
def test_qemus_own_snapshot_of_the_sweep(machines, accel, background, tmp_path):
    # Dirty logging of a fast sweep would not converge: use a small hot set and a slow guest.
    guest = Sweep(hot=8 * MIB, noise=1.0, delay=2000 if accel == "tcg" else 0)
    machine = machines(guest, accel=accel).ready()
    before = machine.counter()
    if accel == "tcg" and not background:  # QEMU's dirty logging would miss writes
        machine.qmp("stop")
    machine.migrate(f"exec:cat > {tmp_path}/state", background_snapshot=background)
    if background:  # the source keeps running
        machine.wait_progress()
    new = restored(machines, machine, tmp_path / "state")
    assert new.guest.faults(new.read_ram()) == []
    assert 0 <= new.counter() - before < 1 << 31
    new.qmp("cont")
    new.wait_progress(10_000)
    new.qmp("stop")
    assert new.guest.faults(new.read_ram()) == [], "its processor and its memory were of different instants"


@pytest.mark.parametrize("background", [False, True], ids=["migrate", "background-snapshot"])
def test_qemus_own_snapshot_of_linux(machines, linux_guest, background, tmp_path):
    disk = make_disk(tmp_path / "disk")
    machine = machines(linux_guest(disk=disk, rate=2000, batch=500, check="atleast")).ready()
    if not background:  # QEMU's dirty logging would miss writes, as Linux runs with TCG
        machine.qmp("stop")
    machine.migrate(f"exec:cat > {tmp_path}/state", background_snapshot=background)
    if background:  # the source keeps running and writes to the disk
        machine.guest.wait_round(machine, 2, start=len(machine.serial()))
    rounds = machine.guest.wait_round(machine)[0]
    new = restored(machines, machine, tmp_path / "state")
    new.qmp("cont")
    assert new.guest.wait_round(new, 3)[0] > rounds


@pytest.mark.parametrize("snapshot", [True, False])
def test_a_disk_snapshot_of_the_same_stop_agrees_to_the_record(machines, linux_guest, snapshot, tmp_path):
    """Without a disk snapshot the guest finds that the disk is newer than its memory."""
    disk = make_disk(tmp_path / "disk")
    machine = machines(linux_guest(disk=disk, rate=2000, batch=500)).ready()
    machine.qmp("stop")
    if snapshot:
        overlay = {"snapshot_file": str(tmp_path / "overlay"), "snapshot_node_name": "overlay"}
        machine.qmp("blockdev-snapshot-sync", node_name="disk0", **overlay)
    machine.migrate(f"exec:cat > {tmp_path}/state")
    machine.qmp("cont")
    machine.guest.wait_round(machine, 2, start=len(machine.serial()))
    new = restored(machines, machine, tmp_path / "state")
    new.qmp("cont")
    if snapshot:
        new.guest.wait_round(new, 3)
    else:
        new.wait_serial(r"^FAIL the disk holds record \d+ where \d+ was acknowledged")


def test_linux_counts_its_writes(machines, linux_guest):
    machine = machines(linux_guest(rate=5000)).ready()
    begin, before = time.monotonic(), machine.counter()
    machine.wait_progress(12_000)
    done = machine.counter() - before
    # Within a round of 4096 writes the guest catches up after it had no CPU.
    assert done - 2 * 4096 < 1.05 * 5000 * (time.monotonic() - begin), "its rate is not limited"


def test_linux_finds_a_changed_byte(machines, linux_guest):
    machine = machines(linux_guest(rate=1000, batch=200)).ready()
    address = machine.guest.work_address(machine)
    machine.qmp("stop")
    byte = machine.read_ram(address + 100, 1)
    machine.write_ram(address + 100, bytes([byte[0] ^ 1]))
    machine.qmp("cont")
    machine.wait_serial(r"^FAIL page 0 does not hold write")


def test_linux_finds_a_disk_that_went_back(machines, linux_guest, tmp_path):
    disk = make_disk(tmp_path / "disk")
    machine = machines(linux_guest(disk=disk, rate=2000, batch=500, check="atleast")).ready()
    machine.qmp("stop")
    old = disk.read_bytes()
    machine.qmp("cont")
    machine.guest.wait_round(machine, 2, start=len(machine.serial()))
    machine.qmp("stop")
    disk.write_bytes(old)
    machine.qmp("cont")
    machine.wait_serial(r"^FAIL the disk (holds|does not hold)")


@pytest.mark.parametrize(
    "ram", ["private", "memfd", "file", pytest.param("hugetlb", marks=pytest.mark.host_optional)]
)
def test_every_backend_is_read_at_the_right_place(machines, ram, request):
    if ram == "hugetlb":
        request.getfixturevalue("hugetlb")(32)
    machine = machines(Sweep(noise=1.0), ram=ram).ready()
    machine.qmp("stop")
    assert machine.guest.faults(machine.read_ram()) == []


def test_a_refusal_has_its_class_and_its_text(machines):
    machine = machines(Sweep())
    with pytest.raises(QmpError, match="no-such-thing") as caught:
        machine.qmp("no-such-thing")
    assert caught.value.kind == "CommandNotFound"
    machine.qmp("stop")
    assert machine.qmp.wait_for("STOP")
    assert machine.qmp("query-status")["running"] is False


def test_a_qemu_that_does_not_start_says_why(machines):
    with pytest.raises(AssertionError, match="no-such-device"):
        machines(Sweep(), extra=["-device", "no-such-device"])


def test_nothing_survives(machines):
    machine = Machine(Setup(Sweep(), machines.room, ram="file"))
    machine.kill()
    assert not alive(machine.pid)
    machine.kill()


def test_qemu_ends_with_who_started_it(machines):
    """QEMU is killed when its starter is killed, as when a test run is."""
    script = (
        "import qemukit, sweepkit, sys, time; from pathlib import Path;"
        "machine = qemukit.Machine(qemukit.Setup(sweepkit.Sweep(), Path(sys.argv[1])));"
        "print(machine.pid, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(machines.room)]
    # A killed starter removes no files, so they are created in the directory of this test.
    changed = {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(machines.room)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | changed) as starter:
        pid = int(starter.stdout.readline())
        assert alive(pid)
        starter.send_signal(signal.SIGKILL)
    until(lambda: not alive(pid), "QEMU lives on")


def test_a_machine_that_another_command_started_is_watched_and_ended(tmp_path):
    if find_qemu() is None:
        pytest.skip("no QEMU")
    with Machines() as machines:
        machine = machines(Sweep()).ready()
        machine.migrate(f"exec:cat > {tmp_path}/state", background_snapshot=True)
        setup = machines.setup_like(machine, "-incoming", f"exec:cat {tmp_path}/state")
        with open(tmp_path / "log", "wb") as log:
            process = subprocess.Popen([*setup.command, *setup.monitors], stdout=log, stderr=log)
        new = machines.adopt(setup, process.pid, machine)
        new.wait_progress(1000)
    assert process.wait() == -signal.SIGKILL


def test_the_version_is_known():
    qemu = find_qemu()
    if qemu is None:
        pytest.skip("no QEMU")
    assert qemu_version(qemu) >= (7, 2, 0), "older than the oldest supported version"

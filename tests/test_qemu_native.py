"""The benchmark of QEMU's own snapshots (bench/peers/qemu_native.py) measures consistent snapshots."""

import subprocess
import sys
import time

import pytest
from machinekit import MIB
from peers import qemu_native
from qemukit import find_qemu
from qmpkit import QmpError
from sweepkit import Sweep
from waitkit import PATIENCE_S

SMALL = Sweep(memory=32 * MIB, hot=6 * MIB, noise=1.0, delay=5000)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("dirty-logging", marks=pytest.mark.host_optional),
        "background-snapshot",
        pytest.param("mapped-ram", marks=pytest.mark.host_optional),
    ],
)
def test_the_image_is_one_state_and_the_figures_are_of_it(machines, method, request, tmp_path):
    if method not in qemu_native.methods(find_qemu()):
        pytest.skip(f"this QEMU is older than {method}")
    accel = "tcg" if method == "background-snapshot" else request.getfixturevalue("kvm")
    machine = machines(SMALL, accel=accel).ready()
    run = qemu_native.save(machine, method, tmp_path / "state", limit_s=PATIENCE_S, before_s=0.2)
    assert run.completed, run.why
    assert run.image_bytes >= 30 * MIB
    assert 0 < run.downtime_s < run.total_s
    assert run.guest.rate_before > 0
    machine.wait_progress(100)
    new = machines.successor(machine)
    if method == "mapped-ram":
        state = [{"capability": "mapped-ram", "state": True}]
        new.qmp("migrate-set-capabilities", capabilities=state)
        new.load(f"file:{tmp_path}/state")
    else:
        new.load(f"exec:cat {tmp_path}/state")
    assert new.guest.faults(new.read_ram()) == []


def test_what_does_not_converge_is_cancelled_and_the_machine_runs_on(machines, tmp_path):
    machine = machines(Sweep(memory=32 * MIB)).ready()
    run = qemu_native.save(
        machine, "dirty-logging", tmp_path / "state", sink_rate=8 * MIB, limit_s=1.5, before_s=0.2
    )
    assert not run.completed
    assert "not converged in 1.5 s" in run.why
    assert run.downtime_s is None
    machine.wait_progress(1000)
    limits = {"limit_s": PATIENCE_S, "before_s": 0.2}
    again = qemu_native.save(machine, "background-snapshot", tmp_path / "state", **limits)
    assert again.completed, again.why


def test_a_capability_that_is_missing_is_named(machines, monkeypatch, tmp_path):
    monkeypatch.setitem(qemu_native.CAPABILITIES, "dirty-logging", ["from-the-future"])
    with pytest.raises(QmpError, match="no from-the-future"):
        qemu_native.save(machines(SMALL).ready(), "dirty-logging", tmp_path / "state")


def test_the_throttle_keeps_its_rate_and_the_bytes():
    data = bytes(range(256)) * (2 * MIB // 256)
    begin = time.monotonic()
    command = [sys.executable, str(qemu_native.THROTTLE), str(4 * MIB)]
    done = subprocess.run(command, input=data, capture_output=True, check=True)
    assert done.stdout == data
    assert time.monotonic() - begin > 0.4

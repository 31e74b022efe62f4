"""After a save or a failure at any step, the guest, its settings and its files are as before."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from machinekit import MIB, until
from qemukit import Setup
from sweepkit import Sweep
from targetkit import thread_names
from waitkit import PATIENCE_S

import snapengine
from snapengine.errors import ImageError, MachineError, SnapengineError, TargetGoneError
from snapengine.options import Options
from snapengine.qemu.disks import disks
from snapengine.qemu.guard import Guard
from snapengine.qemu.machine import EXTERNAL_DMA_FILES
from snapengine.qemu.monitor import Monitor
from snapengine.qemu.restore import restore_machine
from snapengine.qemu.target import QemuTarget
from snapengine.qemu.via_migration import save_by_migration

SLOW = Sweep(memory=32 * MIB, hot=6 * MIB, noise=1.0, delay=5000)
ODD = ["pause-before-switchover", "auto-converge", "late-block-activate"]


def settings(machine):
    """Return the migration capabilities and parameters."""
    return machine.qmp("query-migrate-capabilities"), machine.qmp("query-migrate-parameters")


def pipes(machine):
    """Return QEMU's open pipes. (10.0 itself leaks a /dev/userfaultfd for each background-snapshot.)"""
    folder = f"/proc/{machine.pid}/fd"
    return sorted(link for fd in os.listdir(folder) if (link := os.readlink(f"{folder}/{fd}"))[:5] == "pipe:")


def running(machine):
    return machine.qmp("query-status")["running"]


def test_capabilities_that_are_in_the_way(machines, tmp_path, migration):
    """With them QEMU would refuse background-snapshot, or wait for a command before the end."""
    method, accel = migration
    machine = machines(SLOW, accel=accel).ready()
    states = [{"capability": name, "state": True} for name in ODD]
    machine.qmp("migrate-set-capabilities", capabilities=states)
    before = settings(machine)
    with Monitor(str(machine.socket)) as monitor:
        options = Options(method=method, max_seconds=PATIENCE_S)
        result = save_by_migration(monitor, tmp_path / "vm.img", options)
    assert result.status == "completed"
    assert settings(machine) == before
    machine.wait_progress(100)


@pytest.mark.parametrize("command", ["migrate", "migrate-set-capabilities", "migrate-set-parameters"])
def test_a_command_that_is_refused_on_the_way(machines, tmp_path, monkeypatch, command):
    """Nothing of ours is left in QEMU, and nothing waits for a stream that never started."""
    machine = machines(SLOW).ready()
    machine.qmp("migrate-set-capabilities", capabilities=[{"capability": "xbzrle", "state": True}])
    before, opened = settings(machine), pipes(machine)
    execute, refused = Monitor.execute, []

    def refuse(self, name, arguments=None, **more):
        wants = command == "migrate-set-capabilities" and "true" not in json.dumps(arguments)
        if name != command or refused or wants:
            return execute(self, name, arguments, **more)
        refused.append(name)
        raise MachineError(f"QEMU refuses {name}: because")

    monkeypatch.setattr(Monitor, "execute", refuse)
    with Monitor(str(machine.socket)) as monitor, pytest.raises(MachineError, match="because"):
        save_by_migration(monitor, tmp_path / "vm.img", Options())
    assert settings(machine) == before
    assert pipes(machine) == opened
    assert os.listdir(tmp_path) == []
    machine.wait_progress(100)


@pytest.mark.host_optional
def test_the_guest_does_not_wait_for_the_image(machines, kvm, tmp_path):
    """Plain `migrate` stops the guest at the end of the stream. It is resumed before the image is written."""
    machine = machines(SLOW, accel=kvm).ready()
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    seen = []

    def watch():
        """Unblock the sink only after the guest has been stopped and resumed."""
        try:
            until(lambda: running(machine) and stops_of(machine)[-2:] == ["STOP", "RESUME"], "not resumed")
            seen.append("RESUME")
        finally:
            gate.write_text("")

    watcher = threading.Thread(target=watch)
    watcher.start()
    with Monitor(str(machine.socket)) as monitor:
        sink = f"exec:cat {gate}; cat >/dev/null"
        options = Options(method="dirty-logging", max_seconds=PATIENCE_S, downtime_limit=PATIENCE_S)
        result = save_by_migration(monitor, sink, options)
    watcher.join()
    assert seen == ["RESUME"]
    assert result.stop_ns > 0


def stops_of(machine):
    """Return the names of the STOP and RESUME events received so far."""
    return [e["event"] for e in machine.qmp.events if e["event"] in ("STOP", "RESUME")]


def test_killed_while_qemu_migrates(machines, tmp_path, migration):
    """After SIGKILL the guard restores the settings, and the guest runs."""
    method, accel = migration
    machine = machines(SLOW, accel=accel).ready()
    before = settings(machine)
    command = [sys.executable, "-m", "snapengine.cli", "qemu", "save", "--via-migration", "--quiet", "--qmp",
               str(machine.socket), "--method", method, "--memory-limit", "16M",
               "exec:sleep 3"]  # fmt: skip
    with subprocess.Popen(command, start_new_session=True) as saver:
        until(lambda: machine.qmp("query-migrate").get("status") in ("active", "completed"), "no migration")
        os.killpg(saver.pid, signal.SIGKILL)
    until(lambda: settings(machine) == before, "the settings stay")
    until(lambda: running(machine), "the guest stays stopped")
    machine.wait_progress(100)


def test_a_guard_whose_shell_is_ended():
    guard = Guard(-1, [("cont", {})])
    os.kill(guard._shell.pid, signal.SIGKILL)
    guard._shell.wait()
    guard.dismiss()
    guard.dismiss()


def test_interrupted_where_the_guest_goes_on(machines, tmp_path, monkeypatch):
    """A Ctrl-C just before `cont` is sent."""
    machine = machines(Sweep()).ready()
    execute, done = Monitor.execute, []

    def interrupt(self, name, arguments=None, **more):
        if name == "cont" and not done:
            done.append(name)
            raise KeyboardInterrupt
        return execute(self, name, arguments, **more)

    monkeypatch.setattr(Monitor, "execute", interrupt)
    with Monitor(str(machine.socket)) as monitor:
        capture = snapengine.snapshot(QemuTarget(monitor), tmp_path / "vm.img")
        with pytest.raises(KeyboardInterrupt):
            capture.start()
        assert running(machine)
    assert os.listdir(tmp_path) == []
    machine.wait_progress(1000)


class Disturbed(QemuTarget):
    """A target that calls a function before the guest is stopped, or while it is stopped."""

    def __init__(self, monitor, before=None, while_stopped=None):
        super().__init__(monitor)
        self.before, self.while_stopped = before, while_stopped

    def pause(self):
        if self.before:
            self.before()
        super().pause()

    def vmstate(self):
        if self.while_stopped:
            self.while_stopped()
        return super().vmstate()


def test_qemu_that_dies_while_the_guest_is_stopped(machines, tmp_path):
    machine = machines(Sweep()).ready()
    with Monitor(str(machine.socket)) as monitor:
        target = Disturbed(monitor, while_stopped=lambda: os.kill(machine.pid, signal.SIGKILL))
        capture = snapengine.snapshot(target, tmp_path / "vm.img")
        with pytest.raises(TargetGoneError):
            capture.start()
        assert capture.wait(PATIENCE_S)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("method", ["write-tracking", "dirty-logging"])
def test_a_device_that_is_plugged_in_meanwhile(machines, tmp_path, method):
    """Its state would be in the image, but not in the description."""
    machine = machines(SLOW).ready()
    with Monitor(str(machine.socket)) as monitor:
        target = Disturbed(monitor, lambda: machine.qmp("device_add", driver="virtio-rng-pci", id="late"))
        capture = snapengine.snapshot(target, tmp_path / "vm.img", method=method)
        with pytest.raises(MachineError, match=r"was changed .*late") as caught, capture:
            pass
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []
    machine.wait_progress(100)


def test_a_disk_snapshot_that_fails(machines, tmp_path):
    """The second of two snapshots fails: the first one's file is removed, and both disks are unchanged."""
    extra = []
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(bytes(MIB))
        extra += ["-drive", f"file={tmp_path}/{name},format=raw,if=none,id={name}",
                  "-device", f"virtio-blk-pci,drive={name}"]  # fmt: skip
    machine = machines(Sweep(), extra=tuple(extra)).ready()
    files = {"one": str(tmp_path / "a.qcow2"), "two": str(tmp_path / "nowhere" / "b.qcow2")}
    with Monitor(str(machine.socket)) as monitor:
        capture = snapengine.snapshot(QemuTarget(monitor, block_snapshots=files), tmp_path / "vm.img")
        with pytest.raises(MachineError, match="refuses transaction"):
            capture.start()
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]
    assert machine.qmp("query-fdsets") == []
    machine.wait_progress(1000)


def test_repeated_disk_snapshots_by_the_same_name(machines, tmp_path):
    """A node gets another name by a snapshot; the names that the user knows stay valid."""
    (tmp_path / "disk").write_bytes(bytes(MIB))
    node = "a-name-of-a-node-of-31-letters-"
    extra = ("-blockdev", f"driver=file,node-name=file0,filename={tmp_path}/disk",
             "-blockdev", f"driver=raw,node-name={node},file=file0",
             "-device", f"virtio-blk-pci,drive={node},id=vda")  # fmt: skip
    machine = machines(Sweep(), extra=extra).ready()
    with Monitor(str(machine.socket)) as monitor:
        for number, name in enumerate([node, node, "vda", "vda"]):
            file = tmp_path / f"{number}.qcow2"
            target = QemuTarget(monitor, block_snapshots={name: str(file)})
            with snapengine.snapshot(target, tmp_path / "vm.img"):
                pass
            (disk,) = disks(monitor)
            assert disk.file == str(file)
            assert disk.qdev == "vda"
        refused = {"are one disk": {"vda": "x", node: "y"}, "no disk 'vdb'": {"vdb": "x"}}
        for error, files in refused.items():
            with pytest.raises(MachineError, match=error):
                snapengine.snapshot(QemuTarget(monitor, block_snapshots=files), tmp_path / "vm.img").start()
    machine.wait_progress(1000)


def test_no_disk_snapshot_behind_libvirts_back(machines, tmp_path):
    (tmp_path / "disk").write_bytes(bytes(MIB))
    extra = ("-drive", f"file={tmp_path}/disk,format=raw,if=virtio,id=vda", "-chardev", "null,id=charmonitor")
    machine = machines(Sweep(), extra=extra).ready()
    with Monitor(str(machine.socket)) as monitor:
        target = QemuTarget(monitor, block_snapshots={"vda": str(tmp_path / "new")})
        with pytest.raises(MachineError, match=r"libvirt runs this machine.*virsh snapshot-create-as"):
            snapengine.snapshot(target, tmp_path / "vm.img").start()
        with snapengine.snapshot(QemuTarget(monitor), tmp_path / "vm.img"):
            pass
    assert sorted(os.listdir(tmp_path)) == ["disk", "vm.img"]


def test_a_socket_that_another_process_opened(machines, tmp_path):
    """As with libvirt: the peer that the kernel reports is not QEMU, and must not be attached to."""
    room = machines.room / "handed"
    room.mkdir()
    setup = Setup(Sweep(), room)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(room / "handed"))
        listener.listen(1)
        fd = listener.fileno()
        monitor = ["-chardev", f"socket,id=c,fd={fd},server=on,wait=off", "-mon", "c,mode=control"]
        line = [*setup.command, *monitor]
        other = stack.enter_context(subprocess.Popen(["sleep", "600"]))
        stack.callback(other.kill)
        qemu = stack.enter_context(subprocess.Popen(line, pass_fds=[fd], stdin=subprocess.DEVNULL))
        stack.callback(qemu.kill)
        with Monitor(str(room / "handed"), seconds=PATIENCE_S) as monitor:
            assert monitor.peer_pid == os.getpid()
            for pid in (0, other.pid):
                with pytest.raises(SnapengineError) as caught:
                    snapengine.snapshot(QemuTarget(monitor, pid), tmp_path / "vm.img").start()
                assert "\n" not in str(caught.value)
            assert "is not the QEMU that answers" in str(caught.value)
            with snapengine.snapshot(QemuTarget(monitor, qemu.pid), tmp_path / "vm.img"):
                pass
    assert os.listdir(tmp_path) == ["vm.img"]


@pytest.mark.parametrize("name", ["/dev/vhost-net", "/dev/vhost-vdpa-0", "/dev/vfio/12"])
def test_files_of_devices_past_qemu(name):
    assert EXTERNAL_DMA_FILES.fullmatch(name)


# restoring


@pytest.fixture
def saved(machines, tmp_path):
    """(machine, image, command): a saved machine, which has been killed, and its command."""
    machine = machines(Sweep(memory=32 * MIB)).ready()
    with Monitor(str(machine.socket)) as qmp, snapengine.snapshot(QemuTarget(qmp), tmp_path / "vm.img"):
        pass
    machine.kill()
    command = [machine.qemu, *machine.setup.machine_arguments, "-display", "none", "-serial", "null"]
    return machine, tmp_path / "vm.img", command


def test_a_command_that_cannot_be_executed(saved, tmp_path, monkeypatch):
    odd = tmp_path / "odd"
    odd.write_bytes(b"\x7fELF")
    odd.chmod(0o755)
    with tempfile.TemporaryDirectory(prefix="q-") as place, snapengine.open_image(saved[1]) as image:
        monkeypatch.setattr("tempfile.tempdir", place)
        with pytest.raises(OSError, match="Exec format"):
            restore_machine(image, [str(odd)])
        with pytest.raises(OSError, match="No such file"):
            restore_machine(image, saved[2], log=tmp_path / "nowhere" / "log")
        with pytest.raises(MachineError, match="another machine"):
            restore_machine(image, [*saved[2], "-smp", "2"])
        assert os.listdir(place) == []


def test_a_long_path_of_a_socket(saved, tmp_path, monkeypatch):
    """A long TMPDIR is not the user's fault; a long path of theirs is refused before QEMU starts."""
    place = tmp_path / ("d" * 100)
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    with snapengine.open_image(saved[1]) as image:
        restored = restore_machine(image, saved[2])
        try:
            assert restored.status == "running"
        finally:
            restored.process.kill()
            restored.process.wait()
            shutil.rmtree(Path(restored.qmp).parent)
        with pytest.raises(MachineError, match=r"dddd/q: a socket's path has at most 107 bytes"):
            restore_machine(image, ["/bin/false"], qmp=str(place / "q"))
    with pytest.raises(MachineError, match=r"dddd/q: a socket's path has at most 107 bytes"):
        Monitor(str(place / "q"))


def test_other_files_of_a_qemu_that_is_not_restored(saved):
    """QEMU removes its pid file and sockets on exit; the error does not name our SIGTERM as the reason."""
    machine, path, command = saved
    room = machine.room / "second"
    room.mkdir()
    more = ["-pidfile", f"{room}/pid", "-monitor", f"unix:{room}/hmp,server=on,wait=off", "-smp", "2"]
    with snapengine.open_image(path) as image, pytest.raises(MachineError, match="another machine") as caught:
        restore_machine(image, [*command, *more], qmp=str(room / "q,mp"))
    assert "terminating" not in str(caught.value)
    assert os.listdir(room) == []


def test_a_wrapper_around_qemu(saved):
    """The reported pid is QEMU's, and QEMU is terminated together with its wrapper."""
    machine, path, command = saved
    wrapper = ["sh", "-c", '"$@"; exit', "sh"]
    with snapengine.open_image(path) as image:
        restored = restore_machine(image, [*wrapper, *command], run=False)
        assert restored.pid != restored.process.pid
        os.kill(restored.pid, signal.SIGKILL)
        restored.process.wait()
        with pytest.raises(MachineError, match="another machine"):
            restore_machine(image, [*wrapper, *command, "-smp", "2", "-name", f"wrapped-{machine.pid}"])
    shown = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert f"wrapped-{machine.pid}" not in shown


def test_interrupted_while_it_loads(saved, monkeypatch):
    """No QEMU is left, and no thread that reads the image."""
    from snapengine.qemu import restore

    started = []
    connect = restore.connect

    def note(path, process, *limits):
        started.append(process)
        return connect(path, process, *limits)

    def interrupt(done):
        raise KeyboardInterrupt

    monkeypatch.setattr(restore, "connect", note)
    with snapengine.open_image(saved[1]) as image, pytest.raises(KeyboardInterrupt):
        restore_machine(image, saved[2], progress=interrupt)
    assert started[0].poll() is not None
    until(lambda: "snap-feed" not in thread_names(), "it still reads the image")


@pytest.mark.parametrize("change", [{"cpus": 5}, {"devices": [{}]}, {"disks": ["x"]}, {"qemu": 7}])
def test_a_description_of_wrong_types(saved, tmp_path, change):
    with snapengine.open_image(saved[1]) as image:
        blob = json.loads(image.vmstate["qemu.machine"]) | change
    with snapengine.snapshot(bytearray(8192), tmp_path / "odd.img",
                             vmstate={"qemu.machine": json.dumps(blob).encode()}):  # fmt: skip
        pass
    path = tmp_path / "odd.img"
    with snapengine.open_image(path) as image, pytest.raises(ImageError, match="wrong type"):
        restore_machine(image, saved[2])


def test_info_tells_of_the_machine(saved):
    command = [sys.executable, "-m", "snapengine.cli", "info", str(saved[1])]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for words in ("pc-i440fx", "device-state", "CPUs", "RAM blocks", "device_state"):
        assert words in shown
    for line in (command, [*command[:-1], "-"]):
        stdin = subprocess.Popen(["cat", saved[1]], stdout=subprocess.PIPE)
        out = subprocess.run([*line, "--json"], stdin=stdin.stdout, capture_output=True, check=True).stdout
        stdin.stdout.close()
        stdin.wait()
        machine = json.loads(out)["machine"]
        assert machine["via"] == "device-state"
        assert "pc.ram" in [block["name"] for block in machine["ram_blocks"]]

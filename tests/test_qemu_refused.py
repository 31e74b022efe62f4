"""Machines that cannot be saved or restored: the error is one line, the machine runs, and no file is left."""

import contextlib
import json
import mmap
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from machinekit import MIB, until
from sweepkit import Sweep
from waitkit import PATIENCE_S

import snapengine
from snapengine.errors import ImageError, MachineError, SnapengineError
from snapengine.options import Options
from snapengine.qemu.machine import refuse_devices
from snapengine.qemu.monitor import Monitor
from snapengine.qemu.restore import restore_machine
from snapengine.qemu.target import QemuTarget
from snapengine.qemu.via_migration import save_by_migration

NOBODY = 65534


def cli(*arguments, prefix=(), **named):
    """Run the command line; return (exit code, stdout, stderr)."""
    command = [*prefix, sys.executable, "-m", "snapengine.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S, **named)
    return done.returncode, done.stdout, done.stderr


def command_of(machine):
    """Return the command of the same machine, without monitor and serial port."""
    return [machine.qemu, *machine.setup.machine_arguments, "-display", "none", "-serial", "null"]


def save(machine, sink, way, **options):
    """Save a running machine."""
    with Monitor(str(machine.socket)) as monitor:
        if way == "migration":
            save_by_migration(monitor, sink, Options(**options))
        else:
            with snapengine.snapshot(QemuTarget(monitor), sink, **options):
                pass


def attempt(machine, folder, way, match, **options):
    """Check that a save fails, that the guest keeps running, and that no image or part of one is left."""
    with pytest.raises(SnapengineError, match=match) as caught:
        save(machine, folder / "vm.img", way, **options)
    assert "\n" not in str(caught.value)
    assert os.listdir(folder) == []
    assert machine.qmp("query-fdsets") == []
    if machine.qmp("query-status")["running"]:
        machine.wait_progress(1000)
    return caught.value


@pytest.fixture
def folder(tmp_path):
    """An empty directory for images."""
    path = tmp_path / "images"
    path.mkdir()
    return path


# saving


@pytest.mark.parametrize("way", ["attached", "migration"])
def test_a_machine_that_migrates_already(machines, way, folder):
    machine = machines(Sweep(noise=1.0)).ready()
    machine.qmp("migrate-set-parameters", max_bandwidth=MIB)
    machine.qmp("migrate", uri="exec:cat > /dev/null")
    try:
        attempt(machine, folder, way, "migrating already")
        assert machine.qmp("query-migrate")["status"] in ("setup", "active")
    finally:
        machine.qmp("migrate_cancel")


def test_rounds_of_qemu_that_would_miss_writes(machines, folder):
    machine = machines(Sweep(hot=8 * MIB, delay=2000)).ready()
    attempt(machine, folder, "migration", "without KVM", method="dirty-logging")
    machine.qmp("stop")  # a stopped guest writes nothing
    save(machine, folder / "vm.img", "migration", method="dirty-logging")
    assert os.listdir(folder) == ["vm.img"]


def test_a_device_that_shares_its_memory(machines, folder):
    extra = ["-object", "memory-backend-memfd,id=shared,size=1M,share=on",
             "-device", "ivshmem-plain,memdev=shared,id=window"]  # fmt: skip
    machine = machines(Sweep(), extra=extra).ready()
    attempt(machine, folder, "attached", r"(window \(ivshmem-plain\)|ivshmem)")


class Answers:
    """A monitor with canned replies, for hardware that test machines lack."""

    def __init__(self, devices=(), network=""):
        self.devices, self.network = devices, network

    def execute(self, command, arguments):
        assert command == "qom-list"
        listed = [{"name": name, "type": f"child<{kind}>"} for name, kind in self.devices]
        return listed if arguments["path"] == "/machine/peripheral" else []

    def human(self, line):
        assert line == "info network"
        return self.network


@pytest.mark.parametrize(
    ("monitor", "match"),
    [
        (Answers([("gpu0", "vfio-pci")]), r"device gpu0 \(vfio-pci\)"),
        (Answers([("gpu0", "vfio-pci-nohotplug")]), "gpu0"),
        (Answers([("fs0", "vhost-user-fs-pci")]), "fs0"),
        (Answers([("scsi0", "vhost-scsi-pci")]), "scsi0"),
        (Answers(network="net0: index=0,type=vhost-user,..."), "a network card of the type vhost-user"),
    ],
)
def test_devices_that_write_past_qemu(monitor, match):
    with pytest.raises(MachineError, match=match):
        refuse_devices(monitor, os.getpid())


def test_a_plain_device_is_not_refused():
    refuse_devices(Answers([("net0", "virtio-net-pci")], "net0: index=0,type=user"), os.getpid())


@pytest.mark.parametrize("way", ["attached", "migration"])
def test_a_device_that_blocks_migration(machines, way, folder):
    """QEMU blocks migration of a machine with a writable vvfat disk."""
    source = folder.parent / "fat"
    source.mkdir()
    extra = ["-drive", f"file=fat:rw:{source},format=raw,if=none,id=fat"]
    machine = machines(Sweep(), extra=extra).ready()
    attempt(machine, folder, way, "does not support live migration")


def test_ram_in_a_file_on_a_disk(machines, folder):
    extra = ["-object", f"memory-backend-file,id=m,share=on,mem-path={folder.parent}/ram,size=64M",
             "-machine", "pc,memory-backend=m"]  # fmt: skip
    command = ["stat", "-f", "-c", "%T", folder]
    if "tmpfs" in subprocess.run(command, capture_output=True, text=True, check=True).stdout:
        pytest.skip("the temporary directory is a tmpfs, whose files can be tracked")
    machine = machines(Sweep(), extra=extra).ready()
    attempt(machine, folder, "attached", r"RAM block 'm' .*does not write-protect: use memory-backend-ram")


@pytest.mark.parametrize("way", ["attached", "migration"])
def test_a_sink_that_is_full(machines, way):
    machine = machines(Sweep(noise=1.0)).ready()
    with pytest.raises(SnapengineError, match="stopped reading"):
        save(machine, "exec:cat > /dev/full", way)
    machine.wait_progress(1000)


def test_a_disk_that_is_not_there(machines, folder):
    machine = machines(Sweep()).ready()
    with Monitor(str(machine.socket)) as monitor:
        target = QemuTarget(monitor, block_snapshots={"nix": str(folder / "x.qcow2")})
        capture = snapengine.snapshot(target, folder / "vm.img")
        with pytest.raises(MachineError, match="no disk 'nix'"):
            capture.start()
    machine.wait_progress(1000)
    assert os.listdir(folder) == []


@pytest.mark.parametrize("way", ["attached", "migration"])
def test_qemu_that_dies_half_way(machines, way, folder):
    machine = machines(Sweep(noise=1.0)).ready()
    threading.Timer(0.5, os.kill, (machine.pid, signal.SIGKILL)).start()
    with pytest.raises(SnapengineError):
        save(machine, folder / "vm.img", way, rate_limit=MIB // 4, memory_limit=16 * MIB)
    assert os.listdir(folder) == []


def test_without_the_right_to_attach(machines, folder):
    machine = machines(Sweep()).ready()
    place = machine.room / "images"
    place.mkdir()
    for path in (machine.room.parent, machine.room, place):
        path.chmod(0o777)
    machine.socket.chmod(0o777)
    user = ("setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups")
    if subprocess.run([*user, sys.executable, "-c", "import snapengine.cli"], check=False).returncode:
        pytest.skip("another user cannot import the package from here")
    code, _, text = cli("qemu", "save", "--qmp", machine.socket, place / "vm.img", prefix=user)
    assert code == 1
    assert "--via-migration" in text.splitlines()[-1]
    assert os.listdir(place) == []
    machine.wait_progress(1000)


def test_killed_while_the_guest_is_stopped(machines, folder):
    """SIGKILL between `stop` and `cont`: the guard resumes the guest."""
    machine = machines(Sweep()).ready()
    script = (
        "import os, signal, sys\n"
        "from snapengine.qemu.monitor import Monitor\n"
        "from snapengine.qemu.target import QemuTarget\n"
        "target = QemuTarget(Monitor(sys.argv[1]))\n"
        "target.open(0)\n"
        "target.pause()\n"
        "assert not target.monitor.execute('query-status')['running']\n"
        "print('stopped', flush=True)\n"
        "os.killpg(0, signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, machine.socket], capture_output=True, text=True, check=False,
        timeout=PATIENCE_S, start_new_session=True,
    )  # fmt: skip
    assert (done.stdout, done.returncode) == ("stopped\n", -signal.SIGKILL), done.stderr
    until(lambda: machine.qmp("query-status")["running"], "the guest stays stopped")
    machine.wait_progress(1000)


def test_killed_while_qemu_saves_itself(machines, folder):
    machine = machines(Sweep(noise=1.0)).ready()
    command = [sys.executable, "-m", "snapengine.cli", "qemu", "save", "--via-migration", "--rate-limit",
               "20M", "--qmp", str(machine.socket), str(folder / "vm.img")]  # fmt: skip

    def sent():
        return machine.qmp("query-migrate").get("ram", {}).get("transferred", 0)

    with subprocess.Popen(command, start_new_session=True) as saver:
        until(lambda: sent() > 8 * MIB, "no migration")
        os.killpg(saver.pid, signal.SIGKILL)
    until(lambda: machine.qmp("query-migrate")["status"] == "completed", "QEMU does not come to an end")
    machine.wait_progress(1000)


# restoring


@pytest.fixture
def saved(machines, folder):
    """(machine, image): a saved machine, which has been killed."""
    machine = machines(Sweep(memory=32 * MIB)).ready()
    machine.progress_address  # noqa: B018 - read it while the machine runs
    with Monitor(str(machine.socket)) as monitor, snapengine.snapshot(QemuTarget(monitor), folder / "vm.img"):
        pass
    machine.kill()
    return machine, folder / "vm.img"


def qemus():
    """Return the pids of the existing child processes."""
    found = set()
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            stat = Path(f"/proc/{entry}/stat").read_text(errors="replace")
            if int(stat.rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(entry))
    return found


def refused(path, command, error, match, **options):
    """Check that a restore fails with a one-line error, and that no new QEMU is left running."""
    before = qemus()
    with snapengine.open_image(path) as image, pytest.raises(error, match=match) as caught:
        restore_machine(image, command, **options)
    assert "\n" not in str(caught.value)
    assert qemus() <= before


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        (["-m", "64"], "RAM block pc.ram: 33554432 bytes were saved, this has 67108864"),
        (["-device", "virtio-rng-pci"], r"device .*virtio-rng-pci\) was not there"),
        (["-smp", "2"], "CPUs: 1 x .* was|were saved, these are 2 x"),
        (["-machine", "q35"], "machine type"),
    ],
)
def test_another_machine(saved, extra, match):
    machine, path = saved
    refused(path, [*command_of(machine), *extra], MachineError, match, qmp=str(machine.room / "new"))
    assert not (machine.room / "new").exists()


def test_another_machine_by_force(saved):
    machine, path = saved
    command = [*command_of(machine), "-device", "isa-debug-exit"]
    with snapengine.open_image(path) as image:
        restored = restore_machine(image, command, force=True)
    restored.process.kill()
    restored.process.wait()
    assert any("isa-debug-exit" in line for line in restored.differences)


@pytest.mark.parametrize(
    ("command", "match"),
    [
        (["no-such-program"], "no program 'no-such-program'"),
        ([], "no program"),
        (["qemu-system-x86_64", "-incoming", "tcp:0:1"], "-incoming already"),
        (["qemu-system-x86_64", "-daemonize"], "-daemonize already"),
        (["qemu-system-x86_64", "-no-such-option"], "did not start .exit code 1"),
        (["true"], "did not start .exit code 0"),
    ],
)
def test_commands_that_are_no_machine(saved, command, match):
    refused(saved[1], command, MachineError, match)


def test_a_socket_that_is_there(saved):
    machine, path = saved
    (machine.room / "new").touch()
    refused(path, command_of(machine), MachineError, "exists already", qmp=str(machine.room / "new"))
    assert (machine.room / "new").exists()


def test_an_image_of_something_else(saved, tmp_path):
    machine, _ = saved
    with snapengine.snapshot(bytearray(b"x" * 8192), tmp_path / "other.img"):
        pass
    refused(tmp_path / "other.img", command_of(machine), ImageError, "not an image of a QEMU machine")


def test_a_damaged_image(saved):
    machine, path = saved
    with snapengine.open_image(path) as image:
        offset = image.index.extent(image.index.count // 2)[0]
    with open(path, "r+b") as file:
        file.seek(offset + 6000)
        byte = file.read(1)[0]
        file.seek(offset + 6000)
        file.write(bytes([byte ^ 4]))
    refused(path, command_of(machine), ImageError, "checksum")


def test_devices_that_qemu_refuses(saved, tmp_path):
    """The device state is damaged: QEMU exits, and its output says why."""
    machine, path = saved
    with snapengine.open_image(path) as image:
        blobs = {name: image.vmstate[name] for name in image.vmstate}
        buffers = {region.name: mmap.mmap(-1, region.length) for region in image.regions}
        for region in image.regions:
            image.restore_into(region, buffers[region.name])
    blobs["qemu.devices"] = blobs["qemu.devices"][:300] + b"\xff" * 300
    with snapengine.snapshot(buffers, tmp_path / "bad.img", vmstate=blobs):
        pass
    refused(tmp_path / "bad.img", command_of(machine), MachineError, "refuses the state|exited during")


# the command line


@pytest.mark.parametrize("from_image", [False, True])
def test_save_and_restore_by_command(machines, folder, from_image):
    machine = machines(Sweep()).ready()
    arguments = ["--qmp", machine.socket, "--json", "--compress", "zstd", folder / "vm.img"]
    code, out, text = cli("qemu", "save", *arguments)
    assert (code, text) == (0, "")
    figures = json.loads(out)
    assert figures["status"] == "completed"
    assert figures["stop_parts_ns"]["device_state"] > 0
    code, out, text = cli("qemu", "save", "--qmp", machine.socket, "--via-migration", "null:")
    assert code == 0
    assert "write-tracking" in out
    before = machine.counter()
    machine.kill()
    code, out, text = cli(
        "qemu", "restore", "--json", folder / "vm.img", "--paused", "--qmp", machine.room / "new",
        *([] if from_image else ["--", *command_of(machine)]),
    )  # fmt: skip
    assert code == 0, text
    restored = json.loads(out)
    try:
        with Monitor(restored["qmp"]) as monitor:
            assert monitor.execute("query-status")["status"] == restored["status"] == "paused"
            monitor.execute("cont")
            assert monitor.execute("query-status")["running"]
    finally:
        os.kill(restored["pid"], signal.SIGKILL)
    assert before > 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["qemu", "save", "--qmp", "/nowhere.sock", "x.img"], 1, "no QEMU listens there"),
        (["qemu", "save", "--qmp", "/x", "--block-snapshot", "a", "x.img"], 2, "not DISK=FILE"),
        (["qemu", "save", "--qmp", "/x", "--via-migration", "--block-snapshot", "a=b", "x"], 2, "--block"),
        (["qemu", "restore", "/nowhere.img", "--", "true"], 1, "/nowhere.img"),
        (["qemu", "restore"], 2, "required"),
        (["qemu", "restore", "x.img", "qemu"], 2, "unrecognized arguments: qemu"),
    ],
)
def test_errors_of_the_command_line(arguments, code, words, tmp_path):
    done, _, text = cli(*arguments, cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert done == code
    assert words in text
    assert os.listdir(tmp_path) == []

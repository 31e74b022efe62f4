"""Injection writes only to a page that it maps in the target for this, and unmaps it afterwards."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from targetkit import MEMORY, PAGES, VALUES, Target, descriptors, inject, refusal, status_line

import snapengine
from snapengine.doctor.preflight import examine_process
from snapengine.errors import AttachError, UffdPermissionError
from snapengine.kernel.procmaps import read_maps
from snapengine.kernel.uffd import FEATURES, Uffd
from snapengine.process import inject_policy, permissions
from snapengine.process.inject import inject_userfaultfd

pytestmark = pytest.mark.usefixtures("requires_uffd", "programs")

PAGE = 4096
NOBODY = {"user": 65534, "group": 65534, "extra_groups": []}
QUIET = {**os.environ, "GLIBC_TUNABLES": "glibc.pthread.rseq=0"}  # the kernel writes to that area at any time
USERS = pytest.mark.parametrize("user", [{}, NOBODY], ids=["by the call", "by the device"])


def private_memory(target):
    """{address: bytes} of its writable private mappings, except the pages that its own threads write to."""
    own = {(word + i * PAGE) for word in (target.words[MEMORY], target.words[VALUES]) for i in range(4)}
    found = {}
    with open(f"/proc/{target.pid}/mem", "rb", buffering=0) as memory:
        for mapping in read_maps(target.pid):
            if mapping.perms[1] == "w" and not mapping.shared:
                data = os.pread(memory.fileno(), mapping.end - mapping.start, mapping.start)
                for at in range(0, len(data), PAGE):
                    if mapping.start + at not in own:
                        found[mapping.start + at] = data[at : at + PAGE]
    return found


@pytest.mark.usefixtures("as_root")
@USERS
def test_no_byte_of_its_memory_changes(user):
    """Compared before and after 100 injections, and by a thread that uses the memory below a stack."""
    with Target("smallstack", env=QUIET, **user) as target:
        assert target.words[PAGES] == 4
        target.check_running()
        before, mappings = private_memory(target), read_maps(target.pid)
        open_files = descriptors(target.pid)
        for _ in range(100):
            inject(target.pid)
        target.check_running()
        assert private_memory(target) == before
        assert read_maps(target.pid) == mappings
        assert descriptors(target.pid) == open_files
        assert status_line(target.pid, "TracerPid") == "0"


@pytest.mark.usefixtures("as_root")
def test_nothing_is_left_in_the_file_system():
    with Target("smallstack", **NOBODY) as target:
        inject(target.pid)
        root = Path(f"/proc/{target.pid}/root")
        for folder in ("tmp", "var/tmp", "run", "dev", "dev/shm", ""):
            assert [name for name in os.listdir(root / folder) if name.startswith(".snapengine")] == []


@pytest.mark.usefixtures("as_root")
def test_no_room_for_a_page():
    with Target("smallstack", 9, 1 << 20, **NOBODY) as target:
        before = descriptors(target.pid)
        error = refusal(target.pid, AttachError)
        assert error.errno == errno.ENOMEM
        assert "address space limit" in str(error)
        assert descriptors(target.pid) == before
        target.check_running()


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("spare", [0, 1, 2])
def test_few_free_descriptors(spare):
    """The injection needs two at a time; with fewer it is refused, and nothing stays open or mapped."""
    with Target("smallstack", spare, **NOBODY) as target:
        before, mappings = descriptors(target.pid), read_maps(target.pid)
        assert sorted(before) == ["0", "1", "2"]
        if spare < 2:
            assert "no free descriptor" in str(refusal(target.pid, AttachError))
        else:
            inject(target.pid)
        assert descriptors(target.pid) == before
        assert read_maps(target.pid) == mappings
        target.check_running()


@pytest.mark.usefixtures("as_root")
def test_a_target_that_sees_no_device():
    """Its root and its mounts do not matter: the descriptor comes from the engine."""
    mounts = 'mount -t tmpfs -o nodev,ro none /dev && mount -o remount,bind,nodev,ro /run && exec "$@"'
    become = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--bounding-set", "-all"]
    place = ["unshare", "-m", "sh", "-c", f"mount --bind /run /run && {mounts}", "sh", *become]
    with Target("smallstack", wrapper=place) as target:
        assert not os.path.exists(f"/proc/{target.pid}/root/dev/userfaultfd")
        with Uffd(FEATURES["PAGEFAULT_FLAG_WP"], fd=inject_userfaultfd(target.pid).fd) as uffd:
            uffd.register(target.words[MEMORY], PAGE)
        target.check_running()


ENGINE = """
import ctypes, os, sys
from snapengine.errors import UffdPermissionError
from snapengine.process.inject import inject_userfaultfd
from snapengine.doctor.preflight import examine_process
os.setgroups([]); os.setgid(65534); os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: as if it had been this user's from the start
for ask in (inject_userfaultfd, examine_process):
    try: print("allowed" if ask(int(sys.argv[1])) else "")
    except UffdPermissionError as error: print("refused", error)
"""


def run_engine_as_nobody(pid, device):
    """The results of attaching and of asking, for a plain user; `device`: the node in its /dev."""
    room = Path(snapengine.__file__).parent.parent
    script = f'mount --bind "{device}" /dev/userfaultfd && exec "$@"' if device else 'exec "$@"'
    command = ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-c", ENGINE, str(pid)]
    environment = {**os.environ, "PYTHONPATH": str(room), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def open_node(tmp_path):
    """A node of the device that every user may open."""
    node = Path("/tmp") / f"uffd-{os.getpid()}"
    os.mknod(node, stat.S_IFCHR | 0o666, os.stat("/dev/userfaultfd").st_rdev)
    node.chmod(0o666)
    yield node
    node.unlink()


@pytest.mark.usefixtures("as_root")
def test_a_plain_user_with_access_to_the_device(open_node):
    with Target("smallstack", **NOBODY) as target:
        assert run_engine_as_nobody(target.pid, open_node) == ["allowed", "allowed"]
        target.check_running()


@pytest.mark.usefixtures("as_root")
def test_a_plain_user_without(monkeypatch):
    """Asking beforehand gives the same answer as attaching."""
    with open("/proc/sys/vm/unprivileged_userfaultfd") as knob:
        if knob.read().strip() != "0":
            pytest.skip("every user may call userfaultfd(2) here")
    with Target("smallstack", **NOBODY) as target:
        said = run_engine_as_nobody(target.pid, None)
        assert [line.split()[0] for line in said] == ["refused", "refused"]
        assert all("/dev/userfaultfd" in line and "vm.unprivileged_userfaultfd" in line for line in said)
        target.check_running()
        monkeypatch.setattr(inject_policy, "open_device", lambda path=None: os.open("/nowhere", 0))
        monkeypatch.setattr(inject_policy, "_may_call", lambda info: False)
        with pytest.raises(UffdPermissionError):
            examine_process(target.pid)
        assert inject_policy.foresee(permissions.check(target.pid)) is not None

"""Peers other than our guest: Firecracker's form of the hand-over, and peers that cannot be tracked."""

import contextlib
import json
import subprocess
import sys

import pytest
from patientkit import PeerTarget

import snapengine
from snapengine.image import open_image

MIB = 1 << 20
PEER = """
import ctypes, json, mmap, os, socket, sys, time
from snapengine.kernel.uffd import FEATURES, MODE_MISSING, MODE_WP, Uffd
how = json.loads(sys.argv[2])
size = 8 << 20
flags = mmap.MAP_ANONYMOUS | (mmap.MAP_SHARED if how.get("shared") else mmap.MAP_PRIVATE)
memory = mmap.mmap(-1, size, flags=flags)
memory.madvise(mmap.MADV_NOHUGEPAGE)
addr = ctypes.addressof(ctypes.c_char.from_buffer(memory))
for page in range(0, size // 2, 4096):
    memory[page:page + 8] = page.to_bytes(8, "little")
memory[0] = 7
uffd = Uffd(sum(FEATURES[name] for name in how["features"]))
if how.get("registered"):
    uffd.register(addr, size, MODE_MISSING | MODE_WP)
mapping = {"base_host_virt_addr": addr, "size": size, "offset": 0, "page_size": 4096, "page_size_kib": 4096}
connection = socket.socket(socket.AF_UNIX)
while connection.connect_ex(sys.argv[1]):
    time.sleep(0.01)
socket.send_fds(connection, [json.dumps([mapping]).encode()], [uffd.fd])
uffd.close()
print(addr, flush=True)
sys.stdin.readline()
for page in range(0, size, 4096):
    memory[page:page + 8] = b"ffffffff"
print("written", flush=True)
sys.stdin.readline()
"""
pytestmark = pytest.mark.usefixtures("requires_uffd")


@contextlib.contextmanager
def peer(path, **how):
    process = subprocess.Popen(
        [sys.executable, "-c", PEER, str(path), json.dumps(how)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("registered", [False, True])
@pytest.mark.parametrize(
    "features",
    [
        pytest.param(["PAGEFAULT_FLAG_WP"], id="WP only"),
        pytest.param(["PAGEFAULT_FLAG_WP", "WP_UNPOPULATED"], id="WP_UNPOPULATED"),
        pytest.param(
            ["PAGEFAULT_FLAG_WP", "EVENT_FORK", "EVENT_REMAP", "EVENT_REMOVE", "EVENT_UNMAP"], id="all events"
        ),
    ],
)
def test_a_peer_in_firecrackers_form(tmp_path, registered, features):
    with (
        peer(tmp_path / "socket", registered=registered, features=features) as process,
        snapengine.snapshot(PeerTarget(tmp_path / "socket"), tmp_path / "image") as capture,
    ):
        process.stdin.write("\n")
        process.stdin.flush()
        addr = int(process.stdout.readline())
        assert process.stdout.readline() == "written\n"
    result = capture.result
    assert result.pages_saved == 4 * MIB // 4096
    assert result.zero_pages + result.hole_pages == 4 * MIB // 4096
    if "WP_UNPOPULATED" not in features:
        assert result.hole_pages == 4 * MIB // 4096
    with open_image(tmp_path / "image") as image:
        image.verify()
        content = image.read_at(addr, 8 * MIB)
    assert content[0] == 7
    for page in range(4096, 8 * MIB, 4096):
        expected = page if page < 4 * MIB else 0
        assert int.from_bytes(content[page : page + 8], "little") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["image"]


def test_shared_memory_of_a_peer_that_did_not_ask_for_it(tmp_path):
    with (
        peer(tmp_path / "socket", shared=True, features=["PAGEFAULT_FLAG_WP"]),
        pytest.raises(snapengine.UnsupportedError, match="WP_HUGETLBFS_SHMEM"),
        snapengine.snapshot(PeerTarget(tmp_path / "socket"), tmp_path / "image"),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_peer_without_write_protection(tmp_path):
    with (
        peer(tmp_path / "socket", features=["EVENT_FORK"]),
        pytest.raises(snapengine.UnsupportedError, match="PAGEFAULT_FLAG_WP"),
        snapengine.snapshot(PeerTarget(tmp_path / "socket"), tmp_path / "image"),
    ):
        pass
    assert not list(tmp_path.iterdir())

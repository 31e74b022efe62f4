"""Each program of examples/ runs as its text says, and its image holds the program's memory at T."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from waitkit import PATIENCE_S

import snapengine
from snapengine.base.checksum import crc32c_of

PAGE = 4096
pytestmark = pytest.mark.usefixtures("requires_uffd")


@pytest.fixture
def run(repository):
    """``run(arguments, folder=...)``: runs Python in a directory of examples/, and returns its output."""

    def call(*arguments, folder=repository / "examples"):
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=folder, env=environment(), capture_output=True,
            text=True, check=False, timeout=2 * PATIENCE_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return call


def environment():
    """The environment in which the package under test is found first."""
    return os.environ | {"PYTHONPATH": str(Path(snapengine.__file__).parent.parent)}


@pytest.fixture
def built(repository, run, tmp_path):
    """``built(name)``: a copy of the directory examples/NAME with its extension built."""

    def build(name):
        folder = tmp_path / name
        shutil.copytree(repository / "examples" / name, folder)
        run("setup.py", "-q", "build_ext", "--inplace", folder=folder)
        return folder

    return build


def first_words(image):
    """The first word of each page of the only region."""
    image.verify()
    (region,) = image.regions
    content = image.read(region, 0, region.length)
    return [int.from_bytes(content[at : at + 8], "little") for at in range(0, len(content), PAGE)]


def writes_until(count, pages):
    """The first word of each page after `count` writes: write n puts n into page n modulo `pages`."""
    words = [0] * pages
    for number in range(max(1, count - pages + 1), count + 1):
        words[number % pages] = number
    return words


def test_checkpoint_array(run, tmp_path):
    shown = run("checkpoint_array.py", tmp_path / "image")
    assert "computed to step 8; saved step 3" in shown
    assert shown.endswith("restored step 3\n")


def test_save_process(run, tmp_path):
    shown = run("save_process.py", tmp_path / "image")
    assert "had counted to" in shown
    with snapengine.open_image(tmp_path / "image") as image:
        assert image.stats["cut"] == "soft"


def test_microvm_peer(repository, tmp_path):
    socket, path = tmp_path / "vm.sock", tmp_path / "vm.img"
    save = [sys.executable, "-m", "snapengine.cli", "save", "--quiet", "--socket", str(socket), str(path)]
    monitor = [sys.executable, repository / "examples" / "microvm_peer.py", socket]
    with (
        subprocess.Popen(save, env=environment(), stderr=subprocess.PIPE, text=True) as saving,
        subprocess.Popen(monitor, stdout=subprocess.PIPE, text=True) as peer,
    ):
        shown, _ = peer.communicate(timeout=2 * PATIENCE_S)
        _, complaint = saving.communicate(timeout=2 * PATIENCE_S)
    assert (saving.returncode, complaint) == (0, "")
    assert peer.returncode == 0
    with snapengine.open_image(path) as image:
        count = json.loads(image.vmstate["vcpu"])["writes"]
        words = first_words(image)
        assert image.regions[0].name == "ram"
    assert words == writes_until(count, len(words)), "the RAM is of the instant of the device state"
    assert int(shown.split("has done ")[1].split()[0]) >= count


def test_a_peer_whose_engine_dies_says_so(repository, tmp_path):
    import socket

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "vm.sock"))
        listener.listen()
        arguments = [sys.executable, repository / "examples" / "microvm_peer.py", tmp_path / "vm.sock"]
        with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as peer:
            connection, _ = listener.accept()
            connection.sendall(b'{"snapengine": 1, "features": 1}\n')
            _, fds, _, _ = socket.recv_fds(connection, 4096, 4)
            for fd in fds:
                os.close(fd)
            connection.close()
            _, complaint = peer.communicate(timeout=PATIENCE_S)
    assert len(fds) == 2
    assert peer.returncode == 1
    assert complaint == "the engine went away\n"


def test_c_embedder(built, run, tmp_path):
    shown = run("run.py", tmp_path / "image", folder=built("c_embedder"))
    with snapengine.open_image(tmp_path / "image") as image:
        words = first_words(image)
    count = max(words)
    assert words == writes_until(count, len(words)), "the image holds the first writes, and none after them"
    assert int(shown.split()[0]) >= count


def test_cython_embedder(built, run, tmp_path):
    shown = run("run.py", tmp_path / "image", folder=built("cython_embedder"))
    with snapengine.open_image(tmp_path / "image") as image:
        image.verify()
        (region,) = image.regions
        content = image.read(region, 0, region.length)
    assert content == (b"\1" * PAGE + bytes(PAGE)) * 2048
    assert shown == f"2048 of 4096 pages had data; the image holds 2048; CRC-32C {crc32c_of(content):08x}\n"


def test_every_example_is_listed_and_tested(repository):
    examples = repository / "examples"
    listed = (examples / "README.md").read_text()
    own = Path(__file__).read_text()
    names = {path.name for path in examples.iterdir()} - {"README.md", "__pycache__"}
    assert len(names) >= 5
    for name in names:
        assert f"({name}" in listed, name
        assert f'"{name}"' in own, name

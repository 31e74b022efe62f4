"""Programs that were not written for these tests: Python with numpy, and cores in gdb."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from process_kit import build_program, gdb, running
from targetkit import descriptors, status_line, until
from test_process import MODES, snap
from waitkit import PATIENCE_S

from snapengine.export.elf_core import export_core
from snapengine.image import open_image
from snapengine.process.record import process_of

pytestmark = pytest.mark.usefixtures("requires_uffd")

PAGE = 4096


def check_left_alone(pid, before):
    until(lambda: status_line(pid, "TracerPid") == "0")
    assert {fd: name for fd, name in descriptors(pid).items() if "userfaultfd" in name} == {}
    assert before <= set(descriptors(pid))


# Python

NUMPY = """
import sys, threading
import numpy as np

cells = np.zeros(1 << 20, dtype="<u8")
hidden = np.arange(1 << 18, dtype="<u8") * 3

def count():
    number = 1
    while True:
        cells[number * 40503 % len(cells)] = number
        number += 1

cells[:] = 0
thread = threading.Thread(target=count, daemon=True)
thread.start()
print(cells.ctypes.data, len(cells), hidden.ctypes.data, len(hidden), flush=True)
for line in sys.stdin:
    print(int(cells.max()), flush=True)
assert (hidden == np.arange(1 << 18) * 3).all()
"""


@pytest.mark.parametrize("mode", MODES)
def test_numpy_arrays_of_a_python_process(tmp_path, mode):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", NUMPY], **pipes) as process:
        try:
            address, length, other, other_length = map(int, process.stdout.readline().split())

            def written():
                process.stdin.write("?\n")
                process.stdin.flush()
                return int(process.stdout.readline())

            before = set(descriptors(process.pid))
            for _ in range(2):
                low = written()
                snap(process.pid, tmp_path / "image", mode)
                high = written()
                with open_image(tmp_path / "image") as image:
                    cells = np.frombuffer(image.read_at(address, length * 8), "<u8").astype(np.int64)
                    hidden = np.frombuffer(image.read_at(other, other_length * 8), "<u8")
                newest = int(cells.max())
                first = max(1, newest - length + 1)
                numbers = np.arange(first, newest + 1)
                assert (cells[numbers * 40503 % length] == numbers).all()
                assert low <= newest <= high
                assert (hidden == np.arange(other_length) * 3).all()
            check_left_alone(process.pid, before)
            process.stdin.close()
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()


# Cores, in gdb


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return build_program(tmp_path_factory.mktemp("program"))


@pytest.fixture
def debugger():
    if shutil.which("gdb") is None:
        pytest.skip("needs gdb")


@pytest.mark.usefixtures("debugger")
@pytest.mark.host_optional
@pytest.mark.parametrize("mode", ["stop", "dirty"])
def test_gdb_reads_the_core_of_a_live_process(tmp_path, compiled, mode):
    core = tmp_path / "core"
    with running(compiled) as pid:
        snap(pid, tmp_path / "image", mode)
        with open_image(tmp_path / "image") as image:
            export_core(image, core)
        assert status_line(pid, "State").startswith("S")
    commands = ["thread apply all backtrace", "print global_variable", "print heap_text", "print inner_value"]
    text = gdb(compiled, core, *commands, "x/s big + 33554432")
    for number in (1, 11, 21):
        assert re.search(rf"inner \(number={number}\)", text), text
        assert re.search(rf"outer \(number={number - 1}\)", text), text
    assert "= 20260731" in text
    assert '"a string on the heap"' in text
    assert '"in the middle"' in text


@pytest.mark.usefixtures("debugger")
@pytest.mark.host_optional
def test_gdb_reads_the_heap_of_a_soft_cut(tmp_path, compiled):
    core = tmp_path / "core"
    with running(compiled) as pid:
        snap(pid, tmp_path / "image", "soft")
        with open_image(tmp_path / "image") as image:
            assert process_of(image).threads == []
            heap = next(region for region in image.regions if region.name == "[heap]")
            data = image.read(heap, 0, heap.length)
            export_core(image, core)
    at = heap.addr + data.index(b"a string on the heap")
    text = gdb(compiled, core, f"x/s {at:#x}")
    assert '"a string on the heap"' in text

"""Runtimes that manage memory by themselves: node, Java with two collectors, Go. Each checks its objects."""

import subprocess
from pathlib import Path

import pytest
from realkit import MODES, Counting, check_core, need, need_all

pytestmark = [pytest.mark.host_optional, pytest.mark.usefixtures("requires_uffd"), pytest.mark.timeout(1800)]

PROGRAMS = Path(__file__).with_name("programs")


def check_runtime(command, mode, tmp_path):
    """Runtimes whose collectors keep returning memory to the kernel."""
    with Counting(command, tmp_path / "log") as program:
        program.save(mode, tmp_path, discards=True)
        if mode == "stop":
            check_core(tmp_path / "image", Path(f"/proc/{program.pid}/exe").resolve(), tmp_path, True)
        program.check()


@pytest.mark.parametrize("mode", MODES)
def test_node(tmp_path, mode):
    need("node")
    check_runtime(["node", PROGRAMS / "busy.js"], mode, tmp_path)


@pytest.mark.parametrize("mode", MODES)
def test_java_g1(tmp_path, mode):
    need_all("Java")
    need("java", "javac")
    check_runtime(["java", "-XX:+UseG1GC", "-Xmx192m", PROGRAMS / "Busy.java"], mode, tmp_path)


def has_zgc():
    shown = subprocess.run(["java", "-XX:+UseZGC", "-version"], capture_output=True, check=False)
    return shown.returncode == 0


@pytest.mark.parametrize("mode", MODES)
def test_java_zgc(tmp_path, mode):
    """Its heap is mapped more than once: copied in a stop cut, named in a soft cut. It is unharmed."""
    need_all("Java")
    need("java", "javac")
    if not has_zgc():
        pytest.skip("this Java has no ZGC")
    command = ["java", "-XX:+UseZGC", "-Xmx192m", PROGRAMS / "Busy.java"]
    with Counting(command, tmp_path / "log") as program:
        program.save(mode, tmp_path, discards=True)
        program.check()


@pytest.fixture(scope="module")
def go_program(tmp_path_factory):
    need_all("Go")
    need("go")
    path = tmp_path_factory.mktemp("go") / "busy"
    command = ["go", "build", "-o", str(path), str(PROGRAMS / "busy.go")]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return path


@pytest.mark.parametrize("mode", MODES)
def test_go(tmp_path, go_program, mode):
    check_runtime([go_program], mode, tmp_path)

"""Fixtures of the benches: the floors, warm memory, guests."""

import contextlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from benchkit import TMPFS, is_tmpfs

from snapengine.errors import SnapengineError
from snapengine.guestprocess import GuestProcess
from snapengine.uffd import supported_features

ROOT = Path(__file__).resolve().parent.parent


def pytest_ignore_collect(collection_path, config):
    """bench_qemu.py takes minutes and needs QEMU: it runs only if it is named."""
    if collection_path.name == "bench_qemu.py":
        return not any("bench_qemu" in argument for argument in config.args)
    return None


@pytest.fixture(scope="session", autouse=True)
def requires_uffd():
    """Skip where this user may not use userfaultfd."""
    try:
        supported_features()
    except SnapengineError as error:
        pytest.skip(f"no userfaultfd here: {error}")


@pytest.fixture(scope="session")
def floors():
    """The module floors, built into build/bench/ (never a part of the wheel)."""
    subprocess.run([sys.executable, str(ROOT / "bench/setup_floors.py")], check=True)
    (path,) = (ROOT / "build/bench").glob("floors.*.so")
    spec = importlib.util.spec_from_file_location("floors", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def start_guest(tmp_path_factory):
    """``start_guest(params, rate)``: (GuestProcess, socket path); ended after the bench, so that the next one
    has the CPUs for itself."""
    with contextlib.ExitStack() as stack:

        def start(params, rate):
            path = tmp_path_factory.mktemp("guest") / "socket"
            return stack.enter_context(GuestProcess(path, params, rate)), str(path)

        yield start


@pytest.fixture
def tmpfs(tmp_path):
    """A path for an image in memory, removed afterwards."""
    if not is_tmpfs(TMPFS):
        pytest.skip(f"{TMPFS} is no tmpfs: set SNAPENGINE_BENCH_TMPFS")
    path = TMPFS / f"snapengine-bench-{tmp_path.name}"
    yield path
    path.unlink(missing_ok=True)

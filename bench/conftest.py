"""Fixtures of the benches: the floors, warm memory, guests."""

import contextlib

import floorkit
import pytest
from benchkit import TMPFS, is_tmpfs

from snapengine.errors import SnapengineError
from snapengine.guest.process import GuestProcess
from snapengine.kernel.uffd import supported_features

APART = ("bench_qemu", "bench_peers")


def pytest_ignore_collect(collection_path, config):
    """The comparisons with other engines take minutes: they run only if they are named."""
    if collection_path.stem in APART:
        return not any(collection_path.stem in argument for argument in config.args)
    return None


@pytest.fixture(scope="session", autouse=True)
def requires_uffd():
    """Skip if this user may not use userfaultfd."""
    try:
        supported_features()
    except SnapengineError as error:
        pytest.skip(f"no userfaultfd here: {error}")


@pytest.fixture(scope="session")
def native():
    """Builds the native modules of the bench."""
    floorkit.build()


@pytest.fixture(scope="session")
def floors(native):
    """The functions of the floors' modules."""
    return floorkit.load_floors()


@pytest.fixture
def start_guest(tmp_path_factory):
    """``start_guest(params, rate)``: (GuestProcess, socket path).

    The guest ends after the bench, so that it takes no CPU from the next one.
    """
    with contextlib.ExitStack() as stack:

        def start(params, rate):
            path = tmp_path_factory.mktemp("guest") / "socket"
            return stack.enter_context(GuestProcess(path, params, rate)), str(path)

        yield start


@pytest.fixture
def tmpfs(tmp_path):
    """A path for an image in a tmpfs, removed after the bench."""
    if not is_tmpfs(TMPFS):
        pytest.skip(f"{TMPFS} is not a tmpfs: set SNAPENGINE_BENCH_TMPFS")
    path = TMPFS / f"snapengine-bench-{tmp_path.name}"
    yield path
    path.unlink(missing_ok=True)

"""A Cython and a C embedder build and run against the installed package, with the sources absent."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EMBED = Path(__file__).parent / "embed"

pytestmark = [pytest.mark.slow_build, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def embedder(installed, tmp_path_factory):
    """A function that runs Python code beside the built consumers; returns what it prints."""
    room = tmp_path_factory.mktemp("embed")
    shutil.copytree(EMBED, room, dirs_exist_ok=True)
    # PYTHONPATH goes before site-packages and before the finder of an editable install.
    env = os.environ | {"PYTHONPATH": str(installed)}

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=room, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    run("setup.py", "-q", "build_ext", "--inplace")
    return run


def test_the_package_is_the_installed_one(embedder, installed):
    where = embedder("-c", "import snapengine; print(snapengine.__file__)")
    assert Path(where).parent.parent == installed


def test_a_cython_embedder(embedder):
    # RFC 3720, B.4: 32 bytes of zeros.
    code = "import cython_consumer as c; print(hex(c.checksum(bytes(32))))"
    assert embedder("-c", code) == "0x8a9136aa"


def test_a_c_embedder(embedder):
    code = "import snapengine, c_consumer; print(c_consumer.version())"
    assert embedder("-c", code) == "1"

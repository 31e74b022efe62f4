"""The negative controls: captures that are wrong on purpose, and the checks that must find it.

The code that makes them wrong is compiled out of every other build (pyx/engine/controls.h). So some modules
are compiled again for these tests, into a copy of the package.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import snapengine
from snapengine.engine.session import Session

MODULES = ("session", "prearm", "reprotect", "fault_threads")


def test_an_ordinary_build_has_none():
    for control in ("serve_before_t", "skip_reprotect"):
        with pytest.raises(ValueError, match="has no negative controls"):
            Session([], -1, 0, memory_limit=16 << 20, fault_threads=1, encoders=1, **{control: True})


def run(command, room, environment):
    done = subprocess.run(command, cwd=room, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def library(repository, tmp_path_factory):
    """A directory with the package, in which `MODULES` have the controls."""
    room = tmp_path_factory.mktemp("controls")
    package = Path(snapengine.__file__).parent
    shutil.copytree(package, room / "lib" / "snapengine", ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {
        "SNAPENGINE_INSTRUMENT": "-DSNAPENGINE_CONTROLS",
        "SNAPENGINE_ONLY": " ".join(f"pyx/engine/{name}.pyx" for name in MODULES),
    }
    command = [sys.executable, "setup.py", "-q", "build_ext", "--force"]
    command += ["--build-lib", str(room / "lib"), "--build-temp", str(room / "temp")]
    run(command, repository, environment)
    return room / "lib"


@pytest.mark.slow_build
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("requires_uffd")
def test_the_checks_find_what_is_wrong(library, repository):
    """Each of them must have run: a deselected or skipped control proves nothing."""
    marked = [
        str(path)
        for path in sorted(Path(__file__).parent.glob("test_*.py"))
        if "@pytest.mark.negative_control" in path.read_text() and path != Path(__file__)
    ]
    assert len(marked) >= 4
    environment = os.environ | {
        "PYTHONPATH": str(library), "PYTHONSAFEPATH": "1", "SNAPENGINE_CONTROLS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-m", "negative_control", *marked]
    done = run(command, repository, environment)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 5
    assert "skipped" not in done.stdout.splitlines()[-1]

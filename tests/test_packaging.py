"""The files of the wheel, which must reveal nothing about the machine that built it."""

import re
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow_build, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def files(wheel):
    """Name and bytes of every file in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def modules(repository):
    """The path of each extension in the package, without its suffix, and its source."""
    sources = repository / "pyx"
    return {
        f"snapengine/{path.relative_to(sources).with_suffix('')}": path for path in sources.rglob("*.pyx")
    }


def test_every_interface_is_shipped(files, repository):
    package = repository / "snapengine"
    wanted = [path for kind in ("*.py", "*.pyi", "*.pxd", "*.h", "py.typed") for path in package.rglob(kind)]
    missing = {str(path.relative_to(repository)) for path in wanted} - set(files)
    assert not missing


def test_every_extension_is_shipped(files, repository):
    for name in modules(repository):
        built = [file for file in files if file.startswith(f"{name}.") and file.endswith(".so")]
        assert len(built) == 1, name


def test_every_extension_that_python_sees_is_typed(files, repository):
    visible = re.compile(r"^(def|class|cdef class) [a-zA-Z]", re.MULTILINE)
    seen = {name for name, source in modules(repository).items() if visible.search(source.read_text())}
    assert not {name for name in seen if f"{name}.pyi" not in files}


def test_no_source_is_shipped(files):
    assert not [name for name in files if name.endswith((".pyx", ".c")) or name.startswith(("tests", "pyx"))]


def test_metadata(files):
    (name,) = [name for name in files if name.endswith("METADATA")]
    text = files[name].decode()
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Python: >=3.11" in text
    assert [name for name in files if name.endswith("licenses/LICENSE")]


def test_no_path_of_the_build_machine(files, wheel, repository):
    paths = {str(repository), str(wheel.parent), str(Path.home())} - {"/"}
    # With a slash, because root's home is also the name of a file in /proc.
    found = [(name, path) for name, data in files.items() for path in paths if f"{path}/".encode() in data]
    # A Python that the system did not install puts its search path into every extension that it builds.
    own = sysconfig.get_config_var("LDFLAGS") or ""
    assert not [(name, path) for name, path in found if not (name.endswith(".so") and path in own)]


def test_the_version_is_stated_once_more_in_the_package(repository):
    import snapengine

    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    assert snapengine.__version__ == project["version"]

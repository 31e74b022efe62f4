"""Each .pyi matches its compiled module: names, parameters, defaults, attributes."""

import importlib
from pathlib import Path

import pytest
from stubkit import differences

import snapengine

PACKAGE = Path(snapengine.__file__).parent
STUBS = sorted(str(path.relative_to(PACKAGE).with_suffix("")) for path in PACKAGE.rglob("*.pyi"))


@pytest.fixture
def parts(repository):
    """``parts(name)``: the stub's text, the source's, and the module."""

    def read(name):
        stub, source = repository / "snapengine" / f"{name}.pyi", repository / "pyx" / f"{name}.pyx"
        module = importlib.import_module(f"snapengine.{name.replace('/', '.')}")
        return stub.read_text(), source.read_text(), module

    return read


@pytest.mark.parametrize("name", STUBS)
def test_the_stub_is_true(parts, name):
    assert not differences(*parts(name))


@pytest.mark.parametrize(
    ("name", "old", "new", "told"),
    [
        ("base/fileio", "def file_system(", "def file_type(", ["file_system: not", "file_type: only"]),
        ("base/fileio", "path: str", "name: str", ["file_system: "]),
        ("base/checksum", "data: Any, crc: int = 0", "data: Any, crc: int = 1", ["crc32c_of: "]),
        ("base/checksum", "data: Any, crc: int = 0", "data: Any, crc: int", ["crc32c_of: "]),
        ("base/checksum", "KERNELS:", "KERNEL:", ["KERNEL: only", "KERNELS: not"]),
        ("kernel/pagemap", "end: int, *, flags", "end: int, flags", ["scan: "]),
        ("regions", "page_size: int = 4096", "page_size: int = 8192", ["Region(): "]),
        ("regions", "    missing: bool = False\n", "", ["RegionPlan(): ", "RegionPlan.missing: not"]),
        ("pipeline/encoder", "    *,\n", "", ["Encoder(): "]),
        ("engine/session", "rounds: bool = False", "rounds: bool", ["Session(): "]),
        ("engine/session", "    def close(self)", "    def shut(self)",
         ["Session.close: not", "Session.shut: only"]),
        ("engine/tracker", "hold: bool = False", "hold: bool = True", ["Tracker.arm: "]),
        ("storage/fd_writer", "    @staticmethod\n    def detect_mode(", "    def detect_mode(self, ",
         [".detect_mode: it is no such method"]),
        ("base/bitmap", "    @property\n    def pages(self)", "    def pages(self)",
         ["Bitmap.pages: it is no such method"]),
        ("base/bitmap", "    def count(self) -> int: ...", "    count: int", ["Bitmap.count: a method"]),
        ("process/inject", "stop_ns: int\n    tid: int", "tid: int\n    stop_ns: int", ["Injected(): "]),
    ],
)  # fmt: skip
def test_a_planted_difference_is_told(parts, name, old, new, told):
    stub, source, module = parts(name)
    assert old in stub
    found = differences(stub.replace(old, new, 1), source, module)
    assert len(found) == len(told), found
    assert all(start in line for start, line in zip(told, found, strict=True)), found

"""In CI a skipped core test is a failure, no matter how it was skipped."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
CASES = {
    "call": ("def test(): pytest.skip('why')", True),
    "mark": ("@pytest.mark.skip(reason='why')\ndef test(): pass", True),
    "fixture": ("@pytest.fixture\ndef f(): pytest.skip('why')\ndef test(f): pass", True),
    "module": ("pytest.skip('why', allow_module_level=True)", True),
    "optional": ("@pytest.mark.host_optional\ndef test(): pytest.skip('why')\ndef test_2(): pass", False),
    "xfail": ("@pytest.mark.xfail(reason='why')\ndef test(): assert False", False),
    "none": ("def test(): pass", False),
}

WORKERS = ("-n", "2")


def run(tmp_path, source, ci, *options):
    (tmp_path / "conftest.py").write_bytes(CONFTEST.read_bytes())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = host_optional\n")
    (tmp_path / "test_case.py").write_text(f"import pytest\n{source}\n")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, "test_case.py"],
        cwd=tmp_path,
        env=os.environ | {"CI": "true" if ci else ""},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("case", "options"), [*((case, ()) for case in CASES), ("call", WORKERS), ("module", WORKERS)]
)
def test_skips_in_ci(tmp_path, case, options):
    source, fails = CASES[case]
    done = run(tmp_path, source, True, *options)
    assert done.returncode == (1 if fails else 0), done.stdout
    assert ("CI=true does not allow" in done.stdout) is fails
    assert ("why" in done.stdout) is fails


def test_outside_ci_a_skip_is_a_skip(tmp_path):
    assert run(tmp_path, CASES["call"][0], False).returncode == 0

"""What all tests share: no skipped core test in CI, and the fixtures `requires_uffd` and `repository`."""

import os
from pathlib import Path

import pytest

CI = os.environ.get("CI") == "true"
_skipped: list[str] = []


@pytest.fixture(scope="session")
def requires_uffd():
    """Skip (CI: fail) the test where this user may not use userfaultfd; the reason says why."""
    from snapengine import uffd
    from snapengine.errors import SnapengineError

    try:
        uffd.supported_features()
    except SnapengineError as error:
        pytest.skip(f"no userfaultfd here: {error}")


@pytest.fixture(scope="session")
def repository():
    """The source tree, where there is one; the tests also run against an installed wheel without it."""
    root = Path(__file__).parent.parent
    if not (root / "setup.py").exists():
        pytest.skip("needs the source tree")
    return root


def _is_core(report):
    """A report of a skip that CI does not allow. (An expected failure is reported as a skip, too.)"""
    return report.skipped and not hasattr(report, "wasxfail") and "host_optional" not in report.keywords


def pytest_runtest_logreport(report):
    if CI and _is_core(report):
        _skipped.append(f"{report.nodeid}: {report.longrepr[2]}")


def pytest_collectreport(report):
    """A whole module that is skipped while it is imported carries no marker: it counts."""
    if CI and report.skipped:
        _skipped.append(f"{report.nodeid}: {report.longrepr[2]}")


def pytest_sessionfinish(session, exitstatus):
    if _skipped and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    if _skipped:
        terminalreporter.section("core tests were skipped, which CI=true does not allow", red=True)
        for line in _skipped:
            terminalreporter.line(line)

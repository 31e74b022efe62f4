"""Shared by all tests: no skipped core test in CI, `requires_uffd`, and the package as it is shipped."""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

# A shell's background job begins with SIGINT and SIGQUIT ignored, and nohup(1) ignores SIGHUP. Programs that
# the tests start would inherit that and ignore the signals that the tests send.
for _signal, _default in (
    (signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL),
    (signal.SIGHUP, signal.SIG_DFL), (signal.SIGTERM, signal.SIG_DFL),
):  # fmt: skip
    if signal.getsignal(_signal) is signal.SIG_IGN:
        signal.signal(_signal, _default)

# The width of the tests' own output; pytest-xdist sets these for its workers.
os.environ.pop("COLUMNS", None)

CI = os.environ.get("CI") == "true"
_skipped: list[str] = []
_skipped_modules: list[str] = []
_ran_on: set[str] = set()


@pytest.fixture(scope="session")
def requires_uffd():
    """Skip the test (in CI: fail) if this user may not use userfaultfd; the reason says why."""
    from snapengine.errors import SnapengineError
    from snapengine.kernel import uffd

    try:
        uffd.supported_features()
    except SnapengineError as error:
        pytest.skip(f"no userfaultfd here: {error}")


@pytest.fixture(scope="session")
def repository():
    """The source tree; skips without one: the tests also run against an installed wheel alone."""
    root = Path(__file__).parent.parent
    if not (root / "setup.py").exists():
        pytest.skip("needs the source tree")
    return root


@pytest.fixture(scope="session")
def native_bench(repository):
    """Skip if the native modules of the bench are not built."""
    import floorkit

    floorkit.build()


def pytest_collection_modifyitems(config, items):
    """Skip without the negative controls: tests/test_controls.py runs them in a separate build."""
    if os.environ.get("SNAPENGINE_CONTROLS") == "1":
        return
    controls = [item for item in items if "negative_control" in item.keywords]
    if controls:
        config.hook.pytest_deselected(items=controls)
        items[:] = [item for item in items if "negative_control" not in item.keywords]


def _is_core(report):
    """Whether it reports a skip that CI does not allow. (An expected failure is reported as a skip, too.)"""
    return report.skipped and not hasattr(report, "wasxfail") and "host_optional" not in report.keywords


def pytest_runtest_logreport(report):
    if CI and _is_core(report):
        _skipped.append(f"{report.nodeid}: {report.longrepr[2]}")


def pytest_collectreport(report):
    """A module that is skipped while it is imported carries no marker, so it counts."""
    if CI and report.skipped:
        _skipped_modules.append(f"{report.nodeid}: {report.longrepr[2]}")
        _skipped.append(_skipped_modules[-1])


def pytest_sessionfinish(session, exitstatus):
    if (output := getattr(session.config, "workeroutput", None)) is not None:  # a worker of pytest-xdist
        output["snapengine"] = (_skipped_modules, sorted(_ran_on))
    if _skipped and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Collect the data of a worker. (Its test reports arrive separately.)"""
    skipped, ran_on = getattr(node, "workeroutput", {}).get("snapengine", ((), ()))
    _skipped.extend(name for name in skipped if name not in _skipped)
    _ran_on.update(ran_on)


def pytest_terminal_summary(terminalreporter):
    for line in sorted(_ran_on):
        terminalreporter.line(line)
    if _skipped:
        terminalreporter.section("core tests were skipped, which CI=true does not allow", red=True)
        for line in _skipped:
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def wheel(repository, tmp_path_factory):
    """The wheel, built from a copy of the sources: an old build/ must not leak into it.

    The extension modules of the source tree are copied too: a module that is newer than its sources is not
    compiled again, which would take minutes. (`make check-dist` compiles all of them, from the sdist.)
    """
    room = tmp_path_factory.mktemp("wheel")
    source = room / "source"
    products = shutil.ignore_patterns("*.so", "__pycache__")
    for folder in ("snapengine", "pyx"):
        shutil.copytree(repository / folder, source / folder, ignore=products)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy2(repository / name, source / name)
    _copy_products(repository, source)
    pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(room), str(source))
    shutil.rmtree(source)  # later tests must not find it
    (path,) = room.glob("*.whl")
    return path


def _copy_products(repository, copy):
    """Copy the extension module that setuptools would build from each .pyx, with its times."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    built = f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    for source in (repository / "pyx").rglob("*.pyx"):
        module = source.relative_to(repository / "pyx").with_suffix("")
        products = {
            Path("snapengine") / f"{module}{suffix}": Path(built) / "snapengine",
            Path("build/cython/pyx") / f"{module}.c": Path("build/cython/pyx"),
        }
        for product, place in products.items():
            if (repository / product).exists():
                target = copy / place / module.parent / product.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(repository / product, target)


@pytest.fixture(scope="session")
def installed(request, tmp_path_factory):
    """A directory with the installed package and without the source tree.

    If the package under test is an installed one (`make check-dist`), it is that. Otherwise it is the
    `wheel`, installed beside its dependencies.
    """
    if not (Path(__file__).parent.parent / "setup.py").exists():
        import snapengine

        return Path(snapengine.__file__).parent.parent
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--target", str(target), str(request.getfixturevalue("wheel")))
    return target


def pip(*arguments):
    """Run pip; a failure shows its output."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def build_driver(tmp_path_factory):
    """``build_driver(name)``: embed/NAME.pyx, built against the package under test and imported."""

    def build(name):
        import snapengine

        room = tmp_path_factory.mktemp(name)
        shutil.copy2(Path(__file__).parent / "embed" / f"{name}.pyx", room)
        include = snapengine.get_include()
        (room / "setup.py").write_text(
            "from Cython.Build import cythonize\n"
            "from setuptools import Extension, setup\n"
            f"extension = Extension({name!r}, ['{name}.pyx'], include_dirs={include!r})\n"
            f"setup(ext_modules=cythonize([extension], include_path={include!r}, language_level=3))\n"
        )
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        built = subprocess.run(command, cwd=room, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stdout + built.stderr
        (path,) = room.glob(f"{name}.*.so")
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return build


@pytest.fixture
def guest(requires_uffd, tmp_path):
    """``with guest(params, rate=None) as socket``: an embedded guest that hands over its memory there."""
    import contextlib

    from snapengine.guest.process import GuestProcess

    @contextlib.contextmanager
    def start(params, rate=None):
        socket = tmp_path / "guest.sock"
        with GuestProcess(socket, params, rate):
            yield str(socket)

    return start


@pytest.fixture
def hugetlb():
    """``hugetlb(n)``: at least n free 2 MiB hugetlb pages, released after the test."""
    import hugekit

    with contextlib.ExitStack() as stack:
        yield lambda pages: stack.enter_context(hugekit.huge_pages(pages))


@pytest.fixture(scope="session")
def programs():
    """Remove the C programs of targetkit in the end; they are compiled when first used."""
    import targetkit

    yield
    targetkit.remove_programs()


@pytest.fixture
def machines():
    """``machines(guest, accel=...)``: a QEMU machine that does not outlive the test (qemukit.Machines)."""
    import qemukit

    qemu = qemukit.find_qemu()
    if qemu is None:
        pytest.skip("no QEMU: qemu-system-x86_64 is not in PATH, and QEMU is not set")
    _ran_on.add(f"{qemu}: QEMU {'.'.join(map(str, qemukit.qemu_version(qemu)))}")
    with qemukit.Machines() as started:
        yield started


@pytest.fixture(scope="session")
def linux_guest():
    """linuxkit.Linux; skips if Debian's kernel is not available."""
    import guest_kernel
    import linuxkit

    try:
        linuxkit.initramfs()
        _ran_on.add(f"guest: Linux {(guest_kernel.find() / 'release').read_text().strip()}")
    except guest_kernel.NoKernel as error:
        pytest.skip(f"no kernel for the Linux guest: {error}")
    return linuxkit.Linux


@pytest.fixture
def as_root():
    if os.geteuid() != 0:
        pytest.skip("needs root")


def _usable(accel):
    import qemukit

    if accel == "kvm" and not qemukit.kvm_usable():
        pytest.skip("no access to /dev/kvm")
    return accel


@pytest.fixture(params=["tcg", pytest.param("kvm", marks=pytest.mark.host_optional)])
def accel(request):
    """Each accelerator that QEMU can use here. (Only the sweep runs under every KVM.)"""
    return _usable(request.param)


@pytest.fixture
def kvm():
    """KVM; skips if it is not available: QEMU's own dirty logging is exact with KVM only."""
    return _usable("kvm")


@pytest.fixture(params=["write-tracking", pytest.param("dirty-logging", marks=pytest.mark.host_optional)])
def migration(request):
    """(method, accelerator) of each way in which QEMU saves itself."""
    return request.param, _usable("kvm" if request.param == "dirty-logging" else "tcg")

"""The start of a command: what it imports, and the effect of a signal before there is anything to undo."""

import os
import signal
import subprocess
import sys
import time

import pytest
from clikit import COMMAND, imported, run
from streamkit import head as stream_head
from targetkit import Target
from waitkit import PATIENCE_S

SLOW = {"rich", "qemu", "asyncio", "matplotlib", "numpy", "psutil", "logging", "unittest", "http"}
HOOK = """\
import os, sys
class Count:
    left = int(sys.argv.pop(1))
    number = int(sys.argv.pop(1))
    def find_spec(self, name, path=None, target=None):
        Count.left -= 1
        if Count.left == 0:
            os.kill(os.getpid(), Count.number)
from snapengine.cli import main
sys.meta_path.insert(0, Count())
sys.exit(main())
"""


def top(names):
    return {name.partition(".")[0] for name in names}


def ours(names):
    return {name for name in names if name.startswith("snapengine.")}


def test_the_version_costs_a_bare_python():
    code, names = imported("--version")
    assert code == 0
    assert len(names) <= 15, sorted(names)
    rooms = ("cli", "cli.command", "cli.signals", "report", "report.streams")
    assert ours(names) == {f"snapengine.{name}" for name in rooms}


def test_importing_the_package_imports_nothing_else():
    script = "import sys; b = set(sys.modules); import snapengine; print(sorted(set(sys.modules) - b))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert eval(done.stdout) == ["snapengine"]


def test_the_names_of_qemu_are_imported_on_first_use():
    script = (
        "import sys; from snapengine import qemu\n"
        "print(set(dir(qemu)) >= set(qemu.__all__), 'asyncio' in sys.modules)\n"
        "from snapengine.qemu import ingest\n"
        "print(callable(ingest), 'asyncio' in sys.modules)\n"
        "from snapengine.qemu import QemuTarget, restore_machine, save_by_migration\n"
        "print(QemuTarget.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["True False", "True False", "snapengine.qemu.target", ""]


def test_every_public_name_is_there():
    import snapengine

    for name in snapengine.__all__:
        assert getattr(snapengine, name) is not None
    assert set(snapengine.__all__) <= set(dir(snapengine))
    assert snapengine.image.open_image is snapengine.open_image  # a submodule, not imported before
    with pytest.raises(AttributeError, match="no attribute 'snapshoot'"):
        snapengine.snapshoot  # noqa: B018


@pytest.mark.parametrize(
    ("arguments", "most"),
    [
        (["--help"], 60),
        (["save", "--help"], 90),
        (["ingest", "--help"], 90),
        (["verify", "--help"], 90),
        (["qemu", "save", "--help"], 90),
        (["doctor", "--help"], 60),
        (["save"], 90),
    ],
)
def test_help_and_usage_errors_import_no_engine(arguments, most):
    code, names = imported(*arguments)
    assert code == (2 if arguments == ["save"] else 0)
    assert not top(names) & SLOW
    rooms = {name.split(".")[1] for name in ours(names)}
    assert not rooms & {"capture", "engine", "image", "process"}
    assert len(names) <= most, len(names)


def test_each_command_imports_what_it_needs(requires_uffd, programs, tmp_path):
    path, stream = tmp_path / "x.img", tmp_path / "stream"
    stream.write_bytes(stream_head())  # an early end; it imports the whole reading side
    with Target("named", "process", "named") as target:
        code, names = imported("save", "--pid", target.pid, path)
        assert code == 0
        assert not top(names) & SLOW
        assert not [name for name in names if name.startswith(("snapengine.qemu", "snapengine.guest.main"))]
        code, names = imported("doctor", "--pid", target.pid)
        assert code == 0
        assert not top(names) & SLOW
    core = ["export", "--format", "core", path, tmp_path / "core"]
    for arguments in (["info", path], ["verify", path], core):
        code, names = imported(*arguments)
        assert code == 0
        assert not top(names) & SLOW
        slow = {"snapengine.capture.capture", "snapengine.engine.session", "snapengine.qemu.monitor"}
        assert not names & slow
    code, names = imported("ingest", stream, tmp_path / "y.img")
    assert code == 1
    assert "snapengine.qemu.from_stream" in names
    assert not top(names) & SLOW
    assert not names & {"snapengine.capture.capture", "snapengine.engine.session", "snapengine.qemu.monitor"}


@pytest.mark.parametrize("swallowed", [1, 3])
def test_a_signal_that_python_drops_is_raised_again(swallowed):
    """In a destructor an exception does not propagate."""
    from snapengine.cli.common import Interrupted, interruptible

    class Noisy:
        left = swallowed

        def __del__(self):
            Noisy.left -= 1
            if Noisy.left == swallowed - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if Noisy.left >= 0:
                busy_until(lambda: False, 0.05)

    before = signal.getsignal(signal.SIGTERM), sys.unraisablehook
    with pytest.raises(Interrupted) as caught, interruptible():
        busy_until(lambda: Noisy() and False, 60)
    assert caught.value.exit_code == 143
    assert Noisy.left < swallowed
    assert (signal.getsignal(signal.SIGTERM), sys.unraisablehook) == before


def busy_until(condition, seconds):
    """Runs Python code all the time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
@pytest.mark.parametrize("at", [1, 2, 5, 15, 30])
def test_a_signal_during_the_imports_ends_without_a_traceback(tmp_path, at, number):
    command = [sys.executable, "-c", HOOK, str(at), str(number.value), "info", str(tmp_path / "absent")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 128 + number
    assert done.stderr == f"snapengine: cancelled by {number.name}\n"
    assert done.stdout == ""


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    command = [sys.executable, "-c", HOOK, "5", str(signal.SIGHUP.value), "info", str(tmp_path / "absent")]
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=ignore)
    assert done.returncode == 1
    assert "absent" in done.stderr


def test_signals_are_as_before_after_a_command_within_this_process(tmp_path):
    from snapengine.cli import main
    from snapengine.cli.signals import SIGNALS

    before = [signal.getsignal(number) for number in SIGNALS]
    assert main(["info", str(tmp_path / "absent")]) == 1
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with pytest.raises(SystemExit):
        main(["info"])
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_wrong_usage_is_said_in_two_lines():
    wrong = ((), ("fly",), ("save", "x"), ("save", "--pid", "x", "y"), ("qemu",), ("qemu", "save", "x"))
    for arguments in wrong:
        done = run(*arguments)
        assert done.returncode == 2
        lines = done.stderr.decode().splitlines()
        assert len(lines) == 2, lines
        assert "error: " in lines[0]
        assert "--help" in lines[1]


@pytest.mark.parametrize(
    "command",
    ["save", "ingest", "info", "verify", "restore", "export", "guest", "doctor", "demo", "qemu save",
     "qemu restore", "qemu analyze", "completion"],
)  # fmt: skip
def test_the_help_of_every_command_has_its_exit_codes(command):
    done = run(*command.split(), "--help")
    assert done.returncode == 0
    assert b"exit codes:" in done.stdout
    if command.split()[0] not in ("guest", "doctor", "demo", "completion"):
        assert b"124" in done.stdout
        assert b"--timeout SECONDS" in done.stdout


COMPLETE = """
source /dev/stdin
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_shtab_snapengine
printf '%s\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["sa"], ["save"]),
        (["qemu", "re"], ["restore"]),
        (["save", "--cu"], ["--cut"]),
        (["qemu", "save", "--block-s"], ["--block-snapshot"]),
        (["completion", ""], ["bash", "tcsh", "zsh"]),
    ],
)
def test_bash_completes(words, wanted):
    script = run("completion", "bash").stdout
    bash = ["bash", "-c", COMPLETE, "bash", "snapengine", *words]
    done = subprocess.run(bash, input=script, capture_output=True, check=True)
    assert sorted(done.stdout.decode().split()) == wanted, done.stderr


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_complete(shell):
    done = run("completion", shell)
    assert done.returncode == 0
    assert b"snapengine" in done.stdout
    assert b"block-snapshot" in done.stdout or shell == "tcsh"


def test_completion_without_shtab(tmp_path):
    (tmp_path / "shtab.py").write_text("raise ImportError")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([*COMMAND, "completion", "bash"], env=environment, capture_output=True, check=False)
    assert done.returncode == 1
    assert b"pip install 'snapengine[completion]'" in done.stderr

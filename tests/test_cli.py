"""The command line in child processes: output, errors, exit codes, cleanup after a signal."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
from waitkit import PATIENCE_S, until

from snapengine.cli.capture_options import make_options
from snapengine.cli.command import describe, make_parser
from snapengine.cli.save import exit_code
from snapengine.errors import SinkError
from snapengine.options import Options
from snapengine.report.result_table import figures_rows
from snapengine.result import COMPLETED, NOT_CONVERGED, Result

COMMAND = [sys.executable, "-m", "snapengine.cli"]
COMMANDS = ("save", "guest", "info", "verify", "restore", "export", "doctor", "demo")
MIB = 1 << 20


def run(*arguments, **keywords):
    """Run a command to its end. Output is text; an exit code other than 0 raises nothing."""
    keywords = {"capture_output": True, "text": True, "timeout": PATIENCE_S} | keywords
    return subprocess.run([*COMMAND, *map(str, arguments)], check=False, **keywords)


def parse(*arguments):
    return make_parser().parse_args(list(arguments))


def make_result(**figures):
    values = dict.fromkeys((field.name for field in dataclasses.fields(Result)), 0)
    values["stop_parts_ns"] = {}
    fixed = {"method": "write-tracking", "status": COMPLETED, "fault_ns": {"p50": 9000, "p99": 1, "max": 2},
             "lost_runs": [], "warnings": []}  # fmt: skip
    return Result(**(values | fixed | figures))


# --- without any snapshot ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command):
    done = run(command, "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    if command != "guest":
        assert "examples:" in done.stdout
        assert "exit codes:" in done.stdout


def test_version_and_help():
    assert run("--version").stdout.startswith("snapengine ")
    text = run("--help").stdout
    assert all(command in text for command in COMMANDS)
    assert "exit codes:" in text


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((), "COMMAND"),
        (("fly",), "fly"),
        (("save", "x.img"), "--socket"),
        (("save", "--socket", "s", "--memory-limit", "12Q", "x.img"), "12Q"),
        (("save", "--socket", "s", "--memory-limit", "1M", "x.img"), "limit: 1 MiB is less than 16 MiB"),
        (("save", "--socket", "s", "--compress", "zip", "x.img"), "compress"),
        (("save", "--socket", "s", "--vmstate", "dev", "x.img"), "NAME=FILE"),
        (("save", "--socket", "s", "--vmstate", "a=/1", "--vmstate", "a=/2", "x.img"), "twice"),
        (("save", "--socket", "s", "--timeout", "0", "x.img"), "is not a time"),
        (("demo", "--rates", "1,x"), "rates"),
        (("restore", "x.img"), "--output"),
    ],
)
def test_wrong_usage(arguments, word):
    done = run(*arguments)
    assert done.returncode == 2
    assert word in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_options_of_the_command_line():
    text = (
        "save --socket s --method dirty-logging --compress zstd:3 --memory-limit 1.5G --rate-limit 50M "
        "--spill-dir /d --fault-threads 2 --downtime-limit 50ms --max-rounds 4 --max-seconds 9 out"
    )
    args = parse(*text.split())
    assert make_options(args) == Options(
        method="dirty-logging", compress="zstd:3", memory_limit=3 << 29, rate_limit=50 * MIB, spill_dir="/d",
        fault_threads=2, downtime_limit=0.05, max_rounds=4, max_seconds=9.0,
    )  # fmt: skip
    assert make_options(parse("save", "--socket", "s", "out")) == Options()


def test_exit_codes_of_results():
    assert exit_code(make_result()) == 0
    assert exit_code(make_result(status=NOT_CONVERGED)) == 3
    assert exit_code(make_result(lost_pages=1)) == 4


def test_figures_leave_out_what_is_zero():
    names = [name for name, _ in figures_rows(make_result())]
    assert names == ["method", "status", "instant", "image", "memory", "pages", "time", "buffer, peak"]
    rows = dict(figures_rows(make_result(faults=3, stop_ns=5, lost_pages=2, spilled_bytes=4096)))
    assert rows["faults"].startswith("3, served in p50 9.00 µs")
    assert rows["target paused"] == "5 ns"
    parts = dict(figures_rows(make_result(stop_ns=5, stop_parts_ns={"stop": 3, "cont": 2, "guest": 5})))
    assert parts["target paused"] == "5 ns (stop 3 ns, cont 2 ns)"
    assert "spilled" in rows["buffer, peak"]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (FileNotFoundError(2, "No such file or directory", "x.img"), "x.img: No such file or directory"),
        (SinkError(28, "x.img: No space left on device"), "x.img: No space left on device"),
        (ValueError("two\n  lines"), "two lines"),
        (MemoryError(), "internal: MemoryError: (SNAPENGINE_DEBUG=1 shows where)"),
    ],
)
def test_errors_are_one_line(error, text):
    assert describe(error) == text


@pytest.mark.parametrize("command", ["info", "verify", "restore", "export"])
def test_an_image_that_is_not_there(command, tmp_path):
    out = tmp_path / "out"
    more = {"restore": ("-o", out), "export": (out,)}.get(command, ())
    done = run(command, tmp_path / "absent.img", *more)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("snapengine: error: ")
    assert "absent.img" in done.stderr
    assert not out.exists()


@pytest.mark.parametrize("data", [b"", b"no image at all", os.urandom(100_000)])
def test_a_file_that_is_no_image(tmp_path, data):
    path = tmp_path / "x.img"
    path.write_bytes(data)
    for arguments in (("info", path), ("verify", path), ("restore", path, "-o", tmp_path / "out")):
        done = run(*arguments)
        assert done.returncode == 1
        assert done.stderr.startswith(f"snapengine: error: {path}: ")
        assert done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["x.img"]


def test_the_traceback_only_on_demand(tmp_path):
    path = tmp_path / "absent.img"
    done = run("info", path, env=os.environ | {"SNAPENGINE_DEBUG": "1"})
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("snapengine: error: ")


def test_a_reader_of_stdout_that_goes_away_is_no_error():
    # The output may be smaller than the pipe: the read end is closed before the command writes.
    reader, writer = os.pipe()
    os.close(reader)
    done = run("doctor", "--json", capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 141
    assert done.stderr == ""


# --- with a guest -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def guest(socket, *arguments):
    """The embedded guest, which hands over its memory to the engine that listens at `socket`."""
    command = [*COMMAND, "guest", "--socket", str(socket), "--size", "32M", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def socket(requires_uffd, tmp_path):
    return tmp_path / "peer.sock"


@pytest.fixture
def image(socket, tmp_path):
    """An image of a writing guest, with a blob, and the figures of `save --json`."""
    blob = tmp_path / "blob"
    blob.write_bytes(b"state of a device")
    path = tmp_path / "vm.img"
    with guest(socket, "--rate", 2000):
        done = run("save", "--socket", socket, "--json", "--vmstate", f"dev={blob}", path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return path, json.loads(done.stdout)


def test_save_info_verify(image):
    path, figures = image
    assert set(figures) >= {field.name for field in dataclasses.fields(Result)}
    assert figures["status"] == COMPLETED
    assert figures["image_bytes"] == path.stat().st_size
    info = json.loads(run("info", "--json", path).stdout)
    for name in ("pages_saved", "nonzero_bytes", "zero_pages", "method"):
        assert info[name] == figures[name]
    text = run("info", path)
    assert text.returncode == 0
    assert "dev" in text.stdout
    assert run("verify", path).returncode == 0
    assert json.loads(run("verify", "--json", path).stdout)["ok"] is True


def test_from_standard_input(image, tmp_path):
    path, _ = image
    for arguments in (("info", "-"), ("verify", "-")):
        with path.open("rb") as file:
            assert run(*arguments, stdin=file).returncode == 0
        with subprocess.Popen(["cat", path], stdout=subprocess.PIPE) as cat:
            assert run(*arguments, stdin=cat.stdout).returncode == 0


def test_restore_and_export_agree(image, tmp_path):
    path, _ = image
    file, raw = tmp_path / "file", tmp_path / "raw"
    assert run("restore", path, "-o", file).returncode == 0
    assert run("export", path, raw).returncode == 0
    data = file.read_bytes()
    assert len(data) == 32 * MIB
    assert raw.read_bytes() == data
    assert run("restore", path, "-o", "-", text=False).stdout == data
    with subprocess.Popen(["cat", path], stdout=subprocess.PIPE) as cat:
        assert run("restore", "-", "-o", "-", text=False, stdin=cat.stdout).stdout == data


def test_an_unknown_region_is_named(image, tmp_path):
    path, _ = image
    for arguments in (
        ("restore", path, "ram9", "-o", tmp_path / "o"),
        ("export", path, tmp_path / "o", "--region", "ram9"),
    ):
        done = run(*arguments)
        assert done.returncode == 1
        assert "ram9" in done.stderr
        assert not (tmp_path / "o").exists()


def test_a_flipped_bit_is_found(image):
    path, _ = image
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 4]))
    done = run("verify", path)
    assert done.returncode == 1
    assert str(path) in done.stderr
    assert "at byte" in done.stderr


def test_to_standard_output(socket, tmp_path):
    with guest(socket, "--rate", 2000):
        done = run("save", "--socket", socket, "--json", "-", text=False)
    assert done.returncode == 0
    path = tmp_path / "vm.img"
    path.write_bytes(done.stdout)
    assert run("verify", path).returncode == 0
    text = done.stderr.decode()
    assert json.loads(text[text.index("{") :])["image_bytes"] == len(done.stdout)


def test_through_a_command(socket, tmp_path):
    path = tmp_path / "vm.img"
    with guest(socket):
        done = run("save", "--socket", socket, "--quiet", f"exec:cat > {path}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert run("verify", path).returncode == 0


def test_dirty_logging_that_does_not_converge(socket, tmp_path):
    with guest(socket, "--rate", "max"):
        bounds = (
            "--max-rounds",
            3,
            "--rate-limit",
            "16M",
            "--memory-limit",
            "16M",
            "--downtime-limit",
            "10ms",
        )
        save = ("save", "--socket", socket, "--method", "dirty-logging", "--json")
        done = run(*save, *bounds, tmp_path / "vm.img")
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["status"] == NOT_CONVERGED
    assert "did not converge" in done.stderr
    assert not (tmp_path / "vm.img").exists()


def test_no_peer_comes(requires_uffd, tmp_path):
    done = run("save", "--socket", tmp_path / "s", "--peer-timeout", "0.2", tmp_path / "vm.img")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("snapengine: error: ")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
@pytest.mark.parametrize("when", ["waiting", "saving"])
def test_a_signal_cancels_cleanly(socket, tmp_path, number, when):
    images = tmp_path / "images"
    images.mkdir()
    command = [*COMMAND, "save", "--socket", str(socket), "--rate-limit", "256K", str(images / "vm.img")]
    with contextlib.ExitStack() as stack:
        save = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        stack.callback(save.kill)
        until(socket.exists)
        if when == "saving":
            process = stack.enter_context(guest(socket, "--rate", 2000))
            until(lambda: any(file.stat().st_size for file in images.iterdir()))
        save.send_signal(number)
        out, err = save.communicate(timeout=PATIENCE_S)
        assert save.returncode == 128 + number, err
        assert b"Traceback" not in err
        assert out == b""
        assert list(images.iterdir()) == []
        assert not socket.exists()
        if when == "saving":
            assert process.poll() is None, "the guest must run on"

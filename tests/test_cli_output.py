"""The output of the command with closed, full, broken and narrow streams; and where data goes."""

import dataclasses
import fcntl
import json
import mmap
import os
import pty
import re
import struct
import subprocess
import termios

import pytest
from clikit import COMMAND, one_error, run
from image_kit import DATA, HOLE, LOST, noise, sample
from targetkit import Target
from waitkit import PATIENCE_S

from snapengine import AlreadyTrackedError, ProcessTarget, snapshot
from snapengine.image import open_image
from snapengine.image.writer import Writer
from snapengine.kernel.procmaps import Mapping
from snapengine.kernel.uffd import FEATURES, MODE_WP, Uffd
from snapengine.process.record import ProcessRecord
from snapengine.regions import Region
from snapengine.report.result_table import figures_rows
from snapengine.report.tables import columns, fitted, table_lines, wrapped
from snapengine.result import Result, fitted_parts
from snapengine.storage.sinks import FileSink
from snapengine.targets.buffer import BufferTarget

LOCALES = [
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "latin-1"},
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
]
MEMFD = "a cut name: 线"


@pytest.fixture(scope="module")
def target(programs):
    """A process with shared memory, about which every capture warns."""
    with Target("named", "memfd", MEMFD) as target:
        yield target


@pytest.fixture(scope="module")
def image(target, tmp_path_factory):
    """An image of it (stop cut), and the figures."""
    path = tmp_path_factory.mktemp("image") / "x.img"
    with snapshot(ProcessTarget(target.pid, cut="stop"), path) as capture:
        pass
    return path, capture.result


pytestmark = pytest.mark.usefixtures("requires_uffd")


def is_complete(path):
    with open_image(path) as image:
        image.verify()
    return True


# --- streams ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", LOCALES)
def test_no_locale_makes_a_difference(image, target, tmp_path, env):
    path, _ = image
    saved, pid = tmp_path / "y.img", target.pid
    for arguments in (
        ("save", "--pid", pid, saved), ("save", "--pid", pid, "--cut", "stop", "--json", saved),
        ("info", path), ("info", "--json", path), ("verify", path), ("doctor",),
        ("doctor", "--pid", pid, "--all"), ("--help",), ("save", "--help"), ("demo", "--help"),
        ("export", "--format", "core", path, tmp_path / "c"),
    ):  # fmt: skip
        done = run(*arguments, env=env)
        assert done.returncode == 0, done.stderr
        assert not re.search(rb"codec|Traceback|internal:|xb5|202f", done.stdout + done.stderr)
        if "--json" in arguments:
            json.loads(done.stdout)
            assert done.stdout.isascii()
    assert is_complete(saved)


def test_microseconds_in_ascii():
    env = {"PYTHONIOENCODING": "ascii"}
    script = (
        "from snapengine.report import streams; streams.prepare(); print('1.5 µs 10\\u202f000 ÷ 线 \\udce9')"
    )
    done = subprocess.run([COMMAND[0], "-c", script], env=os.environ | env, capture_output=True, check=True)
    assert done.stdout == b"1.5 us 10 000 / \\u7ebf \\udce9\n"


STREAMS = {
    "closed": ">&-", "full disk": ">/dev/full", "closed error": "2>&-", "full error": "2>/dev/full",
    "nothing open": ">&- 2>&- <&-", "nobody reads": "| true", "nobody reads either": "2>&1 | true",
}  # fmt: skip


@pytest.mark.parametrize("redirection", STREAMS)
@pytest.mark.parametrize("more", ["", "--json"])
def test_no_output_makes_a_complete_image_an_error(target, tmp_path, redirection, more):
    path, code = tmp_path / "x.img", tmp_path / "code"
    command = " ".join(COMMAND)
    line = f"{{ {command} save --pid {target.pid} {more} {path}; echo $? > {code}; }} {STREAMS[redirection]}"
    subprocess.run(["sh", "-c", line], capture_output=True, timeout=PATIENCE_S, check=False)
    assert code.read_text() == "0\n"
    assert is_complete(path)


def test_a_pipe_that_is_full_and_does_not_block(target, tmp_path):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, bytes(4096))
    except BlockingIOError:
        pass
    path = tmp_path / "x.img"
    streams = {"capture_output": False, "stdout": writer, "stderr": subprocess.PIPE}
    done = run("save", "--pid", target.pid, path, **streams)
    os.close(reader)
    os.close(writer)
    assert done.returncode == 0, done.stderr
    assert is_complete(path)


def test_an_image_is_not_written_into_a_closed_output(target):
    line = f"{' '.join(COMMAND)} save --pid {target.pid} - >&-"
    done = subprocess.run(["sh", "-c", line], capture_output=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 1
    one_error(done, "standard output is closed")


def test_a_reader_that_has_seen_enough(image):
    path, _ = image
    reader, writer = os.pipe()
    os.close(reader)
    for arguments in (("info", path), ("info", "--json", path), ("export", path, "-"), ("--version",)):
        done = run(*arguments, capture_output=False, stdout=writer, stderr=subprocess.PIPE)
        assert (done.returncode, done.stderr) == (141, b"")
    os.close(writer)


def test_quiet_prints_nothing(target, tmp_path):
    assert b"warning" in run("save", "--pid", target.pid, tmp_path / "x.img").stderr
    done = run("save", "--pid", target.pid, "--quiet", tmp_path / "x.img")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    done = run("save", "--pid", target.pid, "--quiet", tmp_path)
    assert done.returncode == 1
    one_error(done, "is a directory")


# --- tables ------------------------------------------------------------------------------------------------


def test_tables_fit_and_nothing_is_cut():
    rows = [("a" * 30, "12\u202f345", "words " * 20), (), ("b\x1b[31m", "1", "线" * 30)]
    for width in (200, 80, 40, 24, 10):
        lines = table_lines(rows, ("one", "two", "three"), [1], width)
        assert max(map(columns, lines)) <= width
        text = "".join("".join(line.split()) for line in lines)
        assert text.count("a") == 30
        assert text.count("线") == 30
        assert "\x1b" not in text
    assert fitted([30, 5, 100], 80) == [30, 5, 41]
    assert fitted([100, 100], 80) == [39, 39]
    assert fitted([3, 4], 80) == [3, 4]
    assert wrapped("one two three", 7) == ["one two", "three"]
    assert wrapped("", 5) == [""]
    assert table_lines([("a", "b"), ("cc", "d")], (), [], None) == ["a   b", "cc  d"]


@pytest.mark.parametrize("width", [60, 80, 132])
def test_every_table_fits_the_terminal(image, target, width):
    path, _ = image
    for arguments in (("info", path), ("doctor",), ("doctor", "--pid", target.pid, "--all")):
        done = run(*arguments, env={"COLUMNS": str(width)})
        rows = done.stdout.decode().splitlines()
        assert done.returncode == 0
        assert max(map(columns, rows)) <= width
        assert len(rows) > 5


def test_the_width_of_a_real_terminal(image, monkeypatch):
    path, _ = image
    monkeypatch.delenv("COLUMNS", raising=False)
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 50, 0, 0))
    try:
        env = dict(os.environ)  # readline sets COLUMNS in the C library's environment
        with subprocess.Popen([*COMMAND, "info", path], stdout=terminal, env=env) as shown:
            os.close(terminal)
            text = read_all(master)
        assert shown.returncode == 0
    finally:
        os.close(master)
    lines = text.decode().splitlines()
    assert max(map(columns, lines)) <= 50, lines


def read_all(master):
    """The output on a terminal until its last user has closed it (then reading fails with EIO)."""
    text = b""
    while True:
        try:
            text += os.read(master, 65536)
        except OSError:
            return text


def test_doctor_of_a_process_says_first_what_it_comes_to(target):
    done = run("doctor", "--pid", target.pid)
    lines = done.stdout.decode().splitlines()
    assert lines[0].startswith(f"process {target.pid} (named), ")
    assert lines[1].startswith("image: at most ")
    everything = run("doctor", "--pid", target.pid, "--all").stdout.decode().splitlines()
    count = sum(re.match(r"[0-9a-f]+-[0-9a-f]+ ", line) is not None for line in everything)
    with open(f"/proc/{target.pid}/maps", "rb") as maps:
        assert count == len(maps.read().splitlines())
    shown = sum(re.match(r"[0-9a-f]+-[0-9a-f]+ ", line) is not None for line in lines)
    assert shown == min(count, 20)
    assert count <= 20 or f"and {count - 20} mappings more" in lines[-1]


def test_parts_are_never_larger_than_the_whole():
    parts = {"stop": 188, "device_state": 20, "arm": 4, "cont": 2, "guest": 25}
    fitting = fitted_parts(parts, 25)
    assert fitting == {"stop": 0, "device_state": 20, "arm": 4, "cont": 1, "guest": 25}
    assert fitted_parts({"stop": 3, "cont": 2}, 9) == {"stop": 3, "cont": 2}
    assert sum(ns for name, ns in fitted_parts({"a": 50, "stop": 9}, 20).items()) == 20
    values = {"method": "write-tracking", "status": "completed", "fault_ns": {}, "stop_parts_ns": parts}
    numbers = dict.fromkeys(
        (f.name for f in dataclasses.fields(Result) if f.name not in values and f.type == "int"), 0
    )
    rows = dict(figures_rows(Result(**values, **numbers | {"stop_ns": 25})))
    assert rows["target paused"] == "25 ns (stop 0 ns, device_state 20 ns, arm 4 ns, cont 1 ns)"


# --- texts -------------------------------------------------------------------------------------------------


def test_messages_name_the_option():
    for option, value, words in (
        ("--memory-limit", "4M", ("--memory-limit", "4 MiB", "16 MiB")),
        ("--rate-limit", "10", ("10 bytes", "10M")), ("--regions", "nix", ("--regions", "nix")),
        ("--compress", "zstd:99", ("--compress", "22")), ("--max-rounds", "0", ("--max-rounds", "positive")),
        ("--fault-threads", "99", ("--fault-threads", "64")),
    ):  # fmt: skip
        done = run("save", "--pid", "1", option, value, "x")
        assert done.returncode == 2
        first = done.stderr.decode().splitlines()[0]
        assert all(word in first for word in words), first
        assert "_" not in first


def test_the_null_sink_and_the_way_around_userfaultfd_are_documented():
    text = run("save", "--help").stdout.decode()
    assert "null:" in text
    assert "userfaultfd itself" in text


def test_memory_that_another_tracks_is_named_with_the_way_around_it():
    memory = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    (region,) = BufferTarget(memory).open(0)[2]
    uffd = Uffd(FEATURES["PAGEFAULT_FLAG_WP"])
    try:
        uffd.register(region.addr, 1 << 20, MODE_WP)
        with pytest.raises(AlreadyTrackedError, match=f"{region.addr:x}-.*already being tracked"):
            snapshot(memory, "null:").start()
    finally:
        uffd.close()


# --- data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["raw", "core"])
def test_export_goes_where_save_goes(image, tmp_path, form):
    path, _ = image
    file = tmp_path / "file"
    assert run("export", "--format", form, path, file).returncode == 0
    data = file.read_bytes()
    done = run("export", "--format", form, path, "-")
    assert done.returncode == 0, done.stderr
    assert done.stdout == data
    out = tmp_path / "out"
    with out.open("wb") as opened:
        opened.write(b"before")
        opened.flush()
        fd = opened.fileno()
        assert run("export", "--format", form, path, f"fd:{fd}", pass_fds=[fd]).returncode == 0
    assert out.read_bytes() == b"before" + data
    assert run("export", "--format", form, path, f"exec:cat > {out}").returncode == 0
    assert out.read_bytes() == data
    assert not [name for name in os.listdir() if name in ("-", "fd:1")]
    for left in tmp_path.iterdir():
        assert left in (file, out)


def test_restore_goes_there_too(image, tmp_path):
    path, _ = image
    with open_image(path) as opened:
        region = opened.regions[0]
        data = opened.read(region, 0, region.length)
    out = tmp_path / "out"
    assert run("restore", path, region.name, "-o", "-").stdout == data
    assert run("restore", path, region.name, "-o", f"exec:cat > {out}").returncode == 0
    assert out.read_bytes() == data


def test_nothing_is_left_of_an_export_that_is_refused(image, tmp_path):
    no_process = tmp_path / "no.img"
    no_process.write_bytes(sample().data)
    done = run("export", "--format", "core", no_process, tmp_path / "core")
    assert done.returncode == 1
    one_error(done, "process record")
    assert os.listdir(tmp_path) == ["no.img"]


def test_lost_pages_name_the_option_that_leaves_them_out(tmp_path):
    path = tmp_path / "x.img"
    save_with_a_lost_page(path)
    done = run("export", "--format", "core", path, tmp_path / "core")
    assert done.returncode == 1
    one_error(done, "lost", "--lost omit")
    done = run("export", "--format", "core", "--lost", "omit", path, tmp_path / "core")
    assert done.returncode == 0
    assert b"left out: 4.00 KiB" in done.stderr


@pytest.mark.parametrize("command", [("export",), ("restore", "-o")])
def test_lost_pages_as_zeros(tmp_path, command):
    path, out = tmp_path / "x.img", tmp_path / "raw"
    save_with_a_lost_page(path)
    arguments = [command[0], path, *command[1:], out]
    done = run(*arguments)
    assert done.returncode == 1
    one_error(done, "lost", "--lost zero")
    assert not out.exists()
    done = run(*arguments, "--lost", "zero")
    assert done.returncode == 0
    assert b"warning: 1 page that was lost at capture time reads as zeros" in done.stderr
    assert out.read_bytes() == noise(1, 3) + bytes(8192)


@pytest.mark.parametrize(("form", "lost"), [("raw", "omit"), ("core", "zero")])
def test_what_a_format_cannot_do_with_lost_pages(tmp_path, form, lost):
    done = run("export", "--format", form, "--lost", lost, tmp_path / "none", tmp_path / "out")
    assert done.returncode == 2
    assert f"--lost {lost} goes with --format".encode() in done.stderr


def save_with_a_lost_page(path):
    sink = FileSink(path)
    writer = Writer(sink)
    writer.begin([(Region("m", 0x10000, 3 * 4096), 0)])
    writer.py_chunk([(0, 1, DATA), (1, 1, LOST), (2, 1, HOLE)], noise(1, 3))
    mappings = [Mapping(0x10000, 0x13000, "rw-p", 0, "00:00", 0, "")]
    record = ProcessRecord(1, 1, 0, 0, "x", [], "", "soft", mappings)
    for name, blob in record.to_vmstate().items():
        writer.vmstate(name, blob)
    writer.finish({})
    sink.commit()

"""Programs that were not written for these tests: each runs under load, is saved, and must not be harmed."""

import contextlib
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from patientkit import ProcessTarget
from process_kit import gdb
from targetkit import descriptors, state_of, status_line
from waitkit import PATIENCE_S, attempts, until

import snapengine
from snapengine.export.elf_core import export_core
from snapengine.image import open_image
from snapengine.options import Options
from snapengine.process.record import process_of
from snapengine.process.target import APPEARED

SNAPSHOTS = int(os.environ.get("REAL_SNAPSHOTS", "1"))  # per program and mode; `make test-real` takes more
ALL = bool(os.environ.get("REAL_ALL"))
MODES = ["soft", "stop", "dirty"]
SUPERVISOR = Path(__file__).with_name("supervise.py")
LIMIT_S = 1800
TROUBLE = ("Cannot access memory", "not a core dump", "internal-error", "rror in ", "Couldn't find")
TORN = "Backtrace stopped"  # also for code that was generated at run time, which gdb does not know
summary: list[str] = []  # lines for the end of the run


def find(program):
    """The path of a program, even one outside a user's PATH; None if it is not installed."""
    places = sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)
    return shutil.which(program, path=os.pathsep.join([os.environ["PATH"], "/usr/sbin", *places]))


def need(*programs):
    """The paths of these programs; skip if one is not installed."""
    for program in programs:
        if find(program) is None:
            pytest.skip(f"{program} is not installed")
    return [find(program) for program in programs]


def need_all(what):
    """Skip, except in `make test-real`."""
    if not ALL:
        pytest.skip(f"{what}: only in `make test-real`")


@contextlib.contextmanager
def room():
    """A directory with a short path that every user may enter."""
    path = Path(tempfile.mkdtemp(prefix="real-"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path)


class Running:
    """``with Running(command, log) as running``: the command under tests/supervise.py; `pid` is its own."""

    def __init__(self, command, log, **popen):
        self.command = [str(word) for word in command]
        self.log = Path(log)
        with self.log.open("wb") as file:
            self._supervisor = subprocess.Popen(
                [sys.executable, str(SUPERVISOR), str(LIMIT_S), *self.command],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, start_new_session=True, **popen,
            )  # fmt: skip
        self.pid = int(self._supervisor.stdout.readline())

    def said(self):
        """All output of the command."""
        return self.log.read_text(errors="replace")

    def ended(self):
        return state_of(self.pid) in ("", "Z", "X")

    def until(self, condition, what):
        """The first true value; AssertionError, with the command's output, if it ends or takes too long."""

        def look():
            value = condition()
            assert value or not self.ended(), f"{self.command[0]} ended: {self.said()[-2000:]}"
            return value

        return until(look, lambda: f"{what}: {self.said()[-2000:]}")

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self._supervisor.stdin.close()
        self._supervisor.wait()
        self._supervisor.stdout.close()


def children(pid):
    """The ids of its living child processes."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Load(threading.Thread):
    """Calls ``step(number)`` with 0, 1, 2, ... in a loop; `done` is the last number that succeeded."""

    def __init__(self, step):
        super().__init__()
        self.done = -1
        self.failure = None
        self._step = step
        self._ends = threading.Event()

    def run(self):
        try:
            for number in range(1 << 62):
                if self._ends.is_set():
                    return
                self._step(number)
                self.done = number
        except BaseException as error:
            self.failure = error

    def check(self, more=100):
        """There was no failure, and the load makes progress."""
        wanted = self.done + more
        until(lambda: self.done >= wanted or self.failure, "the load is stuck")
        assert self.failure is None, repr(self.failure)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc_info):
        self._ends.set()
        self.join()


def snapshot(pid, path, mode):
    """One snapshot of the process; the result."""
    method = "dirty-logging" if mode == "dirty" else "write-tracking"
    target = ProcessTarget(pid, cut="soft" if mode == "soft" else "stop", method=method)
    with snapengine.snapshot(target, path, Options(method=method)) as capture:
        pass
    return capture.result


def save_under_load(pid, mode, folder, *, check, discards=False, busy=lambda: None):
    """SNAPSHOTS of a process under load, each one verified.

    ``check(path, take)`` checks the content of the image that ``take()`` has made. `discards`: the program
    returns memory to the kernel while it runs, so pages may be lost; never shared ones. ``busy()`` returns
    when there was no failure and the program made progress.
    """
    before = set(descriptors(pid))
    results = []
    for _ in range(SNAPSHOTS):
        busy()
        path = folder / "image"
        results.append(check(path, lambda path=path: snapshot(pid, path, mode)))
        with open_image(path) as image:
            image.verify()
            check_lost(image, results[-1], discards)
    busy()
    check_left_alone(pid, before)
    verified = subprocess.run(
        [sys.executable, "-m", "snapengine.cli", "verify", str(folder / "image")],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert verified.returncode == 0, verified.stderr
    note(pid, mode, results)


def check_lost(image, result, discards):
    """Only private memory may be lost, and only of a program that returns memory to the kernel."""
    assert result.status == "completed"
    assert discards or result.lost_pages == 0, f"{result.lost_pages} lost pages: {result.lost_runs[:5]}"
    shared = [(m.start, m.end) for m in process_of(image).mappings if m.perms[3] == "s"]
    for addr, length in result.lost_runs:
        assert not any(start < addr + length and addr < end for start, end in shared), f"{addr:#x}: shared"


def check_left_alone(pid, before):
    """The target has no descriptor, mapping or tracer of ours."""
    until(lambda: status_line(pid, "TracerPid") == "0", "it is still traced")
    assert not [name for name in descriptors(pid).values() if "userfaultfd" in name]
    assert state_of(pid) in ("R", "S", "D")
    assert before & {"0", "1", "2"} <= set(descriptors(pid))


def note(pid, mode, results):
    """A line for the end of the run."""
    name = Path(f"/proc/{pid}/comm").read_text().strip()
    lost = sorted(result.lost_pages for result in results)
    stops = sorted(result.stop_ns / 1e6 for result in results)
    stood = f", stopped {stops[0]:.0f} … {stops[-1]:.0f} ms" if stops[-1] else ""
    summary.append(f"{name}, {mode}: {len(results)} snapshots, {lost[0]} … {lost[-1]} pages lost{stood}")


def check_core(path, program, folder, made_code=False):
    """The stop cut as a core in gdb: every thread, and the frames of the main thread. With `made_code` the
    backtrace need not be complete."""
    core = folder / "core"
    with open_image(path) as image:
        threads = process_of(image).threads
        export_core(image, core, lost="omit")
    text = gdb(program, core, "info threads", "thread 1", "backtrace")
    core.unlink()
    assert len(re.findall(r"^[* ] +\d+ +.*(?:LWP|Thread)", text, re.MULTILINE)) == len(threads), text
    # gdb shows no callers of main, and a Go program may have been in main itself.
    assert re.search(r"^#1 +\w|^#0 +(0x\w+ in )?main\.main \(", text, re.MULTILINE), text
    assert not any(words in text for words in TROUBLE), text
    assert made_code or TORN not in text, text


def memory_of(path):
    """The bytes of each run of data in the image."""
    with open_image(path) as image:
        for region in image.regions:
            for start, length, kind in image.runs(region):
                if kind == "data":
                    yield image.read(region, start, length)


def all_of_it(take):
    """Take snapshots until the program maps no memory during one: such memory is not in the image, and the
    result names it.

    Heaps grow, and dirty logging begins long before its T.
    """
    for _ in attempts("the program maps memory all the time"):
        result = take()
        if not any(item["reason"] == APPEARED for item in result.not_captured):
            break
    return result


# Values that one client sends in order


def sequence_in(path):
    """The numbers N of all texts VALN in the image."""
    found = set()
    for data in memory_of(path):
        found.update(int(text) for text in re.findall(rb"VAL(\d{8})", data))
    return found


def check_sequence(path, take, load):
    """The image holds the values that one client sent in order, up to one of them and none after it."""
    low = load.done
    result = all_of_it(take)
    high = load.done + 1
    found = sequence_in(path)
    last = max(found)
    missing = sorted(set(range(last + 1)) - found)
    assert not missing, f"of {last + 1} values {len(missing)} are missing: {missing[:10]} ... {missing[-10:]}"
    assert low <= last <= high
    return result


# Two counters that a program increments in turn


def pairs_in(path, marks):
    """The 64-bit words (first, second) behind the two marks, at all places of the image that have them."""
    wanted = struct.pack("<QQ", *marks)
    found = []
    for data in memory_of(path):
        at = data.find(wanted)
        while at >= 0:
            found.append(struct.unpack_from("<QQ", data, at + 16))
            at = data.find(wanted, at + 8)
    return found


def check_pair(path, take, marks, newest):
    """The second counter equals the first or is one less, and both are from the time of the snapshot.

    ``newest()``: the second counter as the program last printed it.
    """
    low = newest()
    result = all_of_it(take)
    for _ in range(2):  # the first line after the snapshot may have been printed before it
        said = newest()
        until(lambda said=said: newest() > said, "the program does not print its counter")
    found = [pair for pair in pairs_in(path, marks) if pair[1] >= low]
    assert found, f"no counters of at least {low}: {pairs_in(path, marks)}"
    for first, second in found:
        assert second in (first, first - 1), f"{first} and {second}: not of one instant"
        assert second <= newest()
    return result


class Counting(Running):
    """A program of tests/real/programs: it keeps checking its own data, and prints its counter."""

    def __init__(self, command, log, **popen):
        self.marks = struct.unpack("<QQ", os.urandom(16))
        super().__init__([*command, *map(str, self.marks)], log, **popen)
        self.until(lambda: self.newest() > 1000, "it does not count")

    def newest(self):
        """Its second counter, as last printed."""
        said = self.said()
        assert "FAIL" not in said, said[-2000:]
        found = re.findall(r"^at (\d+)\n", said[-2000:], re.MULTILINE)
        return int(found[-1]) if found else -1

    def check(self):
        """It has found no damage of its data, and makes progress."""
        before = self.newest()
        self.until(lambda: self.newest() > before, "it makes no progress")

    def save(self, mode, folder, discards):
        def check(path, take):
            return check_pair(path, take, self.marks, self.newest)

        save_under_load(self.pid, mode, folder, check=check, discards=discards, busy=self.check)

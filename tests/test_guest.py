"""The embedded guest as a process: hand-over, controls, engines that end, parents that end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import hugekit
import pytest
from hugekit import huge_pages
from patientkit import PeerTarget

from snapengine.errors import HandoverError, SnapengineError, TargetGoneError
from snapengine.guest.main import GuestProcess, check_image, main
from snapengine.guest.params import GuestParams
from snapengine.handover.listener import Listener

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from minimal_engine import MinimalEngine, MinimalImage  # noqa: E402
from waitkit import PATIENCE_S, attempts, until  # noqa: E402

MIB = 1 << 20
SIZE = 16 * MIB
PYTHON = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def alive(pid: int) -> bool:
    """Whether the process runs and is not a zombie."""
    return state_of(Path(f"/proc/{pid}")) not in ("", "Z", "X")


def state_of(task: Path) -> str:
    """The state letter of a process or thread (proc(5)); "" if it is gone."""
    try:
        return (task / "stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def links(pid: int) -> list[str]:
    """The files that the process has open."""
    found = []
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(entry.path))
    return found


def writes(guest: GuestProcess) -> int:
    total: int = sum(guest.stats()["writes"])
    return total


def moves(guest: GuestProcess) -> None:
    """Wait until the writers have written more."""
    before = writes(guest)
    until(lambda: writes(guest) > before)


def stand(guest: GuestProcess) -> None:
    """Wait until all writers wait in faults: they never sleep otherwise, and no other thread has work now."""
    tasks = Path(f"/proc/{guest.pid}/task")

    def asleep() -> bool:
        return all(state_of(task) == "S" for task in tasks.iterdir())

    until(asleep, "a writer runs")


@contextlib.contextmanager
def closing(engine: MinimalEngine, status: str = "failed") -> Iterator[MinimalEngine]:
    try:
        yield engine
    finally:
        engine.close(status)


@contextlib.contextmanager
def engine_process(path: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """An engine that holds the guest protected (or paused) until it is killed."""
    with subprocess.Popen(
        [sys.executable, str(HERE / "minimal_engine.py"), str(path), *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=PYTHON,
    ) as engine:  # fmt: skip
        try:
            assert engine.stdout is not None
            assert engine.stdout.readline() == "armed\n"
            yield engine
        finally:
            engine.kill()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "engine.sock"


@pytest.fixture
def guest(path: Path) -> Iterator[GuestProcess]:
    with GuestProcess(path, GuestParams(size=SIZE, threads=2, zero_percent=20, hole_percent=20)) as guest:
        yield guest


def test_life_cycle(path: Path) -> None:
    with GuestProcess(path, GuestParams(size=SIZE, threads=3), rate=None) as guest:
        assert alive(guest.pid)
        moves(guest)
        stats = guest.stats()
        assert stats["pid"] == guest.pid
        assert len(stats["writes"]) == 3
        assert stats["handovers"] == 0
        assert not stats["paused"]
        until(lambda: len(guest.bins()) > 3)
        bins = guest.bins()
        assert guest.bins(bins[2][0])[0][0] == bins[2][0]
        last = guest.close()
        assert sum(last["writes"]) >= sum(stats["writes"])
        assert not alive(guest.pid)
        assert guest.close() == {}
        with pytest.raises(SnapengineError, match="closed"):
            guest.stats()


def test_the_child_imports_the_same_package(guest: GuestProcess) -> None:
    environment = Path(f"/proc/{guest.pid}/environ").read_bytes().split(b"\0")
    (path,) = [entry for entry in environment if entry.startswith(b"PYTHONPATH=")]
    first = path.removeprefix(b"PYTHONPATH=").split(b":")[0].decode()
    assert (Path(first) / "snapengine/__init__.py").is_file()


def test_hand_over_and_controls(path: Path, guest: GuestProcess) -> None:
    target = PeerTarget(path)
    pid, uffd, (region,) = target.open(1)
    os.close(uffd)
    assert pid == guest.pid
    assert (region.name, region.length, region.kind, region.memfd) == ("ram", SIZE, "anon", -1)
    assert target.can_pause
    target.pause()
    counts = guest.stats()["writes"]
    state = json.loads(target.vmstate()["guest"])
    assert state["writes"] == counts
    assert state["paused"]
    assert GuestParams.from_json(state["params"]) == guest.params
    for _ in range(50):
        assert target.stats()["writes"] == counts
    bins = guest.bins()
    target.resume()
    moves(guest)
    assert sum(count for _, count in guest.bins()) > sum(count for _, count in bins)
    target.close("completed")
    until(lambda: guest.stats()["ended"] == {"completed": 1})
    assert guest.stats()["handovers"] == 1


def test_guest_keeps_no_copy_of_the_uffd(path: Path, guest: GuestProcess) -> None:
    with closing(MinimalEngine(path)):
        until(lambda: not [link for link in links(guest.pid) if "userfaultfd" in link])


@pytest.mark.parametrize("backing", ["anon", "memfd"])
@pytest.mark.parametrize("pages", ["4k", "thp", "2m"])
def test_cut_of_a_running_guest_is_consistent(path: Path, backing: str, pages: str) -> None:
    with huge_pages(SIZE // (2 * MIB)) if pages == "2m" else contextlib.nullcontext():
        params = GuestParams(
            size=SIZE, backing=backing, pages=pages, threads=3, zero_percent=20, hole_percent=25
        )
        with GuestProcess(path, params) as guest:
            for _ in range(3):
                until(lambda: min(guest.stats()["writes"]) > 0)
                with closing(MinimalEngine(path), "completed") as engine:
                    engine.protect()
                    image = engine.copy()
                    engine.protect(False)
                report = check_image(image)
                assert report.consistent, report.violation
                assert min(report.writes) > 0
            moves(guest)


def test_copy_without_protection_is_not_a_cut(path: Path, guest: GuestProcess) -> None:
    for _ in attempts("copies of memory under its writers are consistent"):
        moves(guest)
        with closing(MinimalEngine(path)) as engine:
            image = engine.copy()
        if not check_image(image).consistent:
            break


def test_paused_cut_is_exact(path: Path, guest: GuestProcess) -> None:
    with closing(MinimalEngine(path)) as engine:
        engine.target.pause()
        image = engine.copy()
        assert check_image(image).consistent
        engine.target.resume()
        moves(guest)
        engine.target.pause()
        late = MinimalImage(image.regions, engine.target.vmstate(), image.data)
        assert "the guest was paused after" in str(check_image(late).violation)


def test_check_image_prefers_restore_into(path: Path, guest: GuestProcess) -> None:
    with closing(MinimalEngine(path)) as engine:
        engine.target.pause()
        image = engine.copy()
    calls = []

    class Restoring(MinimalImage):
        def restore_into(self, region: Any, buffer: Any) -> None:
            calls.append(region.name)
            buffer[:] = self.data[region.name]

    assert check_image(Restoring(image.regions, image.vmstate, image.data)).consistent
    assert calls == ["ram"]


def test_check_image_refuses_other_images() -> None:
    with pytest.raises(ValueError, match="no vmstate 'guest'"):
        check_image(MinimalImage([], {}))
    state = json.dumps({"params": GuestParams(size=MIB).to_json(), "writes": [0], "paused": True})
    with pytest.raises(ValueError, match="no region 'ram'"):
        check_image(MinimalImage([], {"guest": state.encode()}))


def test_guest_answers_while_its_writers_stand_in_faults(path: Path, guest: GuestProcess) -> None:
    with closing(MinimalEngine(path)) as engine:
        engine.protect()
        stand(guest)
        counts = guest.stats()["writes"]
        with pytest.raises(SnapengineError, match="a writer did not pause within 4 s"):
            guest.pause()
        assert guest.stats()["writes"] == counts
        engine.protect(False)
        moves(guest)
    stalls = guest.stats()["stalls"]
    assert stalls["max_ns"] > 3_000_000_000
    assert stalls["count"] >= 2


def test_engine_killed_while_memory_is_protected(path: Path, guest: GuestProcess) -> None:
    for rounds in range(1, 4):
        with engine_process(path) as engine:
            stand(guest)
            engine.kill()
            engine.wait()
            moves(guest)
        until(lambda rounds=rounds: guest.stats()["ended"] == {"lost": rounds})
    with closing(MinimalEngine(path)) as engine:
        engine.protect()
        assert check_image(engine.copy()).consistent


def test_engine_killed_while_the_guest_is_paused(path: Path, guest: GuestProcess) -> None:
    with engine_process(path, "pause") as engine:
        assert guest.stats()["paused"]
        engine.kill()
        engine.wait()
        moves(guest)


def test_engines_that_come_and_go(path: Path, guest: GuestProcess) -> None:
    for _ in range(20):
        target = PeerTarget(path)
        _, uffd, _ = target.open(1)
        os.close(uffd)
        target.close("cancelled")
    until(lambda: guest.stats()["ended"] == {"cancelled": 20})
    assert len(links(guest.pid)) < 16


def test_guest_killed_during_a_hand_over(path: Path, guest: GuestProcess) -> None:
    with closing(MinimalEngine(path)) as engine:
        guest.kill()
        with pytest.raises(TargetGoneError, match=f"process {guest.pid}"):
            engine.target.pause()


def test_sigterm_while_writers_stand_in_faults(path: Path, guest: GuestProcess) -> None:
    with closing(MinimalEngine(path)) as engine:
        engine.protect()
        os.kill(guest.pid, signal.SIGTERM)
        until(lambda: not alive(guest.pid))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_it_with_its_counters(path: Path, number: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "snapengine.guest", f"--socket={path}", "--size=4M", "--rate=max"],
        stdout=subprocess.PIPE, text=True, env=PYTHON,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first == f"guest {process.pid}: 4 MiB; engines: {path}\n"
        process.send_signal(number)
        assert process.stdout.readline().startswith(f"guest {process.pid}: ")
        assert process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize("stdin", ["pipe", "null"])
def test_end_of_the_parent(path: Path, stdin: str) -> None:
    """It notices by the end of the pipe; without a pipe, by the signal."""
    stdio = ", '--stdio'" if stdin == "pipe" else ""
    where = "PIPE" if stdin == "pipe" else "DEVNULL"
    code = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-m", "snapengine.guest", "--socket={path}", "--size=4M"{stdio}],
                         stdin=subprocess.{where}, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=PYTHON
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert alive(child)
        parent.kill()
        parent.wait()
        until(lambda: not alive(child))


def test_guest_outlives_the_thread_that_started_it(path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        guest = pool.submit(GuestProcess, path, GuestParams(size=SIZE)).result(PATIENCE_S)
    with guest:
        moves(guest)
        assert guest.stats()["pid"] == guest.pid


@pytest.mark.parametrize(
    "greeting",
    [b"[]", b"{}", b"x", b'{"features": -1}', b'{"features": "1"}', b'{"features": 1e3}', b"a" * 99999],
)
def test_strange_engine(path: Path, guest: GuestProcess, greeting: bytes) -> None:
    """The guest drops it and keeps waiting for a valid one."""
    listener = Listener(path)
    sock = listener.accept(time.monotonic() + PATIENCE_S)
    listener.close()
    assert sock is not None
    with sock, contextlib.suppress(ConnectionError):
        sock.sendall(greeting + b"\n")
        assert sock.recv(1) == b""
    with closing(MinimalEngine(path)) as engine:
        assert engine.pid == guest.pid


@pytest.mark.parametrize("line", ["[]", "{}", "x", '{"cmd": 1}', '{"cmd": "bins", "since_ns": 1e400}',
                                  '{"cmd": "bins", "since_ns": 99999999999999999999999}'])  # fmt: skip
def test_strange_commands(path: Path, line: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "snapengine.guest", f"--socket={path}", "--size=1M", "--stdio", "--json"],
        input=f'{line}\n{{"cmd": "stats"}}\n', capture_output=True, text=True, env=PYTHON, timeout=PATIENCE_S,
    )  # fmt: skip
    ready, answer, stats, final = map(json.loads, run.stdout.splitlines())
    assert ready["ready"]
    assert not answer["ok"]
    assert answer["error"]
    assert stats["ok"]
    assert final["writes"]
    assert run.returncode == 0


def test_duration_and_json(path: Path) -> None:
    began = time.monotonic()
    run = subprocess.run(
        [
            sys.executable, "-m", "snapengine.guest", f"--socket={path}", "--size=4M", "--rate=2000",
            "--threads=2", "--pattern=hot", "--hot-size=1M", "--duration=0.3", "--json",
        ],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, env=PYTHON, timeout=PATIENCE_S,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    stats = json.loads(run.stdout)
    assert 0 < sum(stats["writes"]) <= 2000 * (time.monotonic() - began)
    assert stats["handovers"] == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--size=5000"], "size: 5000 is not a positive multiple of 4096"),
        (["--pattern=hot"], "hot_size: must be"),
        (["--threads=9"], "threads: must be in 1 ... 8"),
        (["--zero=60", "--holes=60"], "zero_percent and hole_percent"),
        (["--size=x"], "'x' is not a size"),
        (["--rate=-1"], "'-1' is neither a number nor max"),
    ],
)
def test_bad_options(
    path: Path, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main([f"--socket={path}", *arguments])
    except SystemExit as error:
        code = int(error.code or 0)
    assert code == 2
    assert text in capsys.readouterr().err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "examples:" in capsys.readouterr().out


def test_guest_that_cannot_start(path: Path) -> None:
    with huge_pages(0):
        params = GuestParams(size=(int(hugekit.KNOB.read_text()) + 8) * 2 * MIB, pages="2m")
        with pytest.raises(SnapengineError, match="guest: start: the process has ended"):
            GuestProcess(path, params)


def test_two_engines_at_one_path(path: Path, guest: GuestProcess) -> None:
    """The guest is connected to the first one; the second waits in vain, and gets it later."""
    with closing(MinimalEngine(path)), pytest.raises(HandoverError, match="no peer connected"):
        PeerTarget(path, timeout=0.1).open(1)
    with closing(MinimalEngine(path)) as second:
        assert second.pid == guest.pid


def test_a_long_path_of_a_socket_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would never connect."""
    path = tmp_path / ("s" * 100)
    assert main([f"--socket={path}", "--size=1M", "--duration=60"]) == 2
    assert f"{path}: a socket's path has at most 107 bytes" in capsys.readouterr().err

"""The three steps of a capture: their order, several captures at one instant, and an end between steps."""

from __future__ import annotations

import contextlib
import gc
import os
import struct
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from capturekit import anonymous, saved
from handoverkit import fds_before, open_fds
from scarcekit import run
from targetkit import until
from waitkit import PATIENCE_S

import snapengine
from snapengine.errors import CaptureCancelled, TimeLimitError
from snapengine.options import DIRTY_LOGGING, WRITE_TRACKING
from snapengine.storage.sinks import Sink

pytestmark = pytest.mark.usefixtures("requires_uffd")
MIB = 1 << 20
METHODS = (WRITE_TRACKING, DIRTY_LOGGING)
WAYS = [(WRITE_TRACKING, "plain"), (WRITE_TRACKING, "two-step"), (DIRTY_LOGGING, "auto")]
STEPS = ("prepare", "fix", "go_on")
STEADY_S = 100.0  # a limit of the last round that no load of this machine exceeds


@pytest.fixture(autouse=True)
def nothing_left():
    gc.collect()
    files, threads = fds_before(), tasks()
    yield
    until(lambda: tasks() <= threads, "a thread is left")
    assert open_fds() == files


def tasks():
    return len(os.listdir("/proc/self/task"))


class Target(snapengine.BufferTarget):
    """It records its calls; `fails` names the one that raises."""

    def __init__(self, memory, fails=""):
        super().__init__(memory, pause=lambda: self.note("pause"), resume=lambda: self.note("resume"),
                         vmstate=lambda: self.note("vmstate"))  # fmt: skip
        self.calls = []
        self.fails = fails

    def note(self, name):
        self.calls.append(name)
        if name == self.fails:
            raise ValueError(f"no {name} today")
        return {}

    def close(self, status):
        self.calls.append(status)
        super().close(status)


def capture_of(target, path, method=WRITE_TRACKING, arming="auto", **options):
    return snapengine.snapshot(
        target, path, method=method, arming=arming, downtime_limit=STEADY_S, max_seconds=STEADY_S, **options
    )


def check_released(memory, folder):
    """The memory can be written to, and there is no image."""
    for page in range(0, len(memory), 4096):
        memory[page] = 7
    assert list(folder.iterdir()) == []


def test_the_writer_and_the_checker():
    """The checker accepts the pairs that one writer can leave, and no others."""
    assert [is_state(a, b) for a, b in ((0, 0), (1, 0), (9, 8), (9, 9))] == [True] * 4
    assert [is_state(a, b) for a, b in ((0, 1), (2, 0), (8, 9), (0, 50))] == [False] * 4


# --- order --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "arming"), WAYS)
def test_each_step_does_its_part(tmp_path, method, arming):
    memory = anonymous(4 * MIB)
    memory[:] = b"\1" * len(memory)
    target = Target(memory)
    capture = capture_of(target, tmp_path / "image", method, arming)
    capture.prepare()
    memory[:MIB] = b"\2" * MIB
    assert target.calls == []
    if method == WRITE_TRACKING:
        assert capture.progress().phase == "arming"
    else:  # the rounds run on a thread of their own
        until(lambda: capture.progress().phase == "saving")
    assert capture.fix() is True
    assert target.calls == ["pause", "vmstate"]
    assert not capture.wait(0.01)
    at_t = time.monotonic_ns()
    if method == WRITE_TRACKING:
        memory[MIB : 2 * MIB] = b"\3" * MIB  # one fault each: they are served before the target is resumed
    capture.go_on()
    assert target.calls == ["pause", "vmstate", "resume"]
    memory[2 * MIB :] = b"\4" * 2 * MIB
    assert capture.wait(PATIENCE_S)
    assert target.calls == ["pause", "vmstate", "resume", "completed"]
    assert saved(tmp_path / "image") == b"\2" * MIB + b"\1" * 3 * MIB
    assert capture.result.t_monotonic_ns <= at_t
    assert capture.result.stop_ns > 0


@pytest.mark.parametrize("method", METHODS)
def test_start_is_all_of_them(tmp_path, method):
    target = Target(anonymous(MIB))
    capture = capture_of(target, tmp_path / "image", method)
    capture.start()
    if method == WRITE_TRACKING:
        assert target.calls[:3] == ["pause", "vmstate", "resume"]
    assert capture.wait(PATIENCE_S)
    assert target.calls == ["pause", "vmstate", "resume", "completed"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("done", range(4))
def test_steps_out_of_order(tmp_path, method, done):
    """The step is refused, and the capture can continue."""
    capture = capture_of(Target(anonymous(MIB)), tmp_path / "image", method)
    for name in STEPS[:done]:
        getattr(capture, name)()
    for name in ("start", *STEPS):
        if name != (STEPS[done] if done < 3 else "") and not (name == "start" and done == 0):
            with pytest.raises(RuntimeError, match=rf"{name}\(\): the capture (is|has|was)"):
                getattr(capture, name)()
    for name in STEPS[done:]:
        getattr(capture, name)()
    assert capture.wait(PATIENCE_S)
    assert saved(tmp_path / "image") == bytes(MIB)
    with pytest.raises(RuntimeError, match="a capture runs once"):
        capture.prepare()


def test_a_step_within_a_step(tmp_path):
    memory = anonymous(MIB)
    target = snapengine.BufferTarget(memory, pause=lambda: capture.go_on(), resume=lambda: None)
    capture = capture_of(target, tmp_path / "image")
    capture.prepare()
    with pytest.raises(RuntimeError, match=r"go_on\(\) within another step"):
        capture.fix()
    check_released(memory, tmp_path)


# --- several captures at one instant ------------------------------------------------------------------------


def is_state(one, two):
    """Whether a writer that writes 1, 2, ... to `one` and then to `two` can have left these."""
    return one - two in (0, 1)


class Writer:
    """Writes a number to two buffers in turn; it can be paused."""

    def __init__(self):
        self.buffers = [anonymous(2 * MIB), anonymous(2 * MIB)]
        self.written = 0
        self._pause, self._paused, self._stop = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work)

    def _work(self):
        while not self._stop.is_set():
            for buffer in self.buffers:
                struct.pack_into("<Q", buffer, MIB, self.written + 1)
                if self._pause.is_set():  # also between the two buffers
                    self._paused.set()
                    until(lambda: self._stop.is_set() or not self._pause.is_set(), "it is not resumed")
            self.written += 1

    def pause(self):
        self._pause.set()
        assert self._paused.wait(PATIENCE_S)

    def resume(self):
        self._pause.clear()
        self._paused.clear()

    def wait_for_more(self):
        count = self.written
        until(lambda: self.written > count + 2, "the writer makes no progress")

    def __enter__(self):
        self._thread.start()
        self.wait_for_more()
        return self

    def __exit__(self, *exc_info):
        self._stop.set()
        self._thread.join()


def pair(writer, folder, method, arming, pause, between=lambda: None):
    """The numbers in two images. Each step is taken for both captures before the next one."""
    targets = [
        snapengine.BufferTarget(buffer, pause=pause[i], resume=pause[2]) if pause else buffer
        for i, buffer in enumerate(writer.buffers)
    ]
    captures = [
        capture_of(target, folder / f"image{i}", method, arming) for i, target in enumerate(targets)
    ]
    for capture in captures:
        capture.prepare()
    writer.wait_for_more()
    assert captures[0].fix()
    between()
    assert captures[1].fix()
    for capture in captures:
        capture.go_on()
    writer.wait_for_more()
    for capture in captures:
        assert capture.wait(PATIENCE_S)
        assert capture.result.status == "completed"
    return [struct.unpack_from("<Q", saved(folder / f"image{i}"), MIB)[0] for i in range(2)]


@pytest.mark.parametrize(("method", "arming"), WAYS)
def test_two_captures_share_one_instant(tmp_path, method, arming):
    """The first target's pause stops the writer of both buffers; the first go_on() resumes it."""
    with Writer() as writer:
        for number in range(5):
            folder = tmp_path / str(number)
            folder.mkdir()
            pauses = writer.pause, lambda: None, writer.resume
            one, two = pair(writer, folder, method, arming, pauses)
            assert is_state(one, two), (one, two)


@pytest.mark.parametrize("arming", ["plain", "two-step"])
def test_without_a_pause_they_do_not(tmp_path, arming):
    """Negative control: the writer runs between the two instants, and the check finds that."""
    with Writer() as writer:
        one, two = pair(writer, tmp_path, WRITE_TRACKING, arming, None, between=writer.wait_for_more)
    assert not is_state(one, two), (one, two)
    assert two > one


# --- an end between two steps -------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "arming"), WAYS)
@pytest.mark.parametrize("done", [0, 1, 2])
@pytest.mark.parametrize("by_another_thread", [False, True])
def test_cancel_between_two_steps(tmp_path, method, arming, done, by_another_thread):
    memory = anonymous(4 * MIB)
    target = Target(memory)
    capture = capture_of(target, tmp_path / "image", method, arming)
    for name in STEPS[:done]:
        getattr(capture, name)()
    if by_another_thread:
        thread = threading.Thread(target=capture.cancel)
        thread.start()
        thread.join()
    else:
        capture.cancel()
    assert capture.wait(PATIENCE_S)
    check_released(memory, tmp_path)
    expected = [*["pause", "vmstate", "resume"][: 3 * (done - 1)], "cancelled"]
    assert target.calls == (expected if done else [])
    with pytest.raises(CaptureCancelled):
        _ = capture.result
    with pytest.raises(CaptureCancelled):
        getattr(capture, STEPS[done])()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("done", [0, 1, 2])
def test_the_next_step_of_a_cancelled_capture(tmp_path, method, done):
    """It may be called before the capture has cleaned up; it raises once nothing is left."""
    memory = anonymous(MIB)
    capture = capture_of(Target(memory), tmp_path / "image", method)
    for name in STEPS[:done]:
        getattr(capture, name)()
    capture.cancel()
    with pytest.raises(CaptureCancelled):
        getattr(capture, STEPS[done])()
    assert capture.wait(PATIENCE_S)
    check_released(memory, tmp_path)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("done", [1, 2])
def test_the_limit_of_time_ends_it_between_two_steps(tmp_path, method, done):
    memory = anonymous(MIB)
    capture = capture_of(Target(memory), tmp_path / "image", method, timeout=2.0)
    with contextlib.suppress(TimeLimitError):  # on a loaded machine the limit may expire earlier
        for name in STEPS[:done]:
            getattr(capture, name)()
    assert capture.wait(PATIENCE_S)
    check_released(memory, tmp_path)
    with pytest.raises(TimeLimitError):
        _ = capture.result


@pytest.mark.parametrize(
    ("fails", "step", "calls"),
    [
        ("pause", "fix", ["pause", "resume", "failed"]),
        ("vmstate", "fix", ["pause", "vmstate", "resume", "failed"]),
        ("resume", "go_on", ["pause", "vmstate", "resume", "failed"]),
    ],
)
def test_a_step_that_fails(tmp_path, fails, step, calls):
    memory = anonymous(MIB)
    target = Target(memory, fails)
    capture = capture_of(target, tmp_path / "image")
    for name in STEPS[: STEPS.index(step)]:
        getattr(capture, name)()
    with pytest.raises(ValueError, match=f"no {fails} today"):
        getattr(capture, step)()
    assert target.calls == calls
    check_released(memory, tmp_path)
    with pytest.raises(ValueError, match=f"no {fails} today"):
        _ = capture.result


@pytest.mark.parametrize("fails", ["pause", "vmstate", "resume"])
def test_dirty_logging_whose_target_fails(tmp_path, fails):
    """`fix` raises the error; an error of `resume` becomes the error of the capture."""
    memory = anonymous(MIB)
    target = Target(memory, fails)
    capture = capture_of(target, tmp_path / "image", DIRTY_LOGGING)
    capture.prepare()
    if fails != "resume":
        with pytest.raises(ValueError, match=f"no {fails} today"):
            capture.fix()
    else:
        assert capture.fix()
        capture.go_on()
    assert capture.wait(PATIENCE_S)
    with pytest.raises(ValueError, match=f"no {fails} today"):
        _ = capture.result
    assert target.calls[-1] == "failed"
    check_released(memory, tmp_path)


def test_dirty_logging_that_does_not_converge(tmp_path):
    """There is no T, and `fix` returns False. Each write to the sink in a round makes all pages dirty."""
    memory = anonymous(48 * MIB)
    content = np.frombuffer(memory, "u1")
    content[:] = 1

    class Dirtying(Sink):
        def __init__(self):
            super().__init__("dirtying")
            self.fd = -2  # no descriptor: `write` is called

        def write(self, data):
            content[::4096] = 2

    target = Target(memory)
    capture = snapengine.snapshot(
        target, Dirtying(), method=DIRTY_LOGGING, max_rounds=1, memory_limit=16 * MIB, downtime_limit=1e-9
    )
    capture.prepare()
    assert capture.fix() is False
    assert capture.wait(PATIENCE_S)
    capture.go_on()
    assert capture.result.status == "not-converged"
    assert capture.result.t_unix_ns == 0
    assert target.calls == ["not-converged"]
    check_released(memory, tmp_path)


def test_rounds_go_on_until_the_last_one_is_wanted(tmp_path):
    """More than `max_rounds`: that limit applies to captures that do not converge."""
    memory = anonymous(MIB)
    capture = capture_of(Target(memory), tmp_path / "image", DIRTY_LOGGING, max_rounds=1)
    capture.prepare()
    until(lambda: capture.progress().rounds > 3, "no rounds")
    memory[:] = b"\5" * MIB
    assert capture.fix()
    capture.go_on()
    assert capture.wait(PATIENCE_S)
    assert saved(tmp_path / "image") == b"\5" * MIB


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("done", [1, 2])
def test_the_interpreter_exits_between_two_steps(tmp_path, method, done):
    script = f"""
        import sys, snapengine
        target = snapengine.BufferTarget(bytearray(1 << 20), pause=lambda: None,
                                         resume=lambda: print("resumed", flush=True))
        capture = snapengine.snapshot(target, sys.argv[1], method={method!r})
        for name in {STEPS[:done]}:
            getattr(capture, name)()
        """
    done_run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "image")],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert (done_run.returncode, done_run.stderr) == (0, "")
    assert done_run.stdout == "resumed\n" * (done - 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", METHODS)
def test_a_forked_child_has_no_part_in_it(tmp_path, method):
    memory = anonymous(MIB)
    capture = capture_of(Target(memory), tmp_path / "image", method)
    capture.prepare()
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(CaptureCancelled):
            try:
                capture.fix()
            except CaptureCancelled:
                code = 0
                raise
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert capture.fix()
    capture.go_on()
    assert capture.wait(PATIENCE_S)
    assert saved(tmp_path / "image") == bytes(MIB)


@pytest.mark.parametrize("method", METHODS)
def test_interrupts_in_and_between_the_steps(tmp_path, method):
    from test_interrupts import ROUNDS

    work = f"""
    def work():
        target = snapengine.BufferTarget({{"ram": buffer}}, pause=lambda: None, resume=lambda: None)
        capture = snapengine.snapshot(target, os.path.join(folder, "image"), method={method!r})
        try:
            capture.prepare()
            capture.fix()
            capture.go_on()
            capture.wait()
        except BaseException:
            awaited_no_more()
            capture.cancel()
            capture.wait()
            raise

    def awaited_no_more():
        signal.setitimer(signal.ITIMER_REAL, 0)
    """
    assert "interrupted" in run(work + ROUNDS, tmp_path)

"""Threads that count themselves: an interrupt while one is started leaves nobody at work on what is freed."""

import contextlib
import mmap
import os
import threading

import pytest
from waitkit import PATIENCE_S

import snapengine
from snapengine.crew import Crew

MIB = 1 << 20
LATE = ["before it is interrupted", "after all is freed"]


class Started(KeyboardInterrupt):
    """A Ctrl-C that comes just after a thread was started."""


@pytest.fixture
def uncaught(monkeypatch):
    """What threads ended with."""
    found = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: found.append(arguments.exc_value))
    return found


@pytest.fixture
def interrupted(monkeypatch):
    """``interrupted(name, late)``: the first start of such a thread is; `late`, it waits for let_begin()."""
    gate, threads = threading.Event(), []

    def prepare(name, late):
        start, run = threading.Thread.start, threading.Thread.run

        def begin(thread):
            if thread.name == name and late:
                assert gate.wait(PATIENCE_S)
            run(thread)

        def interrupt(thread):
            start(thread)
            if thread.name == name and not threads:
                threads.append(thread)
                raise Started

        monkeypatch.setattr(threading.Thread, "run", begin)
        monkeypatch.setattr(threading.Thread, "start", interrupt)

    def let_begin():
        gate.set()
        for thread in threads:
            thread.join(PATIENCE_S)
        return len(threads)

    prepare.let_begin = let_begin
    yield prepare
    let_begin()


@pytest.mark.usefixtures("requires_uffd")
@pytest.mark.parametrize("late", [False, True], ids=LATE)
@pytest.mark.parametrize("name", ["snapengine-encode-0", "snapengine-encode-1", "snapengine-finish"])
@pytest.mark.parametrize("method", ["write-tracking", "dirty-logging"])
def test_a_capture_that_is_interrupted_as_it_starts_a_thread(
    tmp_path, interrupted, uncaught, method, name, late
):
    buffer = mmap.mmap(-1, 4 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer.write(os.urandom(4 * MIB))
    target = snapengine.BufferTarget(buffer, pause=lambda: None, resume=lambda: None)
    interrupted(name, late)
    capture = snapengine.snapshot(target, tmp_path / "image", method=method, encoder_threads=2)
    with pytest.raises(Started):
        capture.start()
    assert capture.wait(0)
    if name == "snapengine-finish" and not late and os.listdir(tmp_path):
        with snapengine.open_image(tmp_path / "image") as image:  # complete before the interrupt: it stays
            assert image.verify().data_pages == 1024
        os.unlink(tmp_path / "image")
    assert os.listdir(tmp_path) == []
    assert interrupted.let_begin() == 1
    assert uncaught == []
    buffer[0:4096] = bytes(4096)  # it would stand for ever
    with snapengine.snapshot(buffer, tmp_path / "image"):
        pass


def test_who_comes_late_does_nothing(interrupted, uncaught):
    done = []
    crew = Crew()
    crew.start("first", done.append, 1)
    assert crew.wait(PATIENCE_S)
    interrupted("second", True)
    with pytest.raises(Started):
        crew.start("second", done.append, 2)
    assert crew.dismiss()
    assert crew.wait(0)
    interrupted.let_begin()
    assert (done, uncaught, crew.working) == ([1], [], 0)


def test_who_has_not_begun_yet_is_waited_for(interrupted):
    done = []
    crew = Crew()
    interrupted("slow", True)
    with contextlib.suppress(Started):
        crew.start("slow", done.append, 1)
    crew.start("other", done.append, 2)
    crew._started += 1  # as if the first had not been interrupted
    assert not crew.wait(0.05)
    interrupted.let_begin()
    assert crew.wait(PATIENCE_S)
    assert sorted(done) == [1, 2]


def test_the_end_of_a_failed_one_is_seen(uncaught):
    def fail():
        raise ValueError("why")

    crew = Crew()
    crew.start("failing", fail)
    assert crew.wait(PATIENCE_S)
    assert crew.working == 0


def test_a_dismissed_crew_is_nobody():
    crew = Crew()
    assert crew.wait(0)
    assert not crew.dismiss()
    crew.start("late", pytest.fail, "it began")
    assert crew.wait(0)

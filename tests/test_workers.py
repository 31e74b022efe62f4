"""Crews of threads: after an interrupt at a start, no thread uses resources that are freed."""

import contextlib
import mmap
import os
import threading
import weakref
from pathlib import Path

import pytest
from waitkit import PATIENCE_S, until

import snapengine
from snapengine.base import workers as crew_module
from snapengine.base.latch import Latch
from snapengine.base.workers import Workers

MIB = 1 << 20
LATE = ["before it is interrupted", "after all is freed"]


class Started(KeyboardInterrupt):
    """A Ctrl-C that comes just after a thread was started."""


@pytest.fixture
def uncaught(monkeypatch):
    """The exceptions that ended threads."""
    found = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: found.append(arguments.exc_value))
    return found


@pytest.fixture
def interrupted(monkeypatch):
    """``interrupted(name, late)``: interrupts the first start of such a thread. If `late`, the thread waits
    for let_begin()."""
    gate, ends = threading.Event(), []
    start = crew_module.start_new_thread

    def prepare(name, late):
        def interrupt(run, arguments):
            if arguments[0] != name or ends:
                return start(run, arguments)
            ended = threading.Event()

            def begin():
                assert not late or gate.wait(PATIENCE_S)
                run(*arguments)
                ended.set()

            start(begin, ())
            ends.append(ended)
            raise Started

        monkeypatch.setattr(crew_module, "start_new_thread", interrupt)

    def let_begin():
        gate.set()
        assert all(ended.wait(PATIENCE_S) for ended in ends)
        return len(ends)

    prepare.let_begin = let_begin
    yield prepare
    let_begin()


@pytest.mark.usefixtures("requires_uffd")
@pytest.mark.parametrize("late", [False, True], ids=LATE)
@pytest.mark.parametrize("name", ["snap-encode-0", "snap-encode-1", "snap-finish"])
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
    if name == "snap-finish" and not late and os.listdir(tmp_path):
        with snapengine.open_image(tmp_path / "image") as image:  # complete before the interrupt: it stays
            assert image.verify().data_pages == 1024
        os.unlink(tmp_path / "image")
    assert os.listdir(tmp_path) == []
    assert interrupted.let_begin() == 1
    assert uncaught == []
    buffer[0:4096] = bytes(4096)  # would block for ever if still protected
    with snapengine.snapshot(buffer, tmp_path / "image"):
        pass


def test_who_comes_late_does_nothing(interrupted, uncaught):
    done = []
    workers = Workers()
    workers.start("first", done.append, 1)
    assert workers.wait(PATIENCE_S)
    interrupted("second", True)
    with pytest.raises(Started):
        workers.start("second", done.append, 2)
    assert workers.close()
    assert workers.wait(0)
    interrupted.let_begin()
    assert (done, uncaught, workers.working) == ([1], [], 0)


def test_who_has_not_begun_yet_is_waited_for(interrupted):
    done = []
    workers = Workers()
    interrupted("slow", True)
    with contextlib.suppress(Started):
        workers.start("slow", done.append, 1)
    workers.start("other", done.append, 2)
    workers._n_started += 1  # as if the first had not been interrupted
    assert not workers.wait(0.05)
    interrupted.let_begin()
    assert workers.wait(PATIENCE_S)
    assert sorted(done) == [1, 2]


def test_the_end_of_a_failed_one_is_seen(uncaught):
    def fail():
        raise ValueError("why")

    workers = Workers()
    workers.start("failing", fail)
    assert workers.wait(PATIENCE_S)
    assert workers.working == 0
    assert list(map(str, uncaught)) == ["why"]


def test_what_was_given_is_let_go_before_the_end_is_told():
    class Given:
        pass

    given = Given()
    gone = weakref.ref(given)
    workers = Workers()
    workers.start("holding", id, given)
    del given
    assert workers.wait(PATIENCE_S)
    assert gone() is None


def test_a_name_for_the_kernel_and_no_record_for_python():
    """Python 3.11 never frees the record of a thread that it did not start and that asked for its record."""
    names, gate = [], Latch()

    def ask():
        threading.current_thread()
        names.append(Path(f"/proc/self/task/{threading.get_native_id()}/comm").read_text())
        gate.wait()

    before = threading.enumerate()
    workers = Workers()
    workers.start("snap-a-long-name", ask)
    until(lambda: names)
    gate.set()
    assert workers.wait(PATIENCE_S)
    assert names == ["snap-a-long-nam\n"]
    assert threading.enumerate() == before


def test_a_debugger_sees_what_a_thread_does():
    seen = []
    threading.setprofile(lambda frame, event, argument: seen.append(frame.f_code.co_name))
    try:
        workers = Workers()
        workers.start("seen", test_closed_workers_start_no_work)
        assert workers.wait(PATIENCE_S)
    finally:
        threading.setprofile(None)
    assert "test_closed_workers_start_no_work" in seen


def test_closed_workers_start_no_work():
    workers = Workers()
    assert workers.wait(0)
    assert not workers.close()
    workers.start("late", pytest.fail, "it began")
    assert workers.wait(0)

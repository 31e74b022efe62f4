"""Freezer: all threads are stopped, the registers are those to continue with, and nothing stays stopped."""

import contextlib
import errno
import gc
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from patientkit import Freezer
from targetkit import (
    CALLS,
    COUNTERS,
    MEMORY,
    VALUES,
    Target,
    refuse_in,
    state_of,
    status_line,
    traced,
    until,
)
from waitkit import PATIENCE_S

import snapengine
from snapengine.errors import AttachError, TargetGoneError
from snapengine.kernel.procmaps import read_maps
from snapengine.process.inject import inject_userfaultfd
from snapengine.process.target import ProcessTarget
from snapengine.process.thread_state import ThreadState

pytestmark = pytest.mark.usefixtures("programs")

RAX, ORIG_RAX, RIP, CS = 10, 15, 16, 17  # struct user_regs_struct, as unsigned long
EPOLL_WAIT, EINTR = 232, 2**64 - errno.EINTR
RESTARTS = {2**64 - code for code in (512, 513, 514, 516)}  # ERESTARTSYS and its variants
NOT_IN_A_CALL = 2**64 - 1


def registers(thread):
    assert len(thread.regs) == 216
    return struct.unpack("<27Q", thread.regs)


def tracers(target):
    found = set()
    for tid in target.tids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.add(status_line(tid, "TracerPid"))
    return found


def check_gone(target):
    """No process traces it any more."""
    until(lambda: tracers(target) == {"0"})


@pytest.mark.parametrize("threads", [1, 3, 100])
def test_everything_stands_still(threads):
    with Target("compute", threads) as target:
        for _ in range(3):
            with Freezer(target.pid) as freezer:
                assert freezer.stopped
                assert {state_of(target.pid, tid) for tid in target.tids} == {"t"}
                before = target.counters(threads)
                time.sleep(0.03)
                assert target.counters(threads) == before
            assert not freezer.stopped
            assert freezer.stop_ns > 30_000_000
        check_gone(target)
        target.check_running(min(threads, 3))


def test_the_registers_are_those_of_the_threads():
    vector = ["avx"] if "avx2" in Path("/proc/cpuinfo").read_text() else []
    with Target("compute", 4, *vector) as target:
        until(lambda: all(target.counters(4)))  # pthread_create blocks signals until a thread runs
        with Freezer(target.pid) as freezer:
            code = [m for m in read_maps(target.pid) if "x" in m.perms]
            tids = target.tids
        threads = freezer.threads()
        assert [thread.tid for thread in threads] == tids
        for thread in threads:
            assert isinstance(thread, ThreadState)
            words = registers(thread)
            assert words[CS] == 0x33
            assert any(m.start <= words[RIP] < m.end for m in code)
            assert len(thread.fpregs) == 512
            # XSAVE: the legacy area is the same, and the header says which parts follow.
            assert thread.xstate[:416] == thread.fpregs[:416]
            assert len(thread.xstate) >= 576
            assert thread.comm == "compute"
            assert thread.sigmask == 0


def test_the_signal_mask_and_the_call():
    with Target("signals", "masked") as target:
        until(lambda: state_of(target.pid) == "S")
        with Freezer(target.pid) as freezer:
            pass
        (thread,) = freezer.threads()
        # Inside epoll_pwait(2) no signal is blocked; the thread's own mask blocks one.
        assert thread.sigmask == 1 << (signal.SIGRTMIN - 1)


def test_without_registers():
    with Target("compute", 1) as target:
        freezer = Freezer(target.pid)
        freezer.stop(registers=False)
        freezer.resume()
        (thread,) = freezer.threads()
        assert (thread.tid, thread.regs, thread.xstate) == (target.pid, b"", b"")


def test_a_thread_in_a_call_is_shown_as_it_goes_on():
    with Target("blocking", *CALLS, ready=len(CALLS)) as target:
        until(lambda: all(state_of(target.pid, tid) == "S" for tid in target.tids))
        with Freezer(target.pid) as freezer:
            memory = os.open(f"/proc/{target.pid}/mem", os.O_RDONLY)
            rips = [registers(thread)[RIP] for thread in freezer.threads()]
            at = {rip: os.pread(memory, 2, rip) for rip in rips}
            os.close(memory)
        repeated = 0
        for thread in freezer.threads():
            words = registers(thread)
            assert words[RAX] != EINTR
            if words[ORIG_RAX] == NOT_IN_A_CALL:
                assert at[words[RIP]] == b"\x0f\x05"
                repeated += words[RAX] == EPOLL_WAIT
            else:
                assert words[RAX] in RESTARTS
        assert repeated == 2


def test_no_call_ends_early():
    with Target("blocking", *CALLS, ready=len(CALLS)) as target:
        for _ in range(30):
            until(lambda: all(state_of(target.pid, tid) == "S" for tid in target.tids))
            with Freezer(target.pid):
                pass
        until(lambda: all(state_of(target.pid, tid) == "S" for tid in target.tids))
        assert list(target.words[COUNTERS : COUNTERS + 128]) == [0] * 128


def test_a_restartable_sequence_is_aborted():
    with Target("rseq") as target:
        for _ in range(20):
            with Freezer(target.pid):
                pass
        target.check_running(2)


def test_churn():
    with Target("churn") as target:
        for _ in range(40):
            with Freezer(target.pid) as freezer:
                before = target.counters(2)
                alive = [tid for tid in target.tids if state_of(target.pid, tid) not in ("Z", "X", "")]
                assert {state_of(target.pid, tid) for tid in alive} == {"t"}
                assert target.counters(2) == before
            assert set(alive) <= {thread.tid for thread in freezer.threads()}
        check_gone(target)
        target.check_running(2)


def test_an_ended_leader():
    with Target("compute", 2, "leave") as target:
        until(lambda: state_of(target.pid) == "Z")
        with Freezer(target.pid) as freezer:
            before = target.counters(2)
            time.sleep(0.01)
            assert target.counters(2) == before
        assert len(freezer.threads()) == 2
        target.check_running(2)


def test_a_stopped_process_stays_stopped():
    with Target("compute", 3) as target:
        os.kill(target.pid, signal.SIGSTOP)
        until(lambda: {state_of(target.pid, tid) for tid in target.tids} == {"T"})
        with Freezer(target.pid) as freezer:
            assert len(freezer.threads()) == 3
        until(lambda: {state_of(target.pid, tid) for tid in target.tids} == {"T"})
        os.kill(target.pid, signal.SIGCONT)
        target.check_running(3)


def test_no_signal_is_lost():
    with Target("signals", "busy") as target:
        for _ in range(50):
            with Freezer(target.pid):
                os.kill(target.pid, signal.SIGRTMIN)
                os.kill(target.pid, signal.SIGRTMIN)
            os.kill(target.pid, signal.SIGRTMIN)
        until(lambda: target.words[COUNTERS] == 150, "signals were lost")


def test_it_can_be_used_again_and_from_any_thread():
    with Target("compute", 2) as target:
        freezer = Freezer(target.pid)
        for _ in range(3):
            stopper = threading.Thread(target=freezer.stop)
            stopper.start()
            stopper.join()
            assert freezer.stopped
            with pytest.raises(RuntimeError, match="stopped already"):
                freezer.stop()
            freezer.resume()
            freezer.resume()
        target.check_running(2)


def test_a_dropped_object_resumes():
    with Target("compute", 2) as target:
        freezer = Freezer(target.pid)
        freezer.stop()
        del freezer
        gc.collect()
        check_gone(target)
        target.check_running(2)


def test_a_fork_of_ours_does_not_resume():
    with Target("compute", 1) as target, Freezer(target.pid) as freezer:
        child = os.fork()
        if child == 0:
            freezer.resume()
            del freezer
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert state_of(target.pid) == "t"


def test_who_waits_for_a_child_does_not_see_its_stops():
    """waitpid(2) reports a ptrace stop to every thread of the tracer's process, as if the child had ended."""
    ended = []
    with Target("compute", 2) as target:
        waiter = threading.Thread(target=lambda: ended.append(target.process.wait()))
        waiter.start()
        for _ in range(20):
            with Freezer(target.pid):
                assert os.waitpid(target.pid, os.WNOHANG | os.WUNTRACED) == (0, 0)
                assert os.waitid(os.P_PID, target.pid, os.WEXITED | os.WSTOPPED | os.WNOHANG) is None
        assert ended == []
        target.process.kill()
        waiter.join()
    assert ended == [-signal.SIGKILL]


@pytest.mark.parametrize("threads", [1, 8])
def test_the_end_of_a_killed_process_is_seen_while_it_is_stopped(threads):
    """A tracer that does not reap would withhold it from the process's parent."""
    with Target("compute", threads) as target, Freezer(target.pid) as freezer:
        target.process.kill()
        assert target.process.wait(PATIENCE_S) == -signal.SIGKILL
        assert freezer.stopped


def helper_of(target):
    """The helper process that traces the target."""
    (tracer,) = tracers(target)
    assert int(tracer) not in map(int, os.listdir("/proc/self/task"))
    return int(tracer)


def test_the_helper_is_killed():
    """The process runs again, and `resume` reports it."""
    with Target("compute", 2) as target:
        freezer = Freezer(target.pid)
        for _ in range(3):
            freezer.stop()
            os.kill(helper_of(target), signal.SIGKILL)
            check_gone(target)
            until(lambda: not freezer.stopped)
            assert "was killed, so the process ran on" in str(refuse_in(freezer.resume))
            freezer.resume()
            target.check_running(2)


@pytest.mark.parametrize("method", ["write-tracking", "dirty-logging"])
def test_a_snapshot_whose_stop_ended_early_is_none(tmp_path, method):
    path = tmp_path / "image"
    with Target("compute", 2) as target:
        of_target = ProcessTarget(target.pid, cut="stop", method=method)
        vmstate = of_target.vmstate

        def broken():
            os.kill(helper_of(target), signal.SIGKILL)
            check_gone(target)
            return vmstate()

        of_target.vmstate = broken

        def take():
            with snapengine.snapshot(of_target, path, method=method):
                pass

        error = refuse_in(take)
        assert "was killed, so the process ran on" in str(error)
        assert not path.exists()
        target.check_running(2)


STOP_IN_A_PROGRAM = """
import os, sys
from snapengine.process.freezer import Freezer
freezer = Freezer(int(sys.argv[1]), deadline=60)
freezer.stop()
if sys.argv[2] == "exec":
    os.execv("/bin/sleep", ["sleep", "1000"])
print("stopped", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["kill", "exec"])
def test_a_program_that_ends_resumes_its_target(how):
    with Target("compute", 2) as target:
        argv = [sys.executable, "-c", STOP_IN_A_PROGRAM, str(target.pid), how]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
            try:
                if how == "kill":
                    assert program.stdout.readline() == "stopped\n"
                    assert state_of(target.pid) == "t"
                    program.kill()
                else:
                    until(lambda: Path(f"/proc/{program.pid}/comm").read_text() == "sleep\n")
                check_gone(target)
                target.check_running(2)
            finally:
                program.kill()


def test_somebody_waits_for_any_child():
    """os.wait() in another thread consumes no report of a stop."""
    stop = threading.Event()

    def reap():
        while not stop.is_set():
            try:
                os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                time.sleep(0)

    with Target("compute", 8) as target:
        reaper = threading.Thread(target=reap)
        reaper.start()
        try:
            for _ in range(10):
                with Freezer(target.pid) as freezer:
                    assert len(freezer.threads()) == 8
        finally:
            stop.set()
            reaper.join()
        target.check_running(8)


def test_the_parent_of_a_vfork():
    """It sleeps in the kernel until its child ends: it counts as stopped, but has no registers."""
    with Target("odd", "vfork") as target:
        until(lambda: target.words[VALUES] and state_of(target.pid) == "D")
        with Freezer(target.pid) as freezer:
            assert freezer.sharers == [target.words[VALUES]]
            target.words[MEMORY] = 1
            time.sleep(0.02)
            assert state_of(target.pid) == "D"
        assert freezer.threads() == []
        assert "waits for the child of its vfork" in freezer.warnings()[0]
        check_gone(target)
        target.check_running()


def test_it_dies_while_it_stands():
    with Target("compute", 3) as target:
        with Freezer(target.pid) as freezer:
            os.kill(target.pid, signal.SIGKILL)
            until(lambda: state_of(target.pid) in "ZX")
        assert target.process.wait(PATIENCE_S) == -signal.SIGKILL
        assert len(freezer.threads()) == 3
        assert refuse_in(lambda: Freezer(target.pid).stop()).errno == errno.ESRCH


def test_refusals():
    assert "BufferTarget" in str(refuse_in(lambda: Freezer(os.getpid()).stop()))
    with Target("compute", 1) as target, traced(target.pid) as tracer:
        assert f"traced by {tracer}" in str(refuse_in(lambda: Freezer(target.pid).stop()))
    with Target("odd", "zombie") as target:
        zombie = Freezer(target.words[VALUES])
        assert "has ended" in str(refuse_in(zombie.stop, TargetGoneError))


def test_two_engines():
    with Target("compute", 2) as target, Freezer(target.pid):
        assert "traced by" in str(refuse_in(lambda: Freezer(target.pid).stop(), AttachError))
        assert "traced by" in str(refuse_in(lambda: inject_userfaultfd(target.pid), AttachError))


FREEZE_FOR_EVER = """
import sys, time
from snapengine.process.freezer import Freezer
while True:
    with Freezer(int(sys.argv[1]), deadline=100):
        print(flush=True)
        time.sleep(0.02)
"""


def test_the_engine_is_killed_while_it_freezes():
    environment = {**os.environ, "PYTHONPATH": str(Path(snapengine.__file__).parent.parent)}
    with Target("compute", 3) as target:
        for number in range(10):
            command = [sys.executable, "-c", FREEZE_FOR_EVER, str(target.pid)]
            with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as engine:
                engine.stdout.readline()
                time.sleep(number * 0.004)
                engine.kill()
            check_gone(target)
            target.check_running(3)

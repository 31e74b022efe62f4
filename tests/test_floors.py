"""The floors of the bench: each one measures what its name says."""

import mmap
import os
import signal

import benchkit
import floorkit
import pytest

PAGE = 4096
PAGES = 32


@pytest.fixture(scope="module")
def floors(native_bench):
    return floorkit.load_floors()


@pytest.fixture
def memory(floors):
    """A touched buffer of 4 KiB pages."""
    found = benchkit.small_pages(PAGES * PAGE)
    floors.fill(found, 7)
    return found


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_byte_is_copied_by_any_number_of_threads(floors, threads):
    source = os.urandom(5 * PAGE + 17)
    into = bytearray(len(source))
    assert floors.copy_by_threads_ns(into, source, threads) > 0
    assert into == source


def test_a_copy_that_does_not_fit_is_refused(floors):
    with pytest.raises(ValueError, match="smaller"):
        floors.copy_by_threads_ns(bytearray(1), bytes(2), 1)
    with pytest.raises(ValueError, match="threads"):
        floors.copy_by_threads_ns(bytearray(2), bytes(2), 0)


@pytest.mark.parametrize("at", [0, 7, PAGE - 8, PAGE - 1])
def test_the_zero_test_finds_any_byte(floors, at):
    memory = mmap.mmap(-1, 3 * PAGE)
    assert floors.zero_test_ns(memory)[1] == 0
    memory[PAGE + at] = 1
    taken, found = floors.zero_test_ns(memory)
    assert (found, taken > 0) == (1, True)


@pytest.mark.parametrize("run", [1, 3, PAGES])
def test_another_process_is_read_to_the_end_by_any_run(floors, memory, run):
    buffer = bytearray(run * PAGE)
    assert floors.vm_read_ns(os.getpid(), floors.address_of(memory), PAGES * PAGE, buffer) > 0
    assert set(buffer) == {7}


@pytest.mark.parametrize(("cpus", "sync"), [((0,), True), ((1,), True), ((0, 1), True), ((1,), False)])
def test_each_write_is_served_by_a_handler_and_timed(requires_uffd, floors, memory, cpus, sync):
    if len(os.sched_getaffinity(0)) <= max(cpus):
        pytest.skip("needs two CPUs")
    with benchkit.protected(floors, memory, sync=sync) as tracked:
        taken = floorkit.fault_ns(floors, tracked, cpus)
    assert len(taken) == PAGES - len(cpus)  # the last ones end the handlers
    assert min(taken) > 0
    assert memory[::PAGE] == bytes([1]) * PAGES


def test_the_faulting_thread_serves_itself_and_sigbus_is_given_back(requires_uffd, floors, memory):
    before = signal.signal(signal.SIGBUS, signal.SIG_IGN)
    try:
        taken = floors.sigbus_faults_ns(floors.address_of(memory), PAGES * PAGE)
        assert signal.signal(signal.SIGBUS, before) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGBUS, before)
    assert len(taken) == PAGES
    assert memory[::PAGE] == bytes([1]) * PAGES


def test_what_is_protected_piece_by_piece_is_protected(requires_uffd, floors, memory):
    with benchkit.protected(floors, memory) as tracked:
        assert floors.write_protect_ns(*tracked, 3 * PAGE, True) > 0
        assert floors.write_protect_ns(*tracked, 5 * PAGE, False) > 0
        memory[:] = bytes(len(memory))  # would block for ever if still protected
    with pytest.raises(OSError, match="UFFDIO_WRITEPROTECT"):
        floors.write_protect_ns(-1, *tracked[1:], PAGE, True)


def test_the_first_writes_after_a_fork_are_this_process_s(floors, memory):
    forked, taken = floors.fork_and_write_ns(memory)
    assert forked > 0
    assert len(taken) == PAGES
    assert memory[::PAGE] == bytes([1]) * PAGES


def test_the_spread_is_of_single_values():
    found = floorkit.spread_ns("fault", list(range(1, 201)))
    assert found == {"fault_p50_ns": 101, "fault_p99_ns": 199, "fault_longest_ns": 200}

"""Behaviour of userfaultfd that the capture relies on: what faults, what does not, what wakes a waiter."""

import ctypes
import errno
import faulthandler
import mmap
import os
import re
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from waitkit import PATIENCE_S, until

from snapengine.errors import UffdPermissionError
from snapengine.kernel.uffd import FEATURES, MODE_MINOR, MODE_MISSING, MODE_WP, Uffd, supported_features

pytestmark = pytest.mark.usefixtures("requires_uffd")

PAGE = 4096

WP = FEATURES["PAGEFAULT_FLAG_WP"]
SHMEM = FEATURES["WP_HUGETLBFS_SHMEM"]
UNPOPULATED = FEATURES["WP_UNPOPULATED"]
EVENT_PAGEFAULT, EVENT_FORK, EVENT_REMAP = 0x12, 0x13, 0x14
FLAG_WRITE, FLAG_WP, FLAG_MINOR = 1, 2, 4
DONTWAKE, COPY_WP = 1, 2

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
# ctypes releases the GIL for a call: a writer that waits in memset blocks no other thread.
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2


class Memory:
    """Pages of this process, by address: ``write`` may block, so it never runs with the GIL."""

    def __init__(self, pages, shared=False):
        self.pages, self.fd = pages, -1
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        if shared:
            self.fd = os.memfd_create("test")
            os.ftruncate(self.fd, pages * PAGE)
            flags = mmap.MAP_SHARED
        self.addr = libc.mmap(None, pages * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, self.fd, 0)
        assert self.addr != ctypes.c_void_p(-1).value
        self.length = pages * PAGE
        libc.madvise(self.addr, self.length, mmap.MADV_NOHUGEPAGE)

    def at(self, page):
        return self.addr + page * PAGE

    def write(self, page, byte):
        libc.memset(self.at(page), byte, PAGE)

    def read(self, page):
        return ctypes.string_at(self.at(page), 1)[0]

    def close(self):
        libc.munmap(self.addr, self.length)
        if self.fd >= 0:
            os.close(self.fd)


@pytest.fixture
def memory():
    """``memory(pages, shared=False)``, unmapped after the test."""
    made = []

    def make(pages, shared=False):
        made.append(Memory(pages, shared))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def tracked():
    """``tracked(memory, features, mode)``: registered, and protected if the mode says so."""
    made = []

    def make(memory, features=WP, mode=MODE_WP):
        uffd = Uffd(features)
        made.append(uffd)
        uffd.register(memory.addr, memory.length, mode)
        if mode & MODE_WP:
            uffd.protect(memory.addr, memory.length)
        return uffd

    yield make
    for each in made:
        each.close()


class Writer(threading.Thread):
    """Writes one page; ``finish`` waits until the write has completed."""

    def __init__(self, memory, page, byte=1):
        super().__init__(daemon=True)
        self._arguments = memory, page, byte
        self.start()

    def run(self):
        memory, page, byte = self._arguments
        memory.write(page, byte)

    def finish(self):
        self.join(PATIENCE_S)
        assert not self.is_alive(), "the writer was not released"


class Message:
    """One struct uffd_msg."""

    def __init__(self, data):
        self.event, self.flags, self.address = struct.unpack_from("<B7xQQ", data)
        (self.child,) = struct.unpack_from("<I", data, 8)
        self.old, self.new, self.moved = struct.unpack_from("<QQQ", data, 8)


def read_message(fd):
    """The next message, within the deadline. One at a time: reading an event resumes its thread."""

    def attempt():
        try:
            return Message(os.read(fd, 32))
        except BlockingIOError:
            return None

    return until(attempt, "no message came")


def nothing_to_read(fd):
    with pytest.raises(BlockingIOError):
        os.read(fd, 32)
    return True


def reap(pid):
    """The exit code of a child, within the deadline; a child that hangs is killed."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("the child hangs")


def fork_and(action):
    """Fork without Python's own hooks; the child runs action and exits with what it returns."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = action() or 0
        finally:
            os._exit(code)
    return pid


# -- what faults --


@pytest.mark.parametrize("shared", [False, True])
def test_a_written_page_traps(memory, tracked, shared):
    ram = memory(4, shared)
    ram.write(2, 7)
    uffd = tracked(ram, WP | (SHMEM if shared else 0))
    assert nothing_to_read(uffd.fd)
    writer = Writer(ram, 2, 8)
    message = read_message(uffd.fd)
    assert (message.event, message.address & -PAGE) == (EVENT_PAGEFAULT, ram.at(2))
    assert message.flags & (FLAG_WRITE | FLAG_WP) == FLAG_WRITE | FLAG_WP
    assert ram.read(2) == 7, "reading does not fault, and shows the bytes before the write"
    assert writer.is_alive()
    uffd.unprotect(ram.at(2), PAGE)
    writer.finish()
    assert ram.read(2) == 8


def test_a_hole_without_markers_does_not_trap(memory, tracked):
    """The reason why the capture registers private holes for missing faults if WP_UNPOPULATED is not used."""
    ram = memory(4)
    uffd = tracked(ram)
    ram.write(1, 5)
    assert nothing_to_read(uffd.fd)


def test_a_hole_traps_as_missing(memory, tracked):
    ram = memory(4)
    uffd = tracked(ram, WP, MODE_WP | MODE_MISSING)
    writer = Writer(ram, 1, 5)
    message = read_message(uffd.fd)
    assert message.address & -PAGE == ram.at(1)
    assert not message.flags & FLAG_WP
    uffd.zeropage(ram.at(1), PAGE)
    writer.finish()
    assert ram.read(1) == 5
    with pytest.raises(OSError, match="UFFDIO_ZEROPAGE") as caught:
        uffd.zeropage(ram.at(1), PAGE)
    assert caught.value.errno == errno.EEXIST


def test_a_hole_traps_by_its_marker(memory, tracked):
    ram = memory(4)
    uffd = tracked(ram, WP | UNPOPULATED)
    writer = Writer(ram, 1, 5)
    message = read_message(uffd.fd)
    assert message.address & -PAGE == ram.at(1)
    assert message.flags & FLAG_WP
    uffd.unprotect(ram.at(1), PAGE)
    writer.finish()


def test_a_hole_of_shared_memory_traps_by_its_marker(memory, tracked):
    ram = memory(4, shared=True)
    uffd = tracked(ram, WP | SHMEM)
    writer = Writer(ram, 3, 5)
    message = read_message(uffd.fd)
    assert message.address & -PAGE == ram.at(3)
    assert message.flags & FLAG_WP
    uffd.unprotect(ram.at(3), PAGE)
    writer.finish()


def test_hugetlb_traps_by_its_own_pages(tracked, hugetlb):
    hugetlb(2)
    size = 2 << 20
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000  # MAP_HUGETLB
    ram = Memory.__new__(Memory)
    ram.addr, ram.length, ram.fd = libc.mmap(None, size, 3, flags, -1, 0), size, -1
    assert ram.addr != ctypes.c_void_p(-1).value
    ram.write(0, 1)
    try:
        uffd = tracked(ram, WP | SHMEM)
        writer = Writer(ram, 300, 2)
        message = read_message(uffd.fd)
        assert message.address & -size == ram.addr
        with pytest.raises(OSError, match="UFFDIO_WRITEPROTECT") as caught:
            uffd.unprotect(ram.at(300), PAGE)
        assert caught.value.errno == errno.EINVAL
        uffd.unprotect(ram.addr, size)
        writer.finish()
    finally:
        ram.close()


# -- what fills pages --


def data_of(*numbers):
    return b"".join(bytes([number]) * PAGE for number in numbers)


def fails_with(number, call, *arguments):
    with pytest.raises(OSError, match=re.escape(os.strerror(number)) + "|lacks") as caught:
        call(*arguments)
    assert caught.value.errno == number
    return True


@pytest.mark.parametrize("shared", [False, True])
def test_copy_fills_missing_pages_and_wakes(memory, tracked, shared):
    ram = memory(4, shared)
    uffd = tracked(ram, WP | (FEATURES["MISSING_SHMEM"] if shared else 0), MODE_MISSING)
    writer = Writer(ram, 1, 9)
    assert read_message(uffd.fd).address & -PAGE == ram.at(1)
    assert uffd.copy(ram.addr, data_of(5, 6, 7)) == 3 * PAGE
    writer.finish()
    assert [ram.read(page) for page in range(3)] == [5, 9, 7]


@pytest.mark.parametrize("name", ["copy", "zeropage"])
def test_filling_ends_at_a_page_that_exists(memory, tracked, name):
    ram = memory(4)
    ram.write(2, 8)
    uffd = tracked(ram, WP, MODE_MISSING)

    def fill(page, pages):
        if name == "copy":
            return uffd.copy(ram.at(page), data_of(*[3] * pages))
        return uffd.zeropage(ram.at(page), pages * PAGE)

    assert fill(0, 4) == 2 * PAGE
    assert fails_with(errno.EEXIST, fill, 2, 2)
    assert fill(3, 1) == PAGE
    filled = 3 if name == "copy" else 0
    assert [ram.read(page) for page in range(4)] == [filled, filled, 8, filled]


def test_copy_wakes_nobody_if_so_asked(memory, tracked):
    ram = memory(1)
    uffd = tracked(ram, WP, MODE_MISSING)
    writer = Writer(ram, 0, 9)
    read_message(uffd.fd)
    assert uffd.copy(ram.addr, data_of(5), DONTWAKE) == PAGE
    assert ram.read(0) == 5
    assert writer.is_alive()
    uffd.wake(ram.addr, PAGE)
    writer.finish()
    assert ram.read(0) == 9


def test_copy_leaves_the_page_protected(memory, tracked):
    ram = memory(1)
    uffd = tracked(ram, WP, MODE_MISSING | MODE_WP)
    assert uffd.copy(ram.addr, data_of(5), COPY_WP) == PAGE
    writer = Writer(ram, 0, 9)
    assert read_message(uffd.fd).flags & FLAG_WP
    assert ram.read(0) == 5
    uffd.unprotect(ram.addr, PAGE)
    writer.finish()


def test_copy_of_what_cannot_be_read(memory, tracked):
    ram = memory(1)
    uffd = tracked(ram, WP, MODE_MISSING)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    source = libc.mmap(None, PAGE, 0, flags, -1, 0)  # PROT_NONE
    try:
        assert fails_with(errno.EFAULT, uffd.copy, ram.addr, (ctypes.c_ubyte * PAGE).from_address(source))
    finally:
        libc.munmap(source, PAGE)
    assert uffd.copy(ram.addr, data_of(5)) == PAGE, "nothing was filled"


def test_filling_waits_for_events_to_be_read(memory, tracked):
    ram = memory(2)
    uffd = tracked(ram, WP | FEATURES["EVENT_REMAP"], MODE_MISSING)
    mover = threading.Thread(target=move, args=[ram], daemon=True)
    mover.start()
    assert select.select([uffd.fd], [], [], PATIENCE_S)[0], "no event came"
    for call in (lambda: uffd.copy(ram.addr, data_of(5)), lambda: uffd.zeropage(ram.addr, PAGE)):
        assert fails_with(errno.EAGAIN, call)
    assert read_message(uffd.fd).event == EVENT_REMAP
    mover.join(PATIENCE_S)
    assert uffd.copy(ram.addr, data_of(5)) == PAGE


@pytest.mark.parametrize("name", ["copy", "zeropage", "map_existing", "poison"])
def test_filling_memory_that_is_not_registered(memory, name):
    ram = memory(1, shared=True)
    known = name != "poison" or supported_features() & FEATURES["POISON"]
    with Uffd(WP) as uffd:
        arguments = [data_of(1)] if name == "copy" else [PAGE]
        expected = errno.ENOENT if known else errno.EINVAL
        assert fails_with(expected, getattr(uffd, name), ram.addr, *arguments)


def test_a_minor_fault_maps_the_page_that_the_file_has(memory, tracked):
    minor = FEATURES["MINOR_SHMEM"]
    if not supported_features() & minor:  # before Linux 5.14
        assert fails_with(errno.EOPNOTSUPP, Uffd, WP | minor)
        return
    ram = memory(3, shared=True)
    os.pwrite(ram.fd, data_of(5, 6), 0)
    uffd = tracked(ram, WP | minor, MODE_MINOR)
    writer = Writer(ram, 1, 9)
    message = read_message(uffd.fd)
    assert (message.address & -PAGE, message.flags & FLAG_MINOR) == (ram.at(1), FLAG_MINOR)
    assert uffd.map_existing(ram.addr, 3 * PAGE) == 2 * PAGE, "the file has no third page"
    writer.finish()
    assert (ram.read(0), ram.read(1)) == (5, 9)
    assert fails_with(errno.EEXIST, uffd.map_existing, ram.addr, PAGE)
    assert fails_with(errno.EFAULT, uffd.map_existing, ram.at(2), PAGE)


def dies_of_poison(ram, touch_first):
    """Run in a child: SIGBUS ends it when it touches the poisoned page. It exits if the call was refused."""
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with Uffd(WP | FEATURES["POISON"]) as uffd:
        if touch_first:
            ram.write(1, 7)
        uffd.register(ram.addr, ram.length, MODE_MISSING)
        try:
            done = uffd.poison(ram.addr, 2 * PAGE)
        except OSError as error:
            return error.errno
        if touch_first:
            return 1 if (done, ram.read(1)) == (PAGE, 7) else 2
        ram.read(1)
    return 3


@pytest.mark.parametrize("shared", [False, True])
def test_poison(memory, shared):
    if not supported_features() & FEATURES["POISON"]:  # before Linux 6.6
        assert fails_with(errno.EOPNOTSUPP, Uffd, WP | FEATURES["POISON"])
        return
    ram = memory(2, shared)
    assert reap(fork_and(lambda: dies_of_poison(ram, False))) == -signal.SIGBUS
    assert reap(fork_and(lambda: dies_of_poison(ram, True))) == 1, "a page that exists is not poisoned"


def test_poison_wakes_a_waiter_to_its_sigbus(memory):
    if not supported_features() & FEATURES["POISON"]:
        assert fails_with(errno.EOPNOTSUPP, Uffd, WP | FEATURES["POISON"])
        return
    ram = memory(1)

    def waits_for_poison():
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with Uffd(WP | FEATURES["POISON"]) as uffd:
            uffd.register(ram.addr, PAGE, MODE_MISSING)
            writer = Writer(ram, 0, 1)
            read_message(uffd.fd)
            uffd.poison(ram.addr, PAGE)
            writer.finish()
        return 3

    assert reap(fork_and(waits_for_poison)) == -signal.SIGBUS


# -- what releases --


def test_unprotect_releases_only_its_pages(memory, tracked):
    ram = memory(4)
    for page in range(4):
        ram.write(page, 1)
    uffd = tracked(ram)
    first, second = Writer(ram, 0, 2), Writer(ram, 3, 2)
    assert {read_message(uffd.fd).address & -PAGE for _ in range(2)} == {ram.at(0), ram.at(3)}
    uffd.unprotect(ram.at(0), PAGE)
    first.finish()
    assert second.is_alive()
    assert ram.read(3) == 1
    uffd.unprotect(ram.at(1), 3 * PAGE)
    second.finish()


def test_wake_alone_makes_the_writer_fault_again(memory, tracked):
    ram = memory(1)
    ram.write(0, 1)
    uffd = tracked(ram)
    writer = Writer(ram, 0, 2)
    for _ in range(3):
        assert read_message(uffd.fd).address & -PAGE == ram.addr
        uffd.wake(ram.addr, PAGE)
    read_message(uffd.fd)
    assert ram.read(0) == 1
    uffd.unprotect(ram.addr, PAGE)
    writer.finish()


@pytest.mark.parametrize("how", ["close", "unregister", "with", "garbage"])
def test_the_end_of_tracking_releases(memory, how):
    ram = memory(2)
    ram.write(1, 1)
    uffd = Uffd(WP)
    uffd.register(ram.addr, ram.length)
    uffd.protect(ram.addr, ram.length)
    writer = Writer(ram, 1, 2)
    read_message(uffd.fd)
    if how == "close":
        uffd.close()
        assert uffd.fd == -1
        uffd.close()
    elif how == "unregister":
        uffd.unregister(ram.addr, ram.length)
    elif how == "with":
        with uffd:
            pass
    del uffd
    writer.finish()
    assert ram.read(1) == 2


# -- what is refused --


@pytest.mark.parametrize("call", ["protect", "unprotect"])
def test_memory_that_is_not_registered(memory, call):
    ram = memory(1)
    with Uffd(WP) as uffd, pytest.raises(FileNotFoundError, match="UFFDIO_WRITEPROTECT"):
        getattr(uffd, call)(ram.addr, PAGE)


def test_another_userfaultfd_is_in_the_way(memory, tracked):
    ram = memory(1)
    uffd = tracked(ram)
    uffd.register(ram.addr, PAGE)  # the same one again is no error
    with Uffd(WP) as other, pytest.raises(OSError, match="UFFDIO_REGISTER") as caught:
        other.register(ram.addr, PAGE)
    assert caught.value.errno == errno.EBUSY


def test_memory_of_a_file_cannot_be_tracked():
    with open(sys.executable, "rb") as file, Uffd(WP | SHMEM) as uffd:
        addr = libc.mmap(None, PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, file.fileno(), 0)
        with pytest.raises(OSError, match="UFFDIO_REGISTER") as caught:
            uffd.register(addr, PAGE)
        libc.munmap(addr, PAGE)
    assert caught.value.errno == errno.EINVAL


def test_odd_addresses(memory, tracked):
    ram = memory(2)
    uffd = tracked(ram)
    for call in (uffd.register, uffd.unregister, uffd.protect, uffd.unprotect):
        for addr, length in ((ram.addr + 1, PAGE), (ram.addr, PAGE + 1), (ram.addr, 0)):
            with pytest.raises(OSError, match="Invalid argument"):
                call(addr, length)


def test_a_closed_one(memory):
    uffd = Uffd(WP)
    uffd.close()
    with pytest.raises(OSError, match="UFFDIO_REGISTER") as caught:
        uffd.register(memory(1).addr, PAGE)
    assert caught.value.errno == errno.EBADF


def test_an_open_one_is_not_opened_again():
    with Uffd(WP) as uffd:
        before = uffd.fd
        with pytest.raises(ValueError, match="already open"):
            uffd.__init__(WP)
        assert uffd.fd == before


# -- fork and mremap --


@pytest.mark.parametrize("shared", [False, True])
def test_fork_without_the_event(memory, tracked, shared):
    ram = memory(2, shared)
    ram.write(0, 1)
    uffd = tracked(ram, WP | (SHMEM if shared else 0))
    pid = fork_and(lambda: ram.write(0, 2))
    assert reap(pid) == 0, "the child's write neither faults nor hangs"
    assert nothing_to_read(uffd.fd)
    assert ram.read(0) == (2 if shared else 1)
    writer = Writer(ram, 0, 3)
    assert read_message(uffd.fd).address & -PAGE == ram.addr, "the parent is still protected"
    uffd.unprotect(ram.addr, PAGE)
    writer.finish()


def forks_while_tracked(ram, sender):
    """Run in a child: hand over a userfaultfd and fork; the grandchild writes to page 0."""
    uffd = Uffd(WP | SHMEM | FEATURES["EVENT_FORK"])
    uffd.register(ram.addr, ram.length)
    uffd.protect(ram.addr, ram.length)
    socket.send_fds(sender, [b"u"], [uffd.fd])
    return reap(fork_and(lambda: ram.write(0, 2)))


def test_fork_with_the_event(memory):
    """In another process: fork() waits, with the GIL, until the event has been read."""
    ram = memory(2, shared=True)
    ram.write(0, 1)
    receiver, sender = socket.socketpair()
    with receiver, sender:
        pid = fork_and(lambda: forks_while_tracked(ram, sender))
        receiver.settimeout(PATIENCE_S)
        _, (uffd,), _, _ = socket.recv_fds(receiver, 1, 1)
    os.set_blocking(uffd, False)
    message = read_message(uffd)
    assert message.event == EVENT_FORK
    with Uffd(WP, message.child) as child:
        fault = read_message(child.fd)
        assert fault.event == EVENT_PAGEFAULT
        assert fault.address & -PAGE == ram.addr
        assert ram.read(0) == 1
        child.unprotect(ram.addr, PAGE)
        assert reap(pid) == 0
    assert ram.read(0) == 2
    os.close(uffd)


def move(ram):
    """Move the pages to a fixed address: without one, mremap to the same length would not move them."""
    room = Memory(ram.pages)
    new = libc.mremap(ram.addr, ram.length, ram.length, MREMAP_MAYMOVE | MREMAP_FIXED, room.addr)
    assert new == room.addr, os.strerror(ctypes.get_errno())
    ram.addr = new


def test_mremap_without_the_event(memory, tracked):
    ram = memory(2)
    ram.write(0, 1)
    uffd = tracked(ram)
    move(ram)
    ram.write(0, 2)
    assert nothing_to_read(uffd.fd), "the protection is lost, silently"


def test_mremap_with_the_event(memory, tracked):
    ram = memory(2)
    ram.write(0, 1)
    old = ram.addr
    uffd = tracked(ram, WP | FEATURES["EVENT_REMAP"])
    mover = threading.Thread(target=move, args=[ram], daemon=True)
    mover.start()
    message = read_message(uffd.fd)
    mover.join(PATIENCE_S)
    assert (message.event, message.old, message.new) == (EVENT_REMAP, old, ram.addr)
    assert message.moved == ram.length
    writer = Writer(ram, 0, 2)
    assert read_message(uffd.fd).address & -PAGE == ram.addr
    uffd.unprotect(ram.addr, PAGE)
    writer.finish()


# -- permission --


def test_without_permission_the_text_names_the_ways():
    code = (
        "import os; from snapengine.kernel import uffd\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: uffd.supported_features()\n"
        "except Exception as error: print(type(error).__name__, error.errno, error)\n"
        "else: print('allowed')\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    device = Path("/dev/userfaultfd")
    open_to_all = device.exists() and device.stat().st_mode & 0o006 == 0o006
    allowed = open_to_all or Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "1"
    if allowed:
        assert done.stdout == "allowed\n"
        return
    name, number, text = done.stdout.split(maxsplit=2)
    assert name == UffdPermissionError.__name__
    assert int(number) in (errno.EPERM, errno.EACCES)
    for way in ("CAP_SYS_PTRACE", "/dev/userfaultfd", "vm.unprivileged_userfaultfd"):
        assert way in text

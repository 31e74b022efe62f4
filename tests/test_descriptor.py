"""Objects that own a descriptor: an object whose constructor did not run owns none, and not number 0."""

import fcntl
import os

import pytest

from snapengine.base.descriptor import Descriptor
from snapengine.guest.memory import GuestMemory
from snapengine.kernel.uffd import Uffd
from snapengine.process.freezer import Freezer

WRONG = {
    "type": lambda cls: cls(object()),
    "none": lambda cls: cls(None),
    "too many": lambda cls: cls(*range(9)),
    "unknown": lambda cls: cls(unheard_of=1),
}


@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize("cls", [Descriptor, Uffd, GuestMemory, Freezer])
def test_wrong_arguments_close_nothing(cls, how):
    before = os.fstat(0)
    with pytest.raises((TypeError, AttributeError)):
        WRONG[how](cls)
    assert os.path.samestat(os.fstat(0), before)


def test_it_is_open_in_the_block_and_closed_behind_it(tmp_path):
    with Descriptor(tmp_path, os.O_RDONLY) as fd:
        assert os.path.samestat(os.fstat(fd), os.stat(tmp_path))
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_who_is_dropped_closes_and_only_once(tmp_path):
    one = Descriptor(tmp_path, os.O_RDONLY)
    fd = one.fd
    one.close()
    again = os.open(tmp_path, os.O_RDONLY)
    assert again == fd
    del one
    os.close(again)  # it was still open


def test_other_calls_that_make_one(tmp_path):
    made = [Descriptor.duplicate(1), Descriptor.memfd(b"name"), Descriptor.pidfd(os.getpid())]
    made += Descriptor.pipe()
    numbers = [one.fd for one in made]
    assert len(set(numbers)) == 5
    assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in numbers)
    assert os.path.samestat(os.fstat(1), os.fstat(numbers[0]))
    assert os.readlink(f"/proc/self/fd/{numbers[1]}").startswith("/memfd:name")
    assert os.write(numbers[4], b"through") == len(os.read(numbers[3], 99))
    mine = made[1].detach()
    del made
    os.close(mine)  # it was still open
    for fd in numbers:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


@pytest.mark.parametrize(
    ("make", "error"),
    [(lambda: Descriptor.duplicate(-1), "dup: "), (lambda: Descriptor.memfd(b"x" * 300), "memfd_create: "),
     (lambda: Descriptor.pidfd(-1), "pidfd_open: ")],
)  # fmt: skip
def test_calls_that_fail(make, error):
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match=error):
        make()
    assert os.listdir("/proc/self/fd") == before


def test_what_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        Descriptor(tmp_path / "nothing", os.O_RDONLY)
    assert caught.value.filename == tmp_path / "nothing"

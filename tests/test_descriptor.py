"""Objects that own a descriptor: an object that was never made owns none, least of all number 0."""

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
    os.close(again)  # it was still there


def test_what_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        Descriptor(tmp_path / "nothing", os.O_RDONLY)
    assert caught.value.filename == tmp_path / "nothing"

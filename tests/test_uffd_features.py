"""Features of a userfaultfd: requested, refused, or negotiated by the process that handed it over."""

import ctypes
import errno
import fcntl
import os
import struct
import tempfile

import pytest

from snapengine.errors import UnsupportedError
from snapengine.kernel.uffd import (
    FEATURES,
    Uffd,
    feature_names,
    negotiated_features,
    supported_features,
)

pytestmark = pytest.mark.usefixtures("requires_uffd")


WP = FEATURES["PAGEFAULT_FLAG_WP"]
SHMEM = FEATURES["WP_HUGETLBFS_SHMEM"]
UNPOPULATED = FEATURES["WP_UNPOPULATED"]
API = 0xC018AA3F  # UFFDIO_API

libc = ctypes.CDLL(None, use_errno=True)


# -- features --


def test_names_of_features():
    assert feature_names(WP | SHMEM) == ["PAGEFAULT_FLAG_WP", "WP_HUGETLBFS_SHMEM"]
    assert feature_names(0) == []
    assert supported_features() & WP


def test_an_unknown_feature():
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(UnsupportedError, match="0x40000000"):
        Uffd(1 << 30)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_error_of_a_failed_negotiation_is_its_own():
    """The Uffd keeps no state: it is closed, and a second attempt works like a first one."""
    uffd = Uffd.__new__(Uffd)
    with pytest.raises(UnsupportedError):
        uffd.__init__(1 << 30)
    assert uffd.fd == -1
    uffd.__init__(WP)
    assert negotiated_features(uffd.fd) & WP
    uffd.close()


def test_what_was_negotiated():
    with Uffd(WP | SHMEM) as uffd:
        assert uffd.features == WP | SHMEM
        found = negotiated_features(uffd.fd)
        assert found & (WP | SHMEM) == WP | SHMEM


def test_what_is_no_userfaultfd():
    with tempfile.TemporaryFile() as file:
        with pytest.raises(OSError, match="not a userfaultfd"):
            negotiated_features(file.fileno())
        own = os.dup(file.fileno())
        with pytest.raises(OSError, match="not a userfaultfd"):
            Uffd(WP, own)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(own)  # the call owns the descriptor, so it closes it on failure
    with pytest.raises(FileNotFoundError):
        negotiated_features(9999)


# -- a descriptor that another process handed over --


def raw_uffd(features=None):
    """A userfaultfd as its owner would make it: blocking, and negotiated or not."""
    fd = libc.syscall(323, os.O_CLOEXEC)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    if features is not None:
        fcntl.ioctl(fd, API, bytearray(struct.pack("<QQQ", 0xAA, features, 0)))
    return fd


def test_handed_over_with_features():
    fd = raw_uffd(WP | SHMEM | UNPOPULATED)
    with Uffd(WP | SHMEM, fd) as uffd:
        assert uffd.fd == fd
        assert uffd.features == WP | SHMEM | UNPOPULATED, "all that its owner requested"
        assert not os.get_blocking(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_handed_over_before_the_negotiation():
    fd = raw_uffd()
    assert negotiated_features(fd) is None
    with Uffd(WP | SHMEM, fd) as uffd:
        assert uffd.features == WP | SHMEM
        assert negotiated_features(fd) & (WP | SHMEM) == WP | SHMEM


def test_handed_over_without_a_feature():
    fd = raw_uffd(WP)
    text = r"handed-over userfaultfd lacks UFFD_FEATURE_WP_ASYNC \(Linux 6\.7\)"
    with pytest.raises(UnsupportedError, match=text) as caught:
        Uffd(WP | FEATURES["WP_ASYNC"], fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert caught.value.errno == errno.EOPNOTSUPP

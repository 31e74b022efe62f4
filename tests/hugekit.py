"""Pages of hugetlb for tests. The machine has one number of them: one run of tests at a time changes it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

KNOB = Path("/proc/sys/vm/nr_hugepages")
LOCK = Path(tempfile.gettempdir()) / f"snapengine-hugetlb-{os.getuid()}.lock"
_held = contextlib.ExitStack()  # of this process, which may ask again while it has some
_asked = 0


@contextlib.contextmanager
def huge_pages(count: int, needed: bool = True) -> Iterator[None]:
    """`count` more 2 MiB pages than there are. Where they are not to be had the test is skipped, or goes on
    without, if they are not `needed`."""
    global _asked
    if not _asked:
        file = _held.enter_context(LOCK.open("w"))
        fcntl.flock(file, fcntl.LOCK_EX)
    _asked += 1
    try:
        before = int(KNOB.read_text())
        if count:
            try:
                KNOB.write_text(str(before + count))
            except OSError as error:
                if needed:
                    pytest.skip(f"may not raise nr_hugepages: {error}")
                count = 0
        try:
            if (found := int(KNOB.read_text())) < before + count and needed:
                pytest.skip(f"only {found} of {before + count} hugetlb pages to be had")
            yield
        finally:
            if count:
                KNOB.write_text(str(before))
    finally:
        _asked -= 1
        if not _asked:
            _held.close()

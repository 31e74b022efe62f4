"""hugetlb pages for tests. Their number is global to the machine: one test run at a time changes it."""

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
_held = contextlib.ExitStack()  # held by this process; nested calls share it
_asked = 0


@contextlib.contextmanager
def huge_pages(count: int, needed: bool = True) -> Iterator[None]:
    """Add `count` 2 MiB pages. If the kernel does not provide them, the test is skipped; if they are not
    `needed`, it runs without them."""
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
                pytest.skip(f"only {found} of {before + count} hugetlb pages are available")
            yield
        finally:
            if count:
                KNOB.write_text(str(before))
    finally:
        _asked -= 1
        if not _asked:
            _held.close()

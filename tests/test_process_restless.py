"""Processes that map and unmap memory while they are attached to: the remaining memory is a consistent cut.

Memory that was unmapped, moved or discarded before it was saved is reported, and all other memory is correct.
"""

import errno
import glob
from pathlib import Path

import pytest
from orderkit import MIB, OrderTarget, check_order
from targetkit import COUNTERS, descriptors, until
from test_process import MODES, check_untouched, snap
from waitkit import attempts

from snapengine.errors import UffdError

pytestmark = pytest.mark.usefixtures("requires_uffd", "programs")

OTHERS, N_OTHERS = COUNTERS + 16, 5  # targets/restless.c
ROUNDS = 4


class Restless(OrderTarget):
    """``with Restless(how) as target``: writers in order, and threads that change the mappings."""

    def __init__(self, how, kind="anon", **popen):
        super().__init__(kind, 1, 40503, 8 * MIB, "restless", [how], **popen)

    def others(self):
        return list(self.words[OTHERS : OTHERS + self.words[N_OTHERS]])

    def check_others(self):
        """All of these threads make progress."""
        before = self.others()
        assert before
        until(
            lambda: all(now > then for now, then in zip(self.others(), before, strict=True)),
            "one makes no progress",
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", ["malloc", "mmap", "dontneed", "mremap", "fork", "brk", "sleepers"])
def test_what_stays_is_consistent(tmp_path, how, mode):
    path = tmp_path / "image"
    with Restless(how) as target:
        before = descriptors(target.pid)
        for _ in range(ROUNDS):
            low = target.last_write()
            result = snap(target.pid, path, mode)
            check_order(path, target, low, target.last_write())
            start, size = target.words[2], 8 * MIB
            assert not any(start < at + length and at < start + size for at, length in result.lost_runs)
            target.check_others()
        check_untouched(target, before)


@pytest.mark.host_optional
@pytest.mark.parametrize("mode", MODES)
def test_jemalloc(tmp_path, mode):
    """jemalloc discards memory within its mappings: with these settings at once, by default after 10 s."""
    found = glob.glob("/usr/lib/*/libjemalloc.so.2") + glob.glob("/usr/lib64/libjemalloc.so.2")
    if not found:
        pytest.skip("needs libjemalloc (Debian: libjemalloc2)")
    environment = {"LD_PRELOAD": found[0], "MALLOC_CONF": "dirty_decay_ms:0,muzzy_decay_ms:0,retain:false"}
    with Restless("malloc", env=environment) as target:
        maps = Path(f"/proc/{target.pid}/maps").read_text()
        assert "libjemalloc" in maps
        before = descriptors(target.pid)
        for _ in range(ROUNDS):
            low = target.last_write()
            result = snap(target.pid, tmp_path / "image", mode)
            check_order(tmp_path / "image", target, low, target.last_write())
            start, size = target.words[2], 8 * MIB
            assert not any(start < at + length and at < start + size for at, length in result.lost_runs)
            target.check_others()
        check_untouched(target, before)


@pytest.mark.parametrize("how", ["fork", "families"])
@pytest.mark.parametrize("mode", MODES)
def test_forks_with_shared_memory(tmp_path, mode, how):
    """A child also writes to the shared memory: to a word that is not part of the order."""
    path = tmp_path / "image"
    with Restless(how, "memfd") as target:
        before = descriptors(target.pid)
        for _ in range(ROUNDS):
            # If the engine gets a CPU late, more children may be alive at once than it accepts.
            for _ in attempts("it forks too often each time"):
                low = target.last_write()
                try:
                    snap(target.pid, path, mode)
                    break
                except UffdError as error:
                    if error.errno != errno.EMFILE:
                        raise
            check_order(path, target, low, target.last_write())
            target.check_others()
        check_untouched(target, before)

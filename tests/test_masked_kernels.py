"""Kernels that lack features: an image is never silently wrong. The tests of lost memory, consistency and
shared memory run again with each feature masked (tests/targets/oldkernel.c), alone and in the combinations
of older kernels."""

import os
import re
import subprocess
import sys

import pytest
from capturekit import anonymous, snap
from targetkit import program

import snapengine
from snapengine.kernel.uffd import FEATURES

pytestmark = [pytest.mark.usefixtures("requires_uffd", "programs"), pytest.mark.timeout(600)]

MOVE_AND_LATER = 1 << 16 | FEATURES["POISON"]  # UFFD_FEATURE_MOVE
SINCE_6_7 = MOVE_AND_LATER | FEATURES["WP_ASYNC"] | FEATURES["WP_UNPOPULATED"]
LOST = "test_process_lost.py::test_lost_memory_is_reported"
STEPS = "test_between_steps.py::test_a_part_of_a_page_table_that_is_replaced_is_lost"
CUTS = "test_consistency.py::test_soft_cut_is_consistent"
SHARES = "test_shared_losses.py"
TRACKED = "soft-write-tracking and memfd"

KERNELS = {
    "5.15": ({"MASK_IOCTLS": "PAGEMAP_SCAN PROCMAP_QUERY", "MASK_RELEASE": "5.15.0-91-generic",
              "MASK_FEATURES": SINCE_6_7 | FEATURES["WP_HUGETLBFS_SHMEM"]},
             [(LOST, "anon"), (STEPS, "")]),
    "6.1": ({"MASK_IOCTLS": "PAGEMAP_SCAN PROCMAP_QUERY", "MASK_FEATURES": SINCE_6_7,
             "MASK_RELEASE": "6.1.0-37-amd64"},
            [(LOST, ""), (STEPS, ""), (SHARES, TRACKED), (CUTS, "two-step and 3")]),
    "6.8": ({"MASK_IOCTLS": "PROCMAP_QUERY", "MASK_RELEASE": "6.8.0-45-generic"},
            [(LOST, ""), (STEPS, ""), (SHARES, "stop-dirty-logging and memfd")]),
    "no PAGEMAP_SCAN": ({"MASK_IOCTLS": "PAGEMAP_SCAN"}, [(LOST, "soft"), (STEPS, ""), (SHARES, TRACKED)]),
    "no MISSING_SHMEM": ({"MASK_FEATURES": FEATURES["MISSING_SHMEM"]}, [(SHARES, f"{TRACKED} and nothing")]),
    "no EVENT_FORK": ({"MASK_FEATURES": FEATURES["EVENT_FORK"]}, [(LOST, "soft and memfd")]),
}  # fmt: skip


def run(repository, mask, *arguments):
    environment = os.environ | {"LD_PRELOAD": program("oldkernel", "-shared", "-fPIC")}
    environment |= {name: str(value) for name, value in mask.items()}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_is_wrong_in_silence(repository, kernel):
    mask, chosen = KERNELS[kernel]
    words = " or ".join(f"({name.partition('.py')[0]}{word and ' and '}{word})" for name, word in chosen)
    names = [f"tests/{name}" for name, _ in chosen]
    ran = run(repository, mask, "-m", "pytest", "-vx", "-p", "no:cacheprovider", *names, "-k", words)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-1000:]
    for name in names:
        assert re.search(rf"^{re.escape(name)}.* PASSED", ran.stdout, re.MULTILINE), name


UNCHECKED = """
import sys, mmap, pytest
sys.path.insert(0, "tests")
import snapengine
from capturekit import anonymous, snap
memory = anonymous(1 << 20)
memory[:8] = b"12345678"
result = snap(memory, sys.argv[1])
(warning,) = [text for text in result.warnings if "Linux 5.14" in text]
assert "discards or replaces" in warning
with pytest.raises(snapengine.UnsupportedError, match="strict"):
    snap(memory, sys.argv[1] + "2", strict=True)
"""


def test_a_kernel_that_cannot_tell_says_so(repository, tmp_path):
    """Linux 5.10: neither PAGEMAP_SCAN nor the bit in pagemap."""
    mask = KERNELS["5.15"][0] | {"MASK_RELEASE": "5.10.0-30-amd64"}
    ran = run(repository, mask, "-c", UNCHECKED, str(tmp_path / "image"))
    assert ran.returncode == 0, ran.stderr
    assert sorted(os.listdir(tmp_path)) == ["image"]


def test_a_kernel_that_can_tell_does_not(tmp_path):
    memory = anonymous(1 << 20)
    memory[:8] = b"12345678"
    result = snap(memory, tmp_path / "image", strict=True)
    assert not any("5.14" in text for text in result.warnings)
    assert isinstance(result, snapengine.Result)


@pytest.mark.parametrize("kernel", ["5.15", "6.1"])
def test_the_doctor_says_that_it_works(repository, kernel):
    mask = KERNELS[kernel][0] | {"COLUMNS": "200"}
    ran = run(
        repository, mask, "-c", "import sys; from snapengine.cli import main; sys.exit(main())", "doctor"
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "Write tracking works on this host." in ran.stdout


UNSEEN_KIN = """
import os, sys
sys.path.insert(0, "tests")
import snapengine
from patientkit import ProcessTarget
from snapengine.errors import LostPagesError
from snapengine.image import open_image
from targetkit import MEMORY, Target, until

PAGE = 4096
replaces = sys.argv[2] == "replaces"

class Met(ProcessTarget):
    def registered(self, uffd):
        tracked = super().registered(uffd)
        other.words[511] = 2 if replaces else 1
        until(lambda: other.words[511] == 3, "nobody maps")
        return tracked

    def resume(self):
        with open(f"/proc/{self.pid}/pagemap", "rb", buffering=0) as pagemap:
            entries = [os.pread(pagemap.fileno(), 8, start // PAGE * 8 + i * 8) for i in (3, 4, 8)]
        self.protected = [entry[7] >> 1 & 1 for entry in entries]  # bit 57
        super().resume()

with Target("sharer", "maps") as other:
    start = other.words[MEMORY]
    met = Met(other.pid, cut="stop")
    with snapengine.snapshot(met, sys.argv[1]) as capture:
        pass
    assert "it is unknown whether" in " ".join(capture.result.warnings)
    assert met.protected == [1, 0, 1], met.protected
    with open_image(sys.argv[1]) as image:
        assert [image.read_at(start + i * PAGE, 1)[0] for i in (0, 2, 3, 8, 11)] == [1, 3, 4, 9, 12]
        try:
            text = repr(image.read_at(start + PAGE, 1))
        except LostPagesError:
            text = "lost"
        assert text == ("lost" if replaces else repr(bytes([2]))), text
"""


@pytest.mark.parametrize("what", ["adds", "replaces"])
def test_a_process_that_cannot_be_known_to_share_the_memory(repository, tmp_path, what):
    """It keeps running during a stop cut, which warns about it, and maps memory. Memory that appears between
    two regions is not protected, since nothing would release it before the end. Replaced memory is lost, and
    does not become zeros."""
    ran = run(repository, {"MASK_CALLS": "kcmp"}, "-c", UNSEEN_KIN, str(tmp_path / "image"), what)
    assert ran.returncode == 0, ran.stderr

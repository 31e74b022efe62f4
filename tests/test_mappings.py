"""docs/operations/mappings.md: each kind of mapping is made, saved by each cut, and compared with its row."""

import contextlib
import dataclasses
import mmap
import os
import re
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hugekit import huge_pages
from patientkit import ProcessTarget
from targetkit import COUNTERS, Target

import snapengine
from snapengine.doctor.preflight import examine_process
from snapengine.errors import AlreadyTrackedError, HandoverError, ImageError
from snapengine.export.elf_core import export_core
from snapengine.handover import message
from snapengine.handover.check_offer import check_mapped
from snapengine.image import open_image
from snapengine.kernel.backing import KERNEL, Backing, Backings, internal_device
from snapengine.kernel.pagemap import CATEGORIES, is_guard, populated_runs
from snapengine.kernel.procmaps import Mapping, read_maps
from snapengine.process.mapping_facts import MapFacts
from snapengine.process.selection import ELSEWHERE, MAPPED_TWICE, Selector, parse_regions, select
from snapengine.qemu.ram_blocks import RamBlock
from snapengine.qemu.target import QemuTarget

pytestmark = pytest.mark.usefixtures("requires_uffd", "programs")

TABLE = Path(__file__).parent.parent / "docs" / "operations" / "mappings.md"
PAGE, SIZE, HUGE = 4096, 8 * 4096, 2 << 20
MODES = ("soft", "stop", "dirty")
GUARDED = ("guard", "guard-shared", "guard-memfd-private")
SHORT = ("memfd-short", "memfd-short-private")
NOT_OURS = ("io_uring", "aio", "perf")  # their content is the kernel's
DECIDED = {
    "shadow-stack": Mapping(0x7000000000, 0x7000008000, "rw-p", 0, "00:00", 0, ""),
    "shared-named": Mapping(0x7000000000, 0x7000008000, "rw-s", 0, internal_device(), 4711, "[anon_shmem:x]"),
    "device": Mapping(0x7000000000, 0x7000008000, "rw-s", 0, "00:06", 77, "/dev/gpu"),
    "vvar": Mapping(0x7000000000, 0x7000008000, "r--p", 0, "00:00", 0, "[uprobes]"),
}
OPTIONAL = {
    *("guard", "guard-shared", "guard-memfd-private", "droppable", "mseal", "pkey", "secret", "io_uring"),
    *("aio", "perf", "hugetlb", "hugetlb-file", "hugetlb-file-private"),
}
"""Kinds that need a newer kernel, a CPU feature, or permissions."""
BY_OTHER_TESTS = {"memfd-twice", "own-userfaultfd", "vdso"}


def rows():
    """Kind -> the cells of its row: description, soft cut, stop cut."""
    found = {}
    for line in TABLE.read_text().splitlines():
        match = re.fullmatch(r"\| `([\w-]+)` \| (.*) \| (\w+) \| (\w+) \|", line)
        if match:
            assert match[1] not in found, f"{match[1]} has two rows"
            found[match[1]] = match.groups()[1:]
    return found


ROWS = rows()
MADE = [kind for kind in ROWS if kind not in DECIDED and kind not in BY_OTHER_TESTS]


def size_of(kind):
    sizes = {"io_uring": PAGE, "aio": PAGE, "perf": 2 * PAGE, "thp": HUGE}
    return sizes.get(kind, HUGE if "huge" in kind else SIZE)


def content_of(kind):
    """The content that the target has written; unreadable memory and holes are zeros."""
    number = MADE.index(kind) + 1
    data = bytearray()
    for word in range(size_of(kind) // 8):
        data += ((number << 32) + word).to_bytes(8, "little")
    if kind in GUARDED:
        data[: 2 * PAGE] = bytes(2 * PAGE)
    if kind in SHORT:
        data[2 * PAGE :] = bytes(len(data) - 2 * PAGE)
    if kind == "devzero-private":
        data[PAGE:] = bytes(len(data) - PAGE)
    return bytes(data)


@contextlib.contextmanager
def mounted(kind, folder):
    """A file system of its own, if this user may mount one; "-" if not."""
    done = subprocess.run(["mount", "-t", kind, "none", folder], capture_output=True, check=False)
    try:
        yield str(folder) if done.returncode == 0 else "-"
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="module")
def hugetlb_pages():
    with huge_pages(8, needed=False):
        yield


class Saved:
    """The target, its addresses, and the image and the result of each mode."""

    def __init__(self, target, room):
        self.target = target
        self.addresses = dict(zip(MADE, target.words[COUNTERS + 1 : COUNTERS + 1 + len(MADE)], strict=True))
        self.plan = examine_process(target.pid)
        self.results, self.images = {}, {}
        for mode in MODES:
            method = "dirty-logging" if mode == "dirty" else "write-tracking"
            chosen = ProcessTarget(target.pid, cut="soft" if mode == "soft" else "stop", method=method)
            path = room / f"{mode}.img"
            with snapengine.snapshot(chosen, path, method=method, strict=True) as capture:
                pass
            self.results[mode] = capture.result
            self.images[mode] = path


@pytest.fixture(scope="module")
def saved(tmp_path_factory, hugetlb_pages):
    room = tmp_path_factory.mktemp("kinds")
    with contextlib.ExitStack() as stack:
        folders = []
        for kind in ("tmpfs", "hugetlbfs"):
            folder = room / kind
            folder.mkdir()
            folders.append(stack.enter_context(mounted(kind, folder)))
        if folders[0] == "-":  # may not mount: use the existing tmpfs
            folders[0] = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))
        disk = stack.enter_context(tempfile.TemporaryDirectory(dir=Path(__file__).parent))
        target = stack.enter_context(Target("mappings", disk, *folders, *MADE))
        yield Saved(target, room)
        target.process.poll()
        assert target.process.returncode is None, "the target ended"


def fate_of(saved, mode, kind):
    """How a kind was captured, in the words of the table."""
    addr, size = saved.addresses[kind], size_of(kind)
    left = [item for item in saved.results[mode].not_captured if item["start"] == addr]
    with open_image(saved.images[mode]) as image:
        inside = [region for region in image.regions if region.addr <= addr < region.addr + region.length]
        if left:
            assert not inside
            return "elsewhere" if left[0]["reason"] in ELSEWHERE else "named"
        assert inside, "neither in the image nor named"
        if kind not in NOT_OURS:
            assert image.read_at(addr, size) == content_of(kind)
    return "captured"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.host_optional) if k in OPTIONAL else k for k in MADE]
)
def test_each_kind(saved, kind, mode):
    if not saved.addresses[kind]:
        pytest.skip(f"this host cannot make {kind}")
    wanted = ROWS[kind][1 if mode == "soft" else 2]
    found = fate_of(saved, mode, kind)
    assert found == {"tracked": "captured", "copied": "captured"}.get(wanted, wanted)
    row = next(row for row in saved.plan.rows if row.start <= saved.addresses[kind] < row.end)
    planned = row.soft if mode == "soft" else row.stop
    reason = row.reason if mode == "soft" else row.stop_reason
    if planned == "no":
        planned = "elsewhere" if reason in ELSEWHERE else "named"
    assert planned == wanted, "doctor says otherwise"


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_lost(saved, mode, tmp_path):
    """--strict has passed, the images can be verified and exported as cores, and the target still runs."""
    assert saved.results[mode].lost_pages == 0
    with open_image(saved.images[mode]) as image:
        image.verify()
        export_core(image, tmp_path / "core")
    assert saved.target.process.poll() is None


@pytest.mark.parametrize("kind", sorted(DECIDED))
def test_decisions(kind):
    """Kinds that no test can make on this host: the decision for what the kernel would report."""

    class Facts(MapFacts):
        def backing(self, mapping):
            return {"device": Backing("device"), "vvar": KERNEL}.get(kind) or super().backing(mapping)

    for stop in (False, True):
        selection = select(1, [DECIDED[kind]], Selector(), stop=stop, facts=Facts(1))
        (decision,) = selection.decisions
        wanted = ROWS[kind][2 if stop else 1]
        left = "elsewhere" if decision.reason in ELSEWHERE else "named"
        assert {"track": "tracked", "copy": "copied", "leave": left}[decision.action] == wanted


def test_vdso(saved):
    (vdso,) = [mapping for mapping in read_maps(saved.target.pid) if mapping.path == "[vdso]"]
    for mode in MODES:
        with open_image(saved.images[mode]) as image:
            assert image.read_at(vdso.start, 4) == b"\x7fELF"


def test_without_the_right_to_ask_for_files(saved):
    """Device numbers and names alone must lead to the same answer."""
    backings = Backings(saved.target.pid)
    for mapping in read_maps(saved.target.pid):
        if mapping.has_file:
            asked, guessed = backings.of(mapping), backings._guess(mapping)
            assert guessed.kind == asked.kind, mapping
            assert guessed.page_bytes == asked.page_bytes, mapping
            if asked.kind in ("shmem", "hugetlb", "file"):
                assert guessed.removed == asked.removed, mapping


def test_page_table_entries_tell_what_the_scan_does(saved):
    """Linux before 6.7 has page table entries only."""
    told = CATEGORIES["PRESENT"] | CATEGORIES["SWAPPED"] | CATEGORIES["FILE"]
    with open(f"/proc/{saved.target.pid}/pagemap", "rb", buffering=0) as pagemap:
        for kind in MADE:
            start, end = saved.addresses[kind], saved.addresses[kind] + size_of(kind)
            if not start or size_of(kind) == HUGE:
                continue
            scanned = populated_runs(pagemap.fileno(), start, end)
            read = populated_runs(pagemap.fileno(), start, end, use_scan=False)
            assert read == [(low, high, categories & told) for low, high, categories in scanned], kind


@pytest.mark.parametrize(
    ("entry", "guard"),
    [
        (0x440000000000009F, True),  # Linux 6.15: bit 58
        (0x400000000000009F, True),  # Linux 6.13: the marker itself
        (0x4000000000000000, False),  # read by a user without permission
        (0x420000000000003F, False),  # the marker of a protected hole
        (0x4200000000000020, False),  # swapped out
        (0x81000000001C46D4, False),  # present
        (0, False),
    ],
)
def test_guard_pages_by_their_entries(entry, guard):
    assert is_guard(entry) is guard


def test_the_table_names_a_test_for_each_row():
    assert set(ROWS) == set(MADE) | set(DECIDED) | BY_OTHER_TESTS
    assert len(MADE) > 40
    for kind, (_, soft, stop) in ROWS.items():
        assert {soft, stop} <= {"tracked", "copied", "named", "elsewhere", "refused"}, kind


# -- kinds that limit what can be saved --


def save(pid, path, **more):
    with snapengine.snapshot(ProcessTarget(pid, **more), path) as capture:
        pass
    return capture.result


@pytest.fixture
def twice():
    with Target("twice") as target:
        yield target


def test_memory_that_is_mapped_twice(twice, tmp_path):
    """`memfd-twice`: a write through one mapping causes no fault in the other."""
    one, two = twice.words[COUNTERS], twice.words[COUNTERS + 1]
    soft = save(twice.pid, tmp_path / "soft.img")
    named = {item["start"]: item["reason"] for item in soft.not_captured}
    assert named[one] == named[two] == MAPPED_TWICE
    assert MAPPED_TWICE not in ELSEWHERE
    result = save(twice.pid, tmp_path / "stop.img", cut="stop")
    assert result.lost_pages == 0
    assert any("two mappings of the same memory: all such" in warning for warning in result.warnings)
    with open_image(tmp_path / "stop.img") as image:
        first, second = image.read_at(one, 64 * PAGE), image.read_at(two, 64 * PAGE)
    assert first == second
    assert any(first)
    save(twice.pid, tmp_path / "part.img", regions=parse_regions(f"{one:x}-{one + PAGE:x}"))
    decisions = {row.start: (row.soft, row.stop) for row in examine_process(twice.pid).rows}
    assert decisions[one] == decisions[two] == ("no", "copied")


def test_too_much_memory_that_is_mapped_twice(twice, tmp_path):
    one, two = twice.words[COUNTERS], twice.words[COUNTERS + 1]
    result = save(twice.pid, tmp_path / "stop.img", cut="stop", copy_limit=64 << 10)
    named = {item["start"]: item["reason"] for item in result.not_captured}
    assert "--copy-limit" in named[one]
    assert "--copy-limit" in named[two]
    decisions = {row.start: row.stop for row in examine_process(twice.pid, copy_limit=64 << 10).rows}
    assert decisions[one] == decisions[two] == "no"


def test_a_userfaultfd_of_its_own(tmp_path):
    """`own-userfaultfd`: it is named and all other memory is saved; reading it would wait for the process."""
    with Target("ownuffd") as target:
        lazy, plain = target.words[COUNTERS + 1], target.words[COUNTERS + 2]
        for cut in ("soft", "stop"):
            result = save(target.pid, tmp_path / f"{cut}.img", cut=cut)
            (item,) = [item for item in result.not_captured if item["start"] == lazy]
            assert "tracks it with a userfaultfd" in item["reason"]
            assert result.lost_pages == 0
            with open_image(tmp_path / f"{cut}.img") as image:
                assert image.read_at(plain, 8) == (7).to_bytes(8, "little")
                with pytest.raises((ImageError, KeyError)):
                    image.read_at(lazy, 8)
        row = next(row for row in examine_process(target.pid).rows if row.start == lazy)
        assert (row.soft, row.stop) == ("no", "no")
        assert row.reason == item["reason"]
        target.check_running()


def test_a_second_capture_of_a_process_with_its_own_userfaultfd(tmp_path):
    """The other userfaultfd is not the process's own: to name its memory as such would hide the conflict."""
    with Target("ownuffd") as target:
        first = ProcessTarget(target.pid)
        second = pytest.raises(AlreadyTrackedError, match="another capture")
        with snapengine.snapshot(first, tmp_path / "one.img", rate_limit=8 << 20), second:
            save(target.pid, tmp_path / "two.img")
        target.check_running()


# -- the limit of copied memory --


def private_file(tmp_path, size, own_pages):
    path = tmp_path / "large"
    path.write_bytes(b"\x5a" * size)
    fd = os.open(path, os.O_RDWR)
    try:
        memory = mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE)
    finally:
        os.close(fd)
    for page in range(own_pages):
        memory[page * 2 * PAGE] = 1
    return memory


@pytest.mark.parametrize(("limit", "action"), [(4 * PAGE, "leave"), (5 * PAGE, "copy")])
def test_pages_of_its_own_count_not_the_size(tmp_path, limit, action):
    memory = private_file(tmp_path, 16 << 20, 5)
    (mapping,) = [m for m in read_maps() if m.path == str(tmp_path / "large")]
    selection = select(os.getpid(), [mapping], Selector(), stop=True, limit=limit)
    (decision,) = selection.decisions
    assert decision.action == action
    assert decision.cost == 5 * PAGE
    assert not decision.whole
    if action == "leave":
        assert "--copy-limit 16" in decision.reason
    memory.close()


# -- the same decision for other targets --


def mapping_of(saved, kind):
    (found,) = [m for m in read_maps(saved.target.pid) if m.start == saved.addresses[kind]]
    return found


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("anonymous", "anon"),
        ("tmpfs", "shared"),
        ("tmpfs-removed", "shared"),
        ("tmpfs-private", "anon"),
        ("shared-anonymous", "shared"),
        pytest.param("hugetlb-file", "hugetlb-shared", marks=pytest.mark.host_optional),
        pytest.param("hugetlb-file-private", "hugetlb", marks=pytest.mark.host_optional),
        ("file-shared", "copied"),
        ("sysv", "copied"),
    ],
)
def test_ram_blocks_of_a_machine(saved, kind, wanted):
    """QEMU's memory is classified by its backing, as any other memory."""
    if not saved.addresses[kind]:
        pytest.skip(f"this host cannot make {kind}")
    found = mapping_of(saved, kind)
    machine = QemuTarget(SimpleNamespace(peer_pid=saved.target.pid, address="here"))
    small = mapping_of(saved, "anonymous")
    for number, mapping in enumerate((found, small)):
        size = mapping.end - mapping.start
        machine._blocks.append(RamBlock(f"ram{number}", PAGE, 0, size, size, mapping.start))
    memory = sorted({found, small}, key=lambda mapping: mapping.start)
    tracked = {region.addr: region for region in machine._classify(memory)}
    if wanted == "copied":
        assert found.start not in tracked
        assert [region.addr for region in machine.copied_regions] == [found.start]
    else:
        assert tracked[found.start].kind == wanted
        assert tracked[found.start].page_size == (HUGE if "hugetlb" in wanted else PAGE)


@pytest.mark.parametrize("kind", ["anonymous", "tmpfs", "devzero-private", "hugetlb-file"])
def test_mappings_of_a_peer(saved, kind):
    if not saved.addresses[kind]:
        pytest.skip(f"this host cannot make {kind}")
    page = HUGE if kind == "hugetlb-file" else PAGE
    claimed = message.Mapping("ram", saved.addresses[kind], size_of(kind), 0, page)
    (found,) = check_mapped(saved.target.pid, (claimed,), {})
    assert found.kind == {"tmpfs": "shared", "hugetlb-file": "hugetlb-shared"}.get(kind, "anon")
    assert (found.zero_inode != 0) == (kind == "devzero-private")
    with pytest.raises(HandoverError, match="page_size"):
        check_mapped(saved.target.pid, (dataclasses.replace(claimed, page_size=1 << 30),), {})


def test_own_private_memory_of_dev_zero(tmp_path):
    """The kernel treats it as anonymous: a hole that is written to after T was a hole at T."""
    fd = os.open("/dev/zero", os.O_RDWR)
    with mmap.mmap(fd, 64 * PAGE, flags=mmap.MAP_PRIVATE) as memory:
        os.close(fd)
        memory[:PAGE] = b"\1" * PAGE
        with snapengine.snapshot(memory, tmp_path / "image") as capture:
            memory[32 * PAGE : 33 * PAGE] = b"\2" * PAGE
        assert capture.result.lost_pages == 0
        with open_image(tmp_path / "image") as image:
            assert image.read("buffer", 0, 64 * PAGE) == b"\1" * PAGE + bytes(63 * PAGE)

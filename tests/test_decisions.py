"""A decision that is made once for a kind of mapping must equal the decision for each mapping alone."""

import errno
import itertools

import pytest

from snapengine.kernel.backing import Backing
from snapengine.kernel.procmaps import Mapping
from snapengine.process.decisions import Decision, decide_all, tracked_regions
from snapengine.process.mapping_facts import MapFacts
from snapengine.process.selection import Selector, select
from snapengine.regions import Region

PAGE = 4096
KINDS = [  # perms, device, inode, path
    ("rw-p", "00:00", 0, ""),
    ("---p", "00:00", 0, ""),
    ("rw-p", "00:00", 0, "[heap]"),
    ("rw-p", "00:00", 0, "[anon:x]"),
    ("rw-s", "00:00", 0, "[anon_shmem:x]"),
    ("r--p", "00:00", 0, "[vvar]"),
    ("r-xp", "00:00", 0, "[vdso]"),
    ("rw-p", "00:01", 5, "/dev/zero"),
    ("rw-s", "00:01", 7, "/memfd:x (deleted)"),
    ("r--s", "00:01", 7, "/memfd:x (deleted)"),
    ("rw-p", "00:01", 7, "/memfd:x (deleted)"),
    ("rw-s", "fd:01", 9, "/file"),
    ("rw-p", "fd:01", 9, "/file"),
    ("r-xp", "fd:01", 9, "/file"),
    ("rw-s", "00:06", 11, "/dev/gpu"),
]
BACKINGS = {
    5: Backing("anonymous"), 7: Backing("shmem", removed=True), 9: Backing("file"), 11: Backing("device"),
}  # fmt: skip


class Facts(MapFacts):
    """Facts without a process. Answers about a single mapping depend on its address."""

    def backing(self, mapping):
        return BACKINGS.get(mapping.inode) or super().backing(mapping)

    def own_bytes(self, mapping):
        return mapping.start // PAGE % 3 * PAGE

    def populated_bytes(self, mapping):
        return mapping.start // PAGE % 5 * PAGE

    file_data_bytes = populated_bytes


def mappings_of(kinds, gap):
    """Each maps its own part of the files, so that none is mapped twice."""
    return [
        Mapping((i + 1) * (1 + gap) * PAGE, ((i + 1) * (1 + gap) + 1) * PAGE, kind[0], i * PAGE, *kind[1:])
        for i, kind in enumerate(kinds)
    ]


def alone(mappings, selector, stop, refused):
    return [
        select(1, [mapping], selector, stop=stop, facts=Facts(1, refused)).decisions[0]
        for mapping in mappings
    ]


@pytest.mark.parametrize("gap", [0, 1])
@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize(
    "selector", [Selector(), Selector(frozenset({"anon"})), Selector(frozenset(), ((PAGE, 60 * PAGE),))]
)
@pytest.mark.parametrize("order", ["in rows", "in turns"])
def test_each_fate_is_that_of_the_mapping_alone(gap, stop, selector, order):
    kinds = KINDS * 4 if order == "in turns" else [kind for kind in KINDS for _ in range(4)]
    mappings = mappings_of(kinds, gap)
    errors = {3: errno.EBUSY, 20: errno.EINVAL, 45: errno.EPERM}
    refused = {mappings[number].start: error for number, error in errors.items()}
    found = select(1, mappings, selector, stop=stop, facts=Facts(1, refused))
    assert found.decisions == alone(mappings, selector, stop, refused)
    assert len({id(decision) for decision in found.decisions}) == len(mappings)


def test_a_kind_is_decided_once():
    class Decider:
        asked = 0
        seen = ()

        def decide(self, mapping):
            self.seen += (mapping.path,)
            if mapping.path == "asks":
                self.asked += 1
            return Decision(mapping, "copy" if mapping.path == "copied" else "track", name="anon")

    names = ["", "asks", "copied", ""]
    decider = Decider()
    kinds = [("rw-p", "00:00", 0, name) for name in names * 3]
    decide_all(mappings_of(kinds, 1), decider, {3 * 2 * PAGE: errno.EBUSY})
    assert decider.seen.count("") == 1
    assert decider.seen.count("asks") == decider.seen.count("copied") == 3


def test_anonymous_neighbours_become_one_region():
    sizes = [(1, 2), (2, 3), (4, 5), (5, 6), (6, 7)]
    names = ["anon", "anon", "anon", "[heap]", "anon"]
    decisions = [
        Decision(Mapping(start * PAGE, end * PAGE, "rw-p", 0, "00:00", 0, ""), "track", name=name)
        for (start, end), name in zip(sizes, names, strict=True)
    ]
    decisions.insert(1, Decision(Mapping(3 * PAGE, 4 * PAGE, "---p", 0, "00:00", 0, ""), "leave", "why"))
    regions, private_files = tracked_regions(decisions)
    assert regions == [
        Region("anon@1000", PAGE, 2 * PAGE),
        Region("anon@4000", 4 * PAGE, PAGE),
        Region("[heap]", 5 * PAGE, PAGE),
        Region("anon@6000", 6 * PAGE, PAGE),
    ]
    assert not private_files


def test_a_file_that_is_named_so_is_a_region_of_its_own():
    """/dev/shm/anon beside anonymous memory: another kind, which is read and tracked differently."""
    kinds = [("rw-p", 0, "anon"), ("rw-s", 7, "shared"), ("rw-p", 7, "anon"), ("rw-p", 0, "anon")]
    decisions = [
        Decision(Mapping(i * PAGE, (i + 1) * PAGE, perms, 0, "00:01" if inode else "00:00", inode, ""),
                 "track", name="anon", kind=kind)
        for i, (perms, inode, kind) in enumerate(kinds, 1)
    ]  # fmt: skip
    regions, private_files = tracked_regions(decisions)
    assert regions == [
        Region(f"anon@{i}000", i * PAGE, PAGE, PAGE, kind) for i, (_, _, kind) in enumerate(kinds, 1)
    ]
    assert private_files


def test_memory_of_one_zero_device_only_becomes_one():
    decisions = [
        Decision(Mapping(i * PAGE, (i + 1) * PAGE, "rw-p", 0, "00:01", zeros, ""), "track", name="anon",
             zero_inode=zeros)
        for i, zeros in enumerate((5, 5, 6, 0), 1)
    ]  # fmt: skip
    assert [region.length // PAGE for region in tracked_regions(decisions)[0]] == [2, 1, 1]


def test_every_pair_of_kinds():
    """No value of the previous decision is kept."""
    for pair in itertools.product(KINDS, repeat=2):
        mappings = mappings_of(pair, 1)
        found = select(1, mappings, Selector(), stop=True, facts=Facts(1))
        assert found.decisions == alone(mappings, Selector(), True, {})

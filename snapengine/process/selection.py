"""Which mappings of an attached process can be captured, how, and why the others cannot.

Nothing is left out silently: each mapping is tracked, *copied* while the process is stopped (where the kernel
does not write-protect it), or left out for a stated reason. `save` and `doctor --pid` both call `select`;
docs/operations/mappings.md has its table.
"""

from __future__ import annotations

import errno
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from snapengine.base.units import format_size
from snapengine.kernel.backing import Backing
from snapengine.kernel.procmaps import DELETED, Mapping
from snapengine.options import COPY_LIMIT
from snapengine.process.copied import Copy, Way
from snapengine.process.decisions import Decision, decide_all, region_name, tracked_regions
from snapengine.process.mapping_facts import MapFacts
from snapengine.regions import PAGE_BYTES, Region, kind_of
from snapengine.result import NotCaptured

GROUPS = ("anon", "heap", "stack", "shared", "files")
WHOLE_BYTES = 8 << 20  # up to this size a private mapping of a file is copied with its clean pages

_RANGE = re.compile(r"(?:0x)?([0-9a-fA-F]+)-(?:0x)?([0-9a-fA-F]+)\Z")

UNCHANGED = "not writable, and the same as its file"
NEEDS_STOP = "the kernel does not write-protect private mappings of files: a stop cut copies it"
REMOVED = "its file is removed, and the kernel does not write-protect it: a stop cut copies it"
READ_ONLY = "read-only here, and written elsewhere: a stop cut copies it"
UNTRACKED = "the kernel does not write-protect this kind of memory: a stop cut copies it"
MAPPED_TWICE = (
    "mapped twice, and writes through the other mapping are not seen: a stop cut copies it; or "
    "choose one of them with --regions"
)
OWN_UFFD = "the process itself tracks it with a userfaultfd"
SECRET = "secret memory (memfd_secret): only the process itself can read it"
SHARED_FILE = "a shared mapping of a file: the file holds it"
NOT_SELECTED = "not selected"
KERNEL_DATA = "the kernel's own data, mapped into every process"
KERNEL_BUFFER = "a buffer shared with the kernel (io_uring, perf, KVM)"
DEVICE = "device memory"
ELSEWHERE = frozenset({UNCHANGED, SHARED_FILE, NOT_SELECTED, KERNEL_DATA})
"""Reasons that need no warning: the memory was not selected, or a file or the kernel holds it."""


@dataclass(frozen=True, slots=True)
class Selector:
    """What to capture: groups of `GROUPS`, and address ranges."""

    groups: frozenset[str] = frozenset(GROUPS)
    ranges: tuple[tuple[int, int], ...] = ()

    def wants(self, mapping: Mapping, group: str) -> bool:
        """Whether the mapping is selected. A range selects every mapping that it touches."""
        if group in self.groups:
            return True
        return any(mapping.start < end and mapping.end > start for start, end in self.ranges)


def parse_regions(text: str) -> Selector:
    """``"anon,heap,stack,shared,files,all"`` and ``"START-END"`` in hexadecimal. Raises ValueError."""
    groups: set[str] = set()
    ranges = []
    for part in text.split(","):
        word = part.strip()
        if match := _RANGE.match(word):
            start, end = int(match[1], 16), int(match[2], 16)
            if start >= end:
                raise ValueError(f"regions: {word} is empty")
            ranges.append((start, end))
        elif word == "all":
            groups.update(GROUPS)
        elif word in GROUPS:
            groups.add(word)
        else:
            known = ", ".join(GROUPS)
            raise ValueError(f"regions: {word!r} is none of all, {known}, START-END (hexadecimal)")
    return Selector(frozenset(groups), tuple(ranges))


@dataclass(slots=True)
class Selection:
    """What is done with each mapping, by address. ``warning``: what lengthens the stop."""

    decisions: list[Decision] = field(default_factory=list)
    tracked: list[Region] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    not_captured: list[NotCaptured] = field(default_factory=list)
    private_files: bool = False
    """Whether a private mapping of a memory file is tracked."""
    warning: str = ""

    @property
    def copied(self) -> list[Region]:
        """The regions that are copied."""
        return [copy.region for copy in self.copies]

    @property
    def copied_bytes(self) -> int:
        """Bytes that count against the copy limit."""
        return sum(decision.cost for decision in self.decisions if decision.action == "copy")


def select(
    pid: int,
    mappings: Iterable[Mapping],
    selector: Selector,
    *,
    stop: bool,
    limit: int = COPY_LIMIT,
    facts: MapFacts | None = None,
) -> Selection:
    """Decide about each mapping of process `pid`.

    ``stop``: the process will be stopped for copies; without a stop only mappings that cannot change are
    copied. ``limit``: the most bytes to copy. ``facts``: what is known about the mappings, such as refusals.
    """
    decider = _Decider(facts or MapFacts(pid), selector, stop)
    decisions = decide_all(mappings, decider, decider.facts.refusals)
    selection = Selection(decisions)
    selection.warning = _mapped_twice(decisions, decider)
    _keep_to(decisions, limit)
    _fill(selection)
    _make_names_unique(selection)
    return selection


class _Decider:
    """Decides about one mapping. ``asked``: how many questions had an answer that may differ for another
    mapping of the same file, permissions and name."""

    def __init__(self, facts: MapFacts, selector: Selector, stop: bool) -> None:
        self.facts = facts
        self.selector = selector
        self.stop = stop
        self.asked = 0

    def decide(self, mapping: Mapping) -> Decision:
        backing = self.facts.backing(mapping)
        if not mapping.has_file and backing.kind == "kernel":
            # [vdso] never changes, so it is copied without a stop.
            if mapping.path == "[vdso]":
                return Decision(mapping, "copy", "", "[vdso]", way="all", cost=mapping.end - mapping.start)
            return Decision(mapping, "leave", KERNEL_DATA)
        self.asked += bool(self.selector.ranges)
        if not self.selector.wants(mapping, _group(mapping, backing)):
            return Decision(mapping, "leave", NOT_SELECTED)
        if self.facts.refused(mapping) == errno.EBUSY:
            return Decision(mapping, "leave", OWN_UFFD)
        if backing.kind == "secret":
            return Decision(mapping, "leave", SECRET)
        if backing.kind in ("kernel", "device"):
            return Decision(mapping, "leave", DEVICE if backing.kind == "device" else KERNEL_BUFFER)
        if backing.kind == "anonymous":
            return self._anonymous(mapping)
        return self._shared(mapping, backing) if mapping.shared else self._private(mapping, backing)

    def _anonymous(self, mapping: Mapping) -> Decision:
        if self.facts.refused(mapping):
            return self.copied(mapping, "anon", "populated", UNTRACKED)
        name = mapping.path if mapping.path in ("[heap]", "[stack]") else "anon"
        return Decision(mapping, "track", name=name, zero_inode=mapping.inode)

    def _shared(self, mapping: Mapping, backing: Backing) -> Decision:
        name = _file_name(mapping)
        if backing.kind == "file":
            if not backing.removed:
                return Decision(mapping, "leave", SHARED_FILE)
            return self.copied(mapping, name, "file", REMOVED)
        if backing.kind == "aio":
            return self.copied(mapping, name, "populated", UNTRACKED)
        if backing.kind in ("sysv", "ramfs") or self.facts.refused(mapping):
            return self.copied(mapping, name, "file", UNTRACKED)
        if "w" not in mapping.perms:
            return self.copied(mapping, name, "file", READ_ONLY)
        kind = kind_of(backing.page_bytes, True)
        return Decision(mapping, "track", name=name, kind=kind, page_size=backing.page_bytes)

    def _private(self, mapping: Mapping, backing: Backing) -> Decision:
        still = "w" not in mapping.perms
        if still and not backing.removed and not self._own_bytes(mapping):
            return Decision(mapping, "leave", UNCHANGED)
        name = _file_name(mapping)
        if backing.kind in ("shmem", "hugetlb") and not self.facts.refused(mapping):
            kind = "hugetlb" if backing.page_bytes > PAGE_BYTES else "anon"
            return Decision(mapping, "track", name=name, kind=kind, page_size=backing.page_bytes)
        # Memory that is read-only by now (relocated data, program text) can be copied at any time.
        return self.copied(mapping, name, "own", REMOVED if backing.removed else NEEDS_STOP, still)

    def _own_bytes(self, mapping: Mapping) -> int:
        self.asked += 1
        return self.facts.own_bytes(mapping)

    def copied(self, mapping: Mapping, name: str, way: Way, reason: str, still: bool = False) -> Decision:
        """Copied during the stop; ``still``: it cannot change, so at any time."""
        if not self.stop and not still:
            return Decision(mapping, "leave", reason)
        decision = Decision(mapping, "copy", reason, name, way=way)
        if way == "own":
            decision.whole = self.facts.backing(mapping).kind != "file" or self.facts.backing(mapping).removed
            decision.cost = self._own_bytes(mapping)
            if decision.whole:
                decision.cost = max(decision.cost, self.facts.file_data_bytes(mapping))
        elif way == "file":
            decision.cost = self.facts.file_data_bytes(mapping)
        else:
            decision.cost = self.facts.populated_bytes(mapping)
        return decision


def _group(mapping: Mapping, backing: Backing) -> str:
    if mapping.shared:
        return "shared"
    if mapping.path in ("[heap]", "[stack]"):
        return mapping.path[1:-1]
    return "anon" if backing.kind in ("anonymous", "shmem", "hugetlb") else "files"


def _file_name(mapping: Mapping) -> str:
    name = os.path.basename(mapping.path.removesuffix(DELETED)).split(" ")[0]
    return name or "file"


def _mapped_twice(decisions: list[Decision], decider: _Decider) -> str:
    """A write through one mapping of a memory file is not seen by the tracking of another one. Both are
    copied during the stop, or left out without one. Returns a warning about the copies."""
    files: dict[tuple[str, int], list[int]] = {}
    for number, decision in enumerate(decisions):
        if decision.action == "track" and decision.mapping.has_file and not decision.zero_inode:
            files.setdefault((decision.mapping.device, decision.mapping.inode), []).append(number)
    both: set[int] = set()
    pair = None
    for numbers in files.values():
        for one, two in _overlapping(decisions, numbers):
            pair = pair or (decisions[one].mapping, decisions[two].mapping)
            both |= {number for number in (one, two) if _written_elsewhere(decisions, number, one, two)}
    for number in both:
        decision = decisions[number]
        if decider.stop:
            way: Way = "file" if decision.mapping.shared else "own"
            decisions[number] = decider.copied(decision.mapping, decision.name, way, MAPPED_TWICE)
        else:
            decision.leave_out(MAPPED_TWICE)
    if pair is None or not decider.stop:
        return ""
    size = format_size(sum(decisions[number].cost for number in both))
    text = f"{pair[0]} and {pair[1]} are two mappings of the same memory"
    return f"{text}: all such memory is copied in the stop ({size})"


def _written_elsewhere(decisions: list[Decision], number: int, one: int, two: int) -> bool:
    """Of a private and a shared mapping of a file, only the private one shows writes that are not seen."""
    other = two if number == one else one
    return decisions[other].mapping.shared or not decisions[number].mapping.shared


def _overlapping(decisions: list[Decision], numbers: list[int]) -> Iterable[tuple[int, int]]:
    """Pairs of mappings of one file that overlap, at least one of them shared. One pass by offset; not every
    pair, but each mapping that overlaps another one is in some pair."""
    numbers.sort(key=lambda number: decisions[number].mapping.offset)
    widest: dict[bool, int] = {}  # by whether it is shared: the mapping that ends last so far
    for number in numbers:
        mapping = decisions[number].mapping
        for shared, before in widest.items():
            if _file_end(decisions[before].mapping) > mapping.offset and (shared or mapping.shared):
                yield before, number
        last = widest.get(mapping.shared)
        if last is None or _file_end(decisions[last].mapping) < _file_end(mapping):
            widest[mapping.shared] = number


def _file_end(mapping: Mapping) -> int:
    return mapping.offset + mapping.end - mapping.start


def _keep_to(decisions: list[Decision], limit: int) -> None:
    """Leave out mappings that exceed the copy limit; use the rest of the limit for clean pages of files."""
    left = limit
    copied = [decision for decision in decisions if decision.action == "copy"]
    for decision in copied:
        if decision.cost > left:
            most = f"{format_size(decision.cost)} are too much to copy (--copy-limit {format_size(limit)})"
            decision.leave_out(f"{decision.reason}; {most}" if decision.reason else most)
        else:
            left -= decision.cost
    for decision in copied:
        size = decision.mapping.end - decision.mapping.start
        partial = decision.action == "copy" and decision.way == "own" and not decision.whole
        if partial and size <= WHOLE_BYTES and size - decision.cost <= left:
            left -= size - decision.cost
            decision.whole = True


def _fill(selection: Selection) -> None:
    selection.tracked, selection.private_files = tracked_regions(selection.decisions)
    for decision in selection.decisions:
        if decision.action == "track":
            continue
        mapping = decision.mapping
        if decision.action == "leave":
            selection.not_captured.append(
                NotCaptured(mapping.start, mapping.end, mapping.perms, mapping.path, decision.reason)
            )
        else:
            region = Region(region_name(decision), mapping.start, mapping.end - mapping.start)
            selection.copies.append(Copy(region, mapping, decision.way, decision.whole))


def _make_names_unique(selection: Selection) -> None:
    """A heap or stack may consist of several mappings. Then each name gets the address."""
    # Only names without an address can repeat; they begin with a bracket.
    names = [region.name for region in selection.tracked + selection.copied]
    counts = Counter(name for name in names if name[0] == "[")
    if max(counts.values(), default=1) == 1:
        return
    for number, region in enumerate(selection.tracked):
        if counts[region.name] > 1:
            selection.tracked[number] = replace(region, name=f"{region.name}@{region.addr:x}")
    for number, copy in enumerate(selection.copies):
        region = copy.region
        if counts[region.name] > 1:
            name = f"{region.name}@{region.addr:x}"
            selection.copies[number] = replace(copy, region=replace(region, name=name))

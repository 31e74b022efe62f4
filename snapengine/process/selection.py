"""Which mappings of an attached process can be captured, how, and why the others cannot.

Nothing is left out silently: each mapping is tracked, *copied* while the process stands still (the kernel
does not write-protect it), or left out with its reason. `save` and `doctor --pid` both ask `select`;
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
from snapengine.process.fates import Fate, region_name, sort_mappings, tracked_regions
from snapengine.process.mapping_facts import MapFacts
from snapengine.regions import PAGE_BYTES, Region, kind_of
from snapengine.result import NotCaptured

GROUPS = ("anon", "heap", "stack", "shared", "files")
WHOLE_BYTES = 8 << 20  # of a file that is mapped privately: up to here its clean pages are copied, too

_RANGE = re.compile(r"(?:0x)?([0-9a-fA-F]+)-(?:0x)?([0-9a-fA-F]+)\Z")

UNCHANGED = "not writable, and as it is in its file"
NEEDS_STOP = "the kernel write-protects no private mapping of a file: a stop cut copies it"
REMOVED = "its file is removed, and the kernel does not write-protect it: a stop cut copies it"
READ_ONLY = "read-only here, and written elsewhere: a stop cut copies it"
UNTRACKED = "the kernel does not write-protect this kind of memory: a stop cut copies it"
MAPPED_TWICE = (
    "mapped a second time, and a write through the other mapping is not seen: a stop cut copies it; or "
    "choose one of them with --regions"
)
OWN_UFFD = "the process tracks it by a userfaultfd of its own"
SECRET = "secret memory (memfd_secret): only the process itself can read it"
SHARED_FILE = "a shared mapping of a file: the file holds it"
NOT_SELECTED = "not selected"
KERNEL_DATA = "the kernel's own data, mapped into every process"
KERNEL_BUFFER = "a buffer shared with the kernel (io_uring, perf, KVM)"
DEVICE = "device memory"
ELSEWHERE = frozenset({UNCHANGED, SHARED_FILE, NOT_SELECTED, KERNEL_DATA})
"""Reasons that need no warning: nothing is missing that was asked for and that no file holds."""


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
    """What becomes of each mapping, by address. ``warning``: what lengthens the stop."""

    fates: list[Fate] = field(default_factory=list)
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
        """What counts against the limit."""
        return sum(fate.cost for fate in self.fates if fate.action == "copy")


def select(
    pid: int,
    mappings: Iterable[Mapping],
    selector: Selector,
    *,
    stop: bool,
    limit: int = COPY_LIMIT,
    facts: MapFacts | None = None,
) -> Selection:
    """Sort the mappings of process `pid`.

    ``stop``: the process will stand still for a copy (what cannot change is copied without). ``limit``: most
    bytes to copy. ``facts``: what is known of the mappings already, such as those that were refused.
    """
    sorter = _Sorter(facts or MapFacts(pid), selector, stop)
    fates = sort_mappings(mappings, sorter, sorter.facts.refusals)
    selection = Selection(fates)
    selection.warning = _mapped_twice(fates, sorter)
    _keep_to(fates, limit)
    _fill(selection)
    _tell_apart(selection)
    return selection


class _Sorter:
    """The decision for one mapping alone. ``asked``: how often something was asked that may be different for
    another mapping of the same file, rights and name."""

    def __init__(self, facts: MapFacts, selector: Selector, stop: bool) -> None:
        self.facts = facts
        self.selector = selector
        self.stop = stop
        self.asked = 0

    def fate(self, mapping: Mapping) -> Fate:
        backing = self.facts.backing(mapping)
        if not mapping.has_file and backing.kind == "kernel":
            # [vdso] never changes: no stop is needed.
            if mapping.path == "[vdso]":
                return Fate(mapping, "copy", "", "[vdso]", way="all", cost=mapping.end - mapping.start)
            return Fate(mapping, "leave", KERNEL_DATA)
        self.asked += bool(self.selector.ranges)
        if not self.selector.wants(mapping, _group(mapping, backing)):
            return Fate(mapping, "leave", NOT_SELECTED)
        if self.facts.refused(mapping) == errno.EBUSY:
            return Fate(mapping, "leave", OWN_UFFD)
        if backing.kind == "secret":
            return Fate(mapping, "leave", SECRET)
        if backing.kind in ("kernel", "device"):
            return Fate(mapping, "leave", DEVICE if backing.kind == "device" else KERNEL_BUFFER)
        if backing.kind == "anonymous":
            return self._anonymous(mapping)
        return self._shared(mapping, backing) if mapping.shared else self._private(mapping, backing)

    def _anonymous(self, mapping: Mapping) -> Fate:
        if self.facts.refused(mapping):
            return self.copied(mapping, "anon", "populated", UNTRACKED)
        name = mapping.path if mapping.path in ("[heap]", "[stack]") else "anon"
        return Fate(mapping, "track", name=name, zero_inode=mapping.inode)

    def _shared(self, mapping: Mapping, backing: Backing) -> Fate:
        name = _file_name(mapping)
        if backing.kind == "file":
            if not backing.removed:
                return Fate(mapping, "leave", SHARED_FILE)
            return self.copied(mapping, name, "file", REMOVED)
        if backing.kind == "aio":
            return self.copied(mapping, name, "populated", UNTRACKED)
        if backing.kind in ("sysv", "ramfs") or self.facts.refused(mapping):
            return self.copied(mapping, name, "file", UNTRACKED)
        if "w" not in mapping.perms:
            return self.copied(mapping, name, "file", READ_ONLY)
        kind = kind_of(backing.page_bytes, True)
        return Fate(mapping, "track", name=name, kind=kind, page_size=backing.page_bytes)

    def _private(self, mapping: Mapping, backing: Backing) -> Fate:
        still = "w" not in mapping.perms
        if still and not backing.removed and not self._own_bytes(mapping):
            return Fate(mapping, "leave", UNCHANGED)
        name = _file_name(mapping)
        if backing.kind in ("shmem", "hugetlb") and not self.facts.refused(mapping):
            kind = "hugetlb" if backing.page_bytes > PAGE_BYTES else "anon"
            return Fate(mapping, "track", name=name, kind=kind, page_size=backing.page_bytes)
        # What is read-only by now (relocated data, program text) can be copied at any time.
        return self.copied(mapping, name, "own", REMOVED if backing.removed else NEEDS_STOP, still)

    def _own_bytes(self, mapping: Mapping) -> int:
        self.asked += 1
        return self.facts.own_bytes(mapping)

    def copied(self, mapping: Mapping, name: str, way: Way, reason: str, still: bool = False) -> Fate:
        """Copied in the stop; at any time if it stands still by itself."""
        if not self.stop and not still:
            return Fate(mapping, "leave", reason)
        fate = Fate(mapping, "copy", reason, name, way=way)
        if way == "own":
            fate.whole = self.facts.backing(mapping).kind != "file" or self.facts.backing(mapping).removed
            fate.cost = self._own_bytes(mapping)
            if fate.whole:
                fate.cost = max(fate.cost, self.facts.file_data_bytes(mapping))
        elif way == "file":
            fate.cost = self.facts.file_data_bytes(mapping)
        else:
            fate.cost = self.facts.populated_bytes(mapping)
        return fate


def _group(mapping: Mapping, backing: Backing) -> str:
    if mapping.shared:
        return "shared"
    if mapping.path in ("[heap]", "[stack]"):
        return mapping.path[1:-1]
    return "anon" if backing.kind in ("anonymous", "shmem", "hugetlb") else "files"


def _file_name(mapping: Mapping) -> str:
    name = os.path.basename(mapping.path.removesuffix(DELETED)).split(" ")[0]
    return name or "file"


def _mapped_twice(fates: list[Fate], sorter: _Sorter) -> str:
    """A write through one mapping of a memory file is not seen by the tracking of another: both are copied
    while all stand, else left out. Returns a warning of what is copied."""
    files: dict[tuple[str, int], list[int]] = {}
    for number, fate in enumerate(fates):
        if fate.action == "track" and fate.mapping.has_file and not fate.zero_inode:
            files.setdefault((fate.mapping.device, fate.mapping.inode), []).append(number)
    both: set[int] = set()
    pair = None
    for numbers in files.values():
        for one, two in _overlapping(fates, numbers):
            pair = pair or (fates[one].mapping, fates[two].mapping)
            both |= {number for number in (one, two) if _written_elsewhere(fates, number, one, two)}
    for number in both:
        fate = fates[number]
        if sorter.stop:
            way: Way = "file" if fate.mapping.shared else "own"
            fates[number] = sorter.copied(fate.mapping, fate.name, way, MAPPED_TWICE)
        else:
            fate.leave_out(MAPPED_TWICE)
    if pair is None or not sorter.stop:
        return ""
    size = format_size(sum(fates[number].cost for number in both))
    text = f"{pair[0]} and {pair[1]} are two mappings of the same memory"
    return f"{text}: all such memory is copied in the stop ({size})"


def _written_elsewhere(fates: list[Fate], number: int, one: int, two: int) -> bool:
    """Of a private and a shared mapping of a file, only what the private one shows changes unseen."""
    other = two if number == one else one
    return fates[other].mapping.shared or not fates[number].mapping.shared


def _overlapping(fates: list[Fate], numbers: list[int]) -> Iterable[tuple[int, int]]:
    """Pairs of mappings of one file that hold the same pages, at least one of them shared: each mapping is in
    a pair if it is in any. One pass by offset."""
    numbers.sort(key=lambda number: fates[number].mapping.offset)
    widest: dict[bool, int] = {}  # by whether it is shared: the mapping that ends last so far
    for number in numbers:
        mapping = fates[number].mapping
        for shared, before in widest.items():
            if _file_end(fates[before].mapping) > mapping.offset and (shared or mapping.shared):
                yield before, number
        last = widest.get(mapping.shared)
        if last is None or _file_end(fates[last].mapping) < _file_end(mapping):
            widest[mapping.shared] = number


def _file_end(mapping: Mapping) -> int:
    return mapping.offset + mapping.end - mapping.start


def _keep_to(fates: list[Fate], limit: int) -> None:
    """Leave out what is too much to be copied; use what is left for clean pages of files."""
    left = limit
    copied = [fate for fate in fates if fate.action == "copy"]
    for fate in copied:
        if fate.cost > left:
            most = f"{format_size(fate.cost)} are too much to copy (--copy-limit {format_size(limit)})"
            fate.leave_out(f"{fate.reason}; {most}" if fate.reason else most)
        else:
            left -= fate.cost
    for fate in copied:
        size = fate.mapping.end - fate.mapping.start
        wanted = fate.action == "copy" and fate.way == "own" and not fate.whole and size <= WHOLE_BYTES
        if wanted and size - fate.cost <= left:
            left -= size - fate.cost
            fate.whole = True


def _fill(selection: Selection) -> None:
    selection.tracked, selection.private_files = tracked_regions(selection.fates)
    for fate in selection.fates:
        if fate.action == "track":
            continue
        mapping = fate.mapping
        if fate.action == "leave":
            selection.not_captured.append(
                NotCaptured(mapping.start, mapping.end, mapping.perms, mapping.path, fate.reason)
            )
        else:
            region = Region(region_name(fate), mapping.start, mapping.end - mapping.start)
            selection.copies.append(Copy(region, mapping, fate.way, fate.whole))


def _tell_apart(selection: Selection) -> None:
    """A heap or stack may lie in several mappings: then each part has its address in its name."""
    # Only a name without an address, which begins with a bracket, can be there twice.
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

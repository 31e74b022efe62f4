"""Which mappings of an attached process can be captured, how, and why the others cannot.

Nothing is left out silently: each mapping becomes a tracked region, a *frozen* one (copied while the
process stands still, since the kernel does not write-protect it), or a `NotCaptured` with its reason.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from snapengine.maps import Mapping, page_size_of
from snapengine.processrecord import NotCaptured
from snapengine.targets import PAGE_BYTES, Region

GROUPS = ("anon", "heap", "stack", "shared", "files")
FROZEN_EACH = 8 << 20  # bytes of one mapping; a copy of 8 MiB takes 1 ms, in which the process stands
FROZEN_ALL = 64 << 20

_RANGE = re.compile(r"(?:0x)?([0-9a-fA-F]+)-(?:0x)?([0-9a-fA-F]+)\Z")
_KERNEL = re.compile(r"\[(vvar|vvar_vclock|vsyscall|uprobes|vectors|sigpage)\]")

UNCHANGED = "not writable, and as it is in its file"
NEEDS_STOP = "the kernel write-protects no private mapping of a file: a stop cut copies it"
SHARED_FILE = "a shared mapping of a file: the file holds it"
NOT_SELECTED = "not selected"
KERNEL_DATA = "the kernel's own data, mapped into every process"
DEVICE = "device memory"
ELSEWHERE = frozenset({UNCHANGED, SHARED_FILE, NOT_SELECTED, KERNEL_DATA, DEVICE})
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
    """What becomes of each mapping."""

    tracked: list[Region] = field(default_factory=list)
    frozen: list[Region] = field(default_factory=list)
    not_captured: list[NotCaptured] = field(default_factory=list)
    frozen_bytes: int = 0
    private_files: bool = False
    """Whether a private mapping of a memory file is tracked."""

    def leave_out(self, mapping: Mapping, reason: str) -> None:
        """Note that a mapping is not captured."""
        self.not_captured.append(
            NotCaptured(mapping.start, mapping.end, mapping.perms, mapping.path, reason)
        )

    def track(self, mapping: Mapping, name: str, kind: str, page_size: int = PAGE_BYTES) -> None:
        """A tracked region; anonymous neighbours become one."""
        last = self.tracked[-1] if self.tracked else None
        plain = name == "anon" and last is not None and last.name.startswith("anon@")
        if plain and last is not None and last.addr + last.length == mapping.start:
            self.tracked[-1] = Region(last.name, last.addr, mapping.end - last.addr, page_size, kind)
            return
        size = mapping.end - mapping.start
        self.tracked.append(Region(_unique(name, mapping), mapping.start, size, page_size, kind))

    def freeze(self, mapping: Mapping, name: str, otherwise: str) -> None:
        """A region that is copied in the stop, if it is small enough for that."""
        size = mapping.end - mapping.start
        if size > FROZEN_EACH or self.frozen_bytes + size > FROZEN_ALL:
            self.leave_out(mapping, f"{otherwise}; {size} bytes are too many to copy in a stop")
            return
        self.frozen_bytes += size
        self.frozen.append(Region(_unique(name, mapping), mapping.start, size, PAGE_BYTES, "anon"))


def _unique(name: str, mapping: Mapping) -> str:
    return name if name.startswith("[") else f"{name}@{mapping.start:x}"


def _tell_apart(*lists: list[Region]) -> None:
    """A heap or stack may lie in several mappings: then each part has its address in its name."""
    counts = Counter(region.name for regions in lists for region in regions)
    for regions in lists:
        for number, region in enumerate(regions):
            if counts[region.name] > 1:
                regions[number] = replace(region, name=f"{region.name}@{region.addr:x}")


def select(
    pid: int,
    mappings: Iterable[Mapping],
    selector: Selector,
    *,
    stop: bool,
    own_pages: Iterable[Mapping] = (),
) -> Selection:
    """Sort the mappings of process `pid`.

    ``stop``: the process will stand still for a copy (what cannot change is copied without). ``own_pages``:
    read-only private mappings of files that hold pages that differ from the file (relocated data).
    """
    found = Selection()
    changed = {mapping.start for mapping in own_pages}
    for mapping in mappings:
        _sort(found, pid, mapping, selector, stop, mapping.start in changed)
    _tell_apart(found.tracked, found.frozen)
    return found


def _sort(
    found: Selection, pid: int, mapping: Mapping, selector: Selector, stop: bool, changed: bool
) -> None:
    if _KERNEL.match(mapping.path):
        found.leave_out(mapping, KERNEL_DATA)
    elif mapping.path == "[vdso]":
        found.freeze(mapping, "[vdso]", "")  # it never changes: no stop is needed
    elif mapping.shared:
        _sort_shared(found, pid, mapping, selector, stop)
    elif mapping.backing == "file":
        _sort_file(found, mapping, selector, stop, changed)
    else:
        _sort_private(found, pid, mapping, selector)


def _sort_private(found: Selection, pid: int, mapping: Mapping, selector: Selector) -> None:
    group = {"[heap]": "heap", "[stack]": "stack"}.get(mapping.path, "anon")
    if not selector.wants(mapping, group):
        found.leave_out(mapping, NOT_SELECTED)
        return
    if mapping.backing == "anonymous":
        found.track(mapping, mapping.path if group != "anon" else "anon", "anon")
        return
    size = page_size_of(mapping, pid)
    found.private_files = found.private_files or size == PAGE_BYTES
    found.track(mapping, os.path.basename(mapping.path), "hugetlb" if size > PAGE_BYTES else "anon", size)


def _sort_shared(found: Selection, pid: int, mapping: Mapping, selector: Selector, stop: bool) -> None:
    if mapping.backing != "memory file":
        device = mapping.path.startswith(("/dev/", "anon_inode:", "/dmabuf"))
        found.leave_out(mapping, DEVICE if device else SHARED_FILE)
    elif not selector.wants(mapping, "shared"):
        found.leave_out(mapping, NOT_SELECTED)
    elif mapping.path.startswith(("/SYSV", "/secretmem")) or "w" not in mapping.perms:
        why = "read-only here" if "w" not in mapping.perms else "System V and secret memory"
        why += ": the kernel does not write-protect it"
        if stop and not mapping.path.startswith("/secretmem"):
            found.freeze(mapping, os.path.basename(mapping.path), why)
        else:
            found.leave_out(mapping, why)
    else:
        size = page_size_of(mapping, pid)
        kind = "hugetlb-shared" if size > PAGE_BYTES else "shared"
        found.track(mapping, os.path.basename(mapping.path).split(" ")[0], kind, size)


def _sort_file(found: Selection, mapping: Mapping, selector: Selector, stop: bool, changed: bool) -> None:
    if "w" not in mapping.perms and not changed:
        found.leave_out(mapping, UNCHANGED)
    elif not selector.wants(mapping, "files"):
        found.leave_out(mapping, NOT_SELECTED)
    elif stop or "w" not in mapping.perms:
        # Relocated data that is read-only by now can be copied at any time.
        found.freeze(mapping, os.path.basename(mapping.path).split(" ")[0], NEEDS_STOP)
    else:
        found.leave_out(mapping, NEEDS_STOP)

"""Decides how each region of a target is tracked and read, before anything is armed."""

from __future__ import annotations

import bisect
import errno
import operator
import os
from collections import defaultdict
from functools import cached_property, partial
from itertools import pairwise
from typing import NamedTuple

from snapengine.base.arena import FileView
from snapengine.capture.layout import first_overlap, first_shared_unit, lay_out
from snapengine.errors import RegisterError, TargetGoneError, UnsupportedError
from snapengine.kernel.features import named
from snapengine.kernel.procmaps import Mapping, covering, has_ended, read_maps, touching
from snapengine.kernel.uffd import FEATURES, feature_names
from snapengine.regions import PAGE_BYTES, Region, RegionPlan, any_shared, is_shared

EVENTS = sum(bit for name, bit in FEATURES.items() if name.startswith("EVENT_"))  # no plan depends on them
SPARSE_HOLE_BYTES = 1 << 30  # markers for holes cost 5 ms and 2 MiB of page tables per GiB


class _Part(NamedTuple):
    """Bytes of a memory file, and the region that they are in."""

    start: int
    end: int
    name: str


class Plan:
    """The plans of all regions, and the descriptors and mappings they need. `close` frees those."""

    def __init__(
        self,
        regions: list[Region],
        pid: int,
        features: int,
        *,
        attached: bool = False,
        mappings: list[Mapping] | None = None,
    ) -> None:
        """``mappings``: all mappings of the target when its regions were listed; None: they are read."""
        self._listed = regions
        self.pid = pid
        self.attached = attached
        self.features = features
        self.regions: list[RegionPlan] = []
        self.warnings: list[str] = []
        self._fds: list[int] = []
        self._views: list[FileView] = []
        self._files: dict[tuple[str, int], int] = {}
        try:
            mappings = mappings or self._read_maps(regions)
        except (FileNotFoundError, ProcessLookupError):
            mappings = []
        if pid and not mappings and has_ended(pid):
            raise TargetGoneError(errno.ESRCH, f"the target process {pid} has ended")
        _refuse_overlap(regions)
        try:
            self.regions = lay_out(regions, mappings, partial(self._uncovered, mappings), self._decide)
            _refuse_shared_units(self.regions)
            self._warn_of_other_mappings(mappings)
        except BaseException:
            self.close()
            raise

    def fits(self, regions: list[Region], features: int) -> bool:
        """Whether it is the plan of that very list, for a descriptor with these features."""
        return regions is self._listed and not (features ^ self.features) & ~EVENTS

    def place(self, regions: list[Region]) -> list[tuple[Region, int]]:
        """Page numbers for regions that the engine does not see: behind all others."""
        last = self.regions[-1]
        after = last.first_page + last.pages
        placed = []
        for region in regions:
            placed.append((region, after))
            after += -(-region.length // PAGE_BYTES)
        return placed

    def close(self) -> None:
        """Close what was opened. Only after the capture's threads have ended. Idempotent."""
        for fd in self._fds:
            os.close(fd)
        for view in self._views:
            view.close()
        self._fds.clear()
        self._views.clear()

    def _read_maps(self, regions: list[Region]) -> list[Mapping]:
        pid = self.pid or "self"
        if any_shared(regions):
            return read_maps(pid)  # all: the same memory may be mapped anywhere
        start = min((region.addr for region in regions), default=0)
        end = max((region.addr + region.length for region in regions), default=0)
        return read_maps(pid, start - 1, end + 1)  # the neighbours too

    def _uncovered(self, mappings: list[Mapping], region: Region) -> list[Mapping]:
        """What to plan with for a region that is not mapped as a whole."""
        if self.attached:
            return self._what_is_left(mappings, region)
        raise RegisterError(
            errno.ENOMEM,
            f"region {region.name!r} ({region.addr:#x}, {region.length} bytes) is not mapped",
        )

    def _decide(self, plan: RegionPlan, covered: list[Mapping]) -> None:
        self._how_to_read(plan, covered)
        self._check_features(plan)

    def _what_is_left(self, mappings: list[Mapping], region: Region) -> list[Mapping]:
        """The mappings left of a region that the target has partly unmapped since it was listed. The unmapped
        part is reported as lost."""
        end = region.addr + region.length
        left = touching(mappings, region.addr, end)
        shared = is_shared(region.kind)
        same = [m for m in left if m.shared == shared and m.has_file == shared]
        return same or [Mapping(region.addr, end, "rw-p", 0, "00:00", 0, "")]

    def _how_to_read(self, plan: RegionPlan, covered: list[Mapping]) -> None:
        region = plan.region
        if region.kind == "anon":
            plan.reading = "process" if self.pid else "memory"
            plan.keep_huge = True
            plan.check = True
            if any(m.has_file and not (region.zero_inode and m.inode == region.zero_inode) for m in covered):
                # A private mapping of a memory file: its clean pages are the file's, seen by no scan.
                plan.presence = "all"
                plan.keep_huge = False
                plan.check = self.attached
                plan.own = self.attached or bool(self.features & FEATURES["WP_ASYNC"])
                plan.file, plan.file_offset = self._open_shared(plan, covered) if self.attached else (-1, 0)
            else:
                # Where the descriptor marks holes itself, they look like swapped pages and are read.
                plan.missing = not self.features & FEATURES["WP_UNPOPULATED"]
        elif region.kind == "hugetlb":
            plan.reading = "process" if self.pid else "memory"
            plan.check = True
            if self.attached and self._file_shows(plan, covered):
                plan.presence = "all"
        else:
            self._how_to_read_shared(plan, covered)

    def _file_shows(self, plan: RegionPlan, covered: list[Mapping]) -> bool:
        """Whether an unpopulated page of a private hugetlb mapping reads as a file, and not as zeros."""
        if all(mapping.path.startswith("/anon_hugepage") for mapping in covered):
            return False
        file, _ = self._open_shared(plan, covered)
        return file < 0 or os.fstat(file).st_blocks > 0

    def _how_to_read_shared(self, plan: RegionPlan, covered: list[Mapping]) -> None:
        region = plan.region
        file, offset = self._open_shared(plan, covered)
        if region.kind == "hugetlb-shared":
            # A load from a hole of a hugetlb file allocates a page from the pool, or raises SIGBUS here.
            plan.reading = "process" if self.pid else "memory"
            if file >= 0:
                plan.reading, plan.presence = "file", "all"
                self._map_shadow(plan, file, offset)
        elif file >= 0:
            plan.presence = "seek"
            plan.sparse = self._is_sparse(file, plan)
        else:
            plan.presence = "all" if self.pid or self._swap_in_use else "mincore"
            plan.reading = "process" if self.pid else "memory"
        # A page that is punched out and touched again raises a missing fault before it is zero-filled.
        plan.missing = plan.presence in ("seek", "mincore") and self._offers_missing()
        plan.file, plan.file_offset = file, offset
        # Shared memory that the target unmaps goes on in its file, where others may write it unseen; and in
        # memory of our own, another mapping may have come to its place.
        plan.check = self.attached or plan.reading == "memory"
        if self.pid and plan.presence == "seek":
            # pread() instead of a mapping in this process: mapping and unmapping each page costs more than
            # the copy, and a target that truncates its file would raise SIGBUS here.
            plan.reading = "file"
            if self.attached and not self.features & FEATURES["WP_ASYNC"]:
                # Others may fill its holes after T. (Dirty logging copies the file as it is at T.)
                plan.presence = "file"

    def _offers_missing(self) -> bool:
        """MISSING_SHMEM says what the kernel can; a peer need not have asked for it."""
        return bool(self.features & FEATURES["MISSING_SHMEM"]) or (self.pid != 0 and not self.attached)

    def _open_shared(self, plan: RegionPlan, covered: list[Mapping]) -> tuple[int, int]:
        """The memory's file and the offset of the region's first page in it; (-1, 0) if there is none that
        may be opened. It is reopened, so that the target's file position does not change."""
        region, mapping = plan.region, covered[0]
        if region.memfd >= 0:
            file = self._open(f"/proc/self/fd/{region.memfd}")
            return file, region.memfd_offset - (region.addr - plan.addr) if file >= 0 else 0
        if not all(_continues(mapping, other) for other in covered):
            return -1, 0
        # One descriptor a file: a process may map one thousands of times.
        key = (mapping.device, mapping.inode)
        if key not in self._files:
            self._files[key] = self._open_mapped(region, covered)
        file = self._files[key]
        return file, mapping.offset + plan.addr - mapping.start if file >= 0 else 0

    def _open_mapped(self, region: Region, covered: list[Mapping]) -> int:
        """The file of these mappings, or of what is left of them since they were listed."""
        for mapping in covered:
            if (file := self._open(self._path_of(mapping))) >= 0:
                return file
        if os.path.lexists(self._path_of(covered[0])):
            return -1  # it still exists and may not be opened
        try:
            mappings = read_maps(self.pid or "self")
        except (FileNotFoundError, ProcessLookupError):
            return -1  # it has ended: arming reports that
        for mapping in touching(mappings, region.addr, region.addr + region.length):
            if _continues(covered[0], mapping) and (file := self._open(self._path_of(mapping))) >= 0:
                return file
        return -1

    def _path_of(self, mapping: Mapping) -> str:
        return f"/proc/{self.pid or 'self'}/map_files/{mapping.start:x}-{mapping.end:x}"

    def _open(self, path: str) -> int:
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return -1  # map_files needs CAP_CHECKPOINT_RESTORE; without it mincore() is used
        self._fds.append(file)
        return file

    def _is_sparse(self, file: int, plan: RegionPlan) -> bool:
        holes = plan.pages * PAGE_BYTES - os.fstat(file).st_blocks * 512
        # In rounds a page must have an entry in the page tables to be reported, or a marker.
        rounds = self.features & FEATURES["WP_ASYNC"]
        return holes > SPARSE_HOLE_BYTES and not rounds and bool(self.features & FEATURES["MISSING_SHMEM"])

    def _map_shadow(self, plan: RegionPlan, file: int, offset: int) -> None:
        """Map the same huge pages in this process: what is punched out of the file leaves the mapping."""
        size = plan.region.page_size
        whole = plan.addr % size == 0 and plan.pages * PAGE_BYTES % size == 0 and offset % size == 0
        if not whole:
            return
        view = FileView(file, offset, plan.pages * PAGE_BYTES)
        self._views.append(view)
        plan.shadow = view.addr

    def _warn_of_other_mappings(self, mappings: list[Mapping]) -> None:
        """Shared memory that is mapped twice can be written through the other mapping, unseen."""
        seen: dict[tuple[str, int], list[_Part]] = defaultdict(list)
        ours = set()
        for plan in self.regions:
            if not plan.shared:
                continue
            for mapping in covering(mappings, plan.region.addr, plan.region.addr + plan.region.length):
                start = max(plan.addr, mapping.start) - mapping.start + mapping.offset
                end = min(plan.track_end, mapping.end) - mapping.start + mapping.offset
                ours.add(mapping.start)
                if mapping.shared and mapping.inode:
                    seen[mapping.device, mapping.inode].append(_Part(start, end, plan.region.name))
        if not seen:
            return
        for parts in seen.values():
            parts.sort()
            _refuse_second_mapping(parts)
        for other in mappings:
            parts = seen.get((other.device, other.inode), [])
            if not parts or not other.shared or other.start in ours or "w" not in other.perms:
                continue
            last = other.offset + other.end - other.start
            # The parts do not overlap, so their ends are in order as well.
            number = bisect.bisect_right(parts, other.offset, key=operator.itemgetter(1))
            while number < len(parts) and parts[number].start < last:
                self.warnings.append(
                    f"region {parts[number].name!r} is mapped a second time at {other.start:#x}: "
                    "writes there are not seen"
                )
                number += 1

    @cached_property
    def _swap_in_use(self) -> bool:
        """mincore() reports a swapped-out page of shared memory as absent, like a hole."""
        with open("/proc/swaps", encoding="utf-8") as lines:
            return len(lines.readlines()) > 1

    def _check_features(self, plan: RegionPlan) -> None:
        need = FEATURES["PAGEFAULT_FLAG_WP"]
        if plan.region.kind != "anon":
            need |= FEATURES["WP_HUGETLBFS_SHMEM"]
        if lacking := need & ~self.features:
            names = ", ".join(map(named, feature_names(lacking)))
            raise UnsupportedError(
                errno.EOPNOTSUPP,
                f"region {plan.region.name!r} ({plan.region.kind}): the userfaultfd lacks {names}"
                + ("; save the rest with --regions anon,heap,stack,files" if self.attached else ""),
            )


def _continues(mapping: Mapping, other: Mapping) -> bool:
    """Whether both are parts of one mapping of a file."""
    same = (mapping.device, mapping.inode) == (other.device, other.inode)
    return same and mapping.offset - mapping.start == other.offset - other.start


def _refuse_second_mapping(parts: list[_Part]) -> None:
    """`parts`: of one file, in order."""
    for one, two in pairwise(parts):
        if one.end > two.start:
            raise RegisterError(
                errno.EINVAL,
                f"regions {one.name!r} and {two.name!r} are two mappings of the same memory: "
                "a write through one is not seen in the other",
            )


def _refuse_overlap(regions: list[Region]) -> None:
    if pair := first_overlap(regions):
        raise ValueError(f"regions {pair[0].name!r} and {pair[1].name!r} overlap")


def _refuse_shared_units(plans: list[RegionPlan]) -> None:
    """Releasing a huge page would release both regions."""
    if pair := first_shared_unit(plans):
        names = f"{pair[0].region.name!r} and {pair[1].region.name!r}"
        raise ValueError(f"regions {names} share a huge page: save them as one")

"""ProcessTarget: any running process, without its cooperation.

One thread is stopped for a fraction of a millisecond and made to open a userfaultfd. The descriptor is copied
to this process and closed in the target at once (`snapengine.process.inject`). Everything else is done from
outside.

There are two cuts. *Soft*: the threads keep running while their memory is protected. No fault is served
before the last protect call has returned. So a write that is in the image was complete before T, and so was
everything that happened before it: the image is causally consistent, though at no instant were all threads
stopped. *Stop*: all threads are stopped while the memory is protected. Registers, and memory that the kernel
cannot write-protect, are captured during that stop, so the image makes a real core.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from collections.abc import Iterable

from snapengine.errors import AlreadyTrackedError, AttachError, TargetGoneError
from snapengine.kernel.procmaps import Mapping, maps_text, parse_maps, read_maps, touching
from snapengine.kernel.threads import ends
from snapengine.kernel.uffd import Uffd
from snapengine.options import COPY_LIMIT, METHODS, WRITE_TRACKING
from snapengine.process import permissions
from snapengine.process.claim import Claim
from snapengine.process.copied import copy_all
from snapengine.process.freezer import Freezer
from snapengine.process.inject import inject_userfaultfd
from snapengine.process.mapping_facts import MapFacts
from snapengine.process.record import Cut, ProcessRecord, read_process
from snapengine.process.selection import UNCHANGED, Selection, Selector, parse_regions, select
from snapengine.process.try_register import refusal, refused_regions
from snapengine.regions import PAGE_BYTES, Region, any_shared
from snapengine.result import NotCaptured
from snapengine.targets.base import AttachedTarget, Copied

APPEARED = "mapped while the snapshot began"
PRIVATE_UNSEEN = (
    "private mappings of memory files: pages that the process has not written belong to the file, and "
    "writes to the file after T are not seen"
)
SHARED_UNSEEN = "shared memory: writes by other processes, or through its file, are not seen"


class ProcessTarget(AttachedTarget):
    """A running process, by its id.

    Parameters
    ----------
    pid:
        The process.
    regions:
        What to capture: ``"all"``, or a list of ``anon``, ``heap``, ``stack``, ``shared``, ``files`` and
        hexadecimal ``START-END``, separated by commas.
    cut:
        ``"soft"`` or ``"stop"``. Dirty logging always stops all threads, at the end.
    method:
        As in `Options`; a capture with another method refuses the target.
    copy_limit:
        As in `Options`; None: the value of the capture's options.
    deadline:
        Seconds that a thread may take to stop (it may be in an uninterruptible wait). After that the attempt
        is undone.

    Raises (when the capture opens it)
    ----------------------------------
    AttachError
        No such process, a kernel thread, a 32-bit or a traced process, no permission, seccomp; the text says.
    TargetGoneError
        The process ended.
    """

    def __init__(
        self,
        pid: int,
        regions: str | Selector = "all",
        *,
        cut: Cut = "soft",
        method: str = WRITE_TRACKING,
        copy_limit: int | None = None,
        deadline: float = 1.0,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method: {method!r} is none of {', '.join(METHODS)}")
        if cut not in ("soft", "stop"):
            raise ValueError(f"cut: {cut!r} is none of soft, stop")
        super().__init__(int(pid), copy_limit)
        self.found = os.path.exists(f"/proc/{self.pid}")
        self.method = method
        self.cut: Cut = "stop" if method != WRITE_TRACKING else cut
        self.can_pause = self.cut == "stop"
        self.stops_first = method == WRITE_TRACKING and cut == "stop"
        self._selector = parse_regions(regions) if isinstance(regions, str) else regions
        self._deadline = deadline
        self._info: permissions.ProcessInfo | None = None
        self._freezer: Freezer | None = None
        self._claim: Claim | None = None
        self._selection = Selection()
        self._tracked: list[Region] = []
        self._listed = b""
        self._mappings: list[Mapping] = []
        self._record: ProcessRecord | None = None

    # -- what a capture calls --

    def check(self) -> None:
        """Raise AttachError or TargetGoneError if the process cannot be attached to."""
        try:
            self._info = permissions.check_to_save(self.pid)
        except AttachError as error:
            if self.found and error.errno == errno.ESRCH and ends(self.pid):
                raise TargetGoneError(errno.ESRCH, f"process {self.pid} has ended") from None
            raise

    def look_ahead(self) -> list[Region] | None:
        """The regions that would be tracked now, before `open` stops the threads. `open` returns the same
        list if the mappings have not changed, so that the stop need not wait for planning."""
        if not self.stops_first:
            return None
        self._list()
        return self._tracked

    @property
    def is_stopped(self) -> bool:  # type: ignore[override]
        """Whether everything that could change the mappings is stopped now. False if a process that shares
        the memory may have been missed."""
        return self._freezer is not None and self._freezer.stopped and self._freezer.sharers_known

    @property
    def mappings(self) -> list[Mapping]:
        """The mappings at the time when the regions were listed."""
        return self._mappings

    def open(self, features: int) -> tuple[int, int, list[Region]]:
        """Attach. The descriptor is not negotiated yet."""
        if self._info is None:
            self.check()
        info = self._info
        assert info is not None
        if info.ksm_pages and ksm_runs():
            self.warnings.append(
                f"KSM has merged {info.ksm_pages} pages of the process, and may merge more: that drops their "
                "protection, and they are lost to the image (write 0 to /sys/kernel/mm/ksm/run meanwhile)"
            )
        ahead = bool(self._listed)
        if ahead:  # before its threads are stopped
            self.warnings += kernel_writers(self.pid, self.cut, self._listed)
        self._claim = Claim(self.pid)
        try:
            injected = inject_userfaultfd(self.pid, deadline=self._deadline, info=info)
        except BaseException:
            self._claim.release()
            raise
        self.injection_ns = injected.stop_ns
        try:
            # Write tracking with a stop: the threads are stopped from here on, so no mapping can be made or
            # removed between this list and T. Otherwise new mappings are reported, and removed ones are lost.
            if self.cut == "stop" and self.method == WRITE_TRACKING:
                self._stop()
            self._list()
            if not ahead:
                self.warnings += kernel_writers(self.pid, self.cut, self._listed)
            if any_shared(self._tracked):
                self.warnings.append(SHARED_UNSEEN)
            if self._selection.private_files:
                self.warnings.append(PRIVATE_UNSEEN)
        except BaseException:
            os.close(injected.fd)
            self._resume()
            self._claim.release()
            raise
        return self.pid, injected.fd, self._tracked

    def registered(self, uffd: Uffd) -> list[Region]:
        """Register the regions with `uffd`, and return those that the kernel accepts. The others are copied,
        or reported as not captured."""
        refused = self._register(uffd)
        if refused:
            self._select(MapFacts(self.pid, refused))
        if not self._tracked:
            raise AttachError(errno.EINVAL, f"process {self.pid}: no memory that can be tracked is selected")
        if self.method == WRITE_TRACKING:
            self._copy()
        return self._tracked

    def pause(self) -> None:
        """Stop all threads, unless they are stopped already."""
        if self._freezer is None:
            self._stop()
            self._copy()

    def vmstate(self) -> dict[str, bytes]:
        """No blobs yet: see `record`. Dirty logging records the process here, at T."""
        if self.method != WRITE_TRACKING:
            self._record_process(self._read_maps())
        return {}

    def resume(self) -> None:
        """Resume the threads."""
        self._resume()

    def armed(self) -> None:
        """T is fixed, and the threads run. A soft cut records the mappings now; a stop cut has them."""
        self._record_process(self._mappings if self.cut == "stop" else self._read_maps())

    def record(self) -> dict[str, bytes]:
        """The blobs that describe the process at T (FORMAT.md, "Blobs of an attached process")."""
        assert self._record is not None
        threads = self._freezer.threads() if self._freezer is not None else []
        record = dataclasses.replace(self._record, threads=threads, not_captured=self.not_captured)
        return record.to_vmstate()

    def late_warnings(self) -> list[str]:
        """The limits of the stop, and writable mappings of the shared memory that were made after T."""
        stop = self._freezer.warnings() if self._freezer is not None else []
        return stop + self._mapped_again()

    def _mapped_again(self) -> list[str]:
        """Writable mappings of tracked shared memory made after T, whose writes are not seen."""
        if self._record is None or self.method != WRITE_TRACKING:
            return []
        tracked = {region.addr for region in self._tracked}
        ours = [m for m in self._record.mappings if m.shared and m.start in tracked]
        if not ours:
            return []
        files = {(m.inode, m.device) for m in ours if m.inode}
        known = {(m.start - m.offset, m.inode, m.device) for m in self._record.mappings}
        try:
            mappings = read_maps(self.pid)
        except (FileNotFoundError, ProcessLookupError):
            mappings = []
        if not mappings:
            return ["the process ended before it could be checked for new mappings of its shared memory"]
        return [
            f"{m.path} was mapped again at {m.start:#x} after T: writes there are not seen"
            for m in mappings
            if m.shared and "w" in m.perms and (m.start - m.offset, m.inode, m.device) not in known
            and (m.inode, m.device) in files
        ]  # fmt: skip

    @property
    def stop_ns(self) -> int:
        """How long all threads were stopped, in nanoseconds; 0: they never were."""
        return self._freezer.stop_ns if self._freezer is not None else 0

    def close(self, status: str) -> None:
        """Resume the threads, if they are stopped. Idempotent."""
        try:
            self._resume()
        finally:
            if self._claim is not None:
                self._claim.release()

    # -- parts --

    def _stop(self) -> None:
        self._freezer = Freezer(self.pid, deadline=self._deadline)
        self._freezer.stop()

    def _resume(self) -> None:
        if self._freezer is not None:
            self._freezer.resume()

    def _list(self) -> None:
        """List the mappings and decide about each, unless nothing has changed since the last time."""
        text = self._maps_text()
        facts = MapFacts(self.pid)
        unchanged = [item.mapping for item in self._selection.decisions if item.reason == UNCHANGED]
        if text == self._listed and not any(map(facts.own_bytes, unchanged)):
            return
        self._listed, self._mappings = text, parse_maps(text)
        self._select(facts)

    def _select(self, facts: MapFacts) -> None:
        limit = COPY_LIMIT if self.copy_limit is None else self.copy_limit
        stop = self.cut == "stop"
        selection = select(self.pid, self._mappings, self._selector, stop=stop, limit=limit, facts=facts)
        self._selection = selection
        if selection.warning and selection.warning not in self.warnings:
            self.warnings.append(selection.warning)
        self._tracked = selection.tracked
        self.copied_regions = selection.copied
        self.not_captured = selection.not_captured
        self.events = self._events(selection)

    def _register(self, uffd: Uffd) -> dict[int, int]:
        """Register the regions. The refused mappings: from the start of each to the errno."""
        refused: dict[int, int] = {}
        with open(f"/proc/{self.pid}/maps", "rb", buffering=0) as maps:
            all_mappings = self._mappings if self.is_stopped else None
            for region in refused_regions(uffd, maps.fileno(), self._tracked, all_mappings):
                for mapping in touching(self._mappings, region.addr, region.addr + region.length):
                    if error := refusal(uffd, maps.fileno(), mapping.start, mapping.end):
                        refused[mapping.start] = error
        if not refused:
            return refused
        tracked_by_others = [m for m in self._mappings if refused.get(m.start) == errno.EBUSY]
        if tracked_by_others and not has_userfaultfd(self.pid):
            raise AlreadyTrackedError(
                errno.EBUSY,
                f"process {self.pid}: {tracked_by_others[0]} is already being tracked by another "
                "userfaultfd, which is not its own: another capture of it is running",
            )
        return refused

    def _copy(self) -> None:
        try:
            self._copied = [*copy_all(self.pid, self._selection.copies)]
        except (FileNotFoundError, ProcessLookupError):
            raise TargetGoneError(errno.ESRCH, f"process {self.pid} has ended") from None

    def _events(self, selection: Selection) -> frozenset[str]:
        """The events to ask for. Each blocks the call that causes it until it is read, so only those that no
        check after the copy replaces."""
        if self.method != WRITE_TRACKING:
            return frozenset()
        shared = any_shared(selection.tracked)
        return frozenset(["EVENT_REMAP"] * shared + ["EVENT_REMOVE"] * selection.private_files)

    def _maps_text(self) -> bytes:
        try:
            text = maps_text(self.pid)
        except (FileNotFoundError, ProcessLookupError):
            text = b""
        if not text:
            raise TargetGoneError(3, f"process {self.pid} has ended")
        return text

    def _read_maps(self) -> list[Mapping]:
        """The mappings as they are now; the same list object if nothing has changed."""
        text = self._maps_text()
        return self._mappings if text == self._listed else parse_maps(text)

    def _record_process(self, mappings: list[Mapping]) -> None:
        self._record = read_process(self.pid, self.cut, mappings=mappings)
        if mappings is not self._mappings:  # all of the latter were tracked, copied or left out
            self._report_new(mappings)
            if self.cut == "soft":
                self._invalidate_writable(mappings)
        for region, copied in zip(self.copied_regions, self._copied, strict=True):
            for start, end in _unreadable(region, copied):
                self.not_captured.append(NotCaptured(start, end, "---p", region.name, "not readable"))

    def _report_new(self, mappings: list[Mapping]) -> None:
        known = [(region.addr, region.addr + region.length) for region in self._tracked + self.copied_regions]
        known += [(item.start, item.end) for item in self.not_captured]
        for mapping in appeared(mappings, known):
            self.not_captured.append(
                NotCaptured(mapping.start, mapping.end, mapping.perms, mapping.path, APPEARED)
            )

    def _invalidate_writable(self, mappings: list[Mapping]) -> None:
        """A soft cut copies only read-only mappings: one that has become writable may have been written."""
        same = {(mapping.start, mapping.end): mapping.perms for mapping in mappings}
        for number, region in enumerate(self.copied_regions):
            if "w" in same.get((region.addr, region.addr + region.length), "w"):
                self._copied[number] = None


def _unreadable(region: Region, copied: Copied | None) -> list[tuple[int, int]]:
    if copied is None:
        return [(region.addr, region.addr + region.length)]
    starts = [region.addr + page * PAGE_BYTES for page in copied.unreadable]
    return [(start, start + PAGE_BYTES) for start in starts]


def kernel_writers(pid: int, cut: Cut, maps: bytes = b"") -> list[str]:
    """`permissions.kernel_writers`. Workers count only in a stop cut: in tracked memory they fault like
    threads."""
    try:
        found = permissions.kernel_writers(pid, maps)
    except (FileNotFoundError, ProcessLookupError):
        return []  # it ends, as attaching will report
    return [text for text in found if cut == "stop" or "AIO" in text]


def ksm_runs() -> bool:
    """Whether the kernel merges equal pages at the moment (Documentation/admin-guide/mm/ksm.rst)."""
    try:
        with open("/sys/kernel/mm/ksm/run", encoding="ascii") as file:
            return file.read().strip() == "1"
    except OSError:
        return False


def has_userfaultfd(pid: int) -> bool:
    """Whether a process has a userfaultfd of its own. Raises OSError."""
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if os.readlink(f"/proc/{pid}/fd/{number}") == "anon_inode:[userfaultfd]":
                return True
    return False


def appeared(mappings: Iterable[Mapping], known: list[tuple[int, int]]) -> list[Mapping]:
    """The parts of `mappings` that lie in none of the ranges `known`."""
    found = []
    ranges = sorted(known)
    at = 0
    for mapping in mappings:
        start = mapping.start
        while at < len(ranges) and ranges[at][1] <= start:
            at += 1
        number = at
        while start < mapping.end:
            if number == len(ranges) or ranges[number][0] >= mapping.end:
                found.append(dataclasses.replace(mapping, start=start))
                break
            if ranges[number][0] > start:
                found.append(dataclasses.replace(mapping, start=start, end=ranges[number][0]))
            start = max(start, ranges[number][1])
            number += 1
    return found


def size_bound(regions: Iterable[Region]) -> int:
    """An upper bound of the bytes in the regions' pages."""
    return sum(-(-region.length // PAGE_BYTES) * PAGE_BYTES for region in regions)

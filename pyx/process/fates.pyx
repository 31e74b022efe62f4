"""What becomes of each mapping: the loops over all of them. `snapengine.process.selection` decides.

A process may have 65 000 mappings of a handful of kinds. What was decided for one without asking about that
one alone holds for all of its kind, and is decided once.
"""

cimport cython
from libc.stdint cimport uint64_t

from snapengine.kernel.procmaps_line cimport Mapping
from snapengine.regions cimport Region


@cython.no_gc
@cython.dataclasses.dataclass
cdef class Fate:
    """What becomes of one mapping. ``reason``: why it is not tracked. ``way``, ``cost`` (bytes that count
    against the limit) and ``whole`` say how it is copied, ``kind`` and ``page_size`` how it is tracked."""

    mapping: Mapping
    action: str
    reason: str = ""
    name: str = ""
    kind: str = "anon"
    page_size: uint64_t = 4096
    way: str = "populated"
    cost: uint64_t = 0
    whole: cython.bint = False
    zero_inode: uint64_t = 0

    def leave_out(self, str reason not None):
        """Not captured after all."""
        self.action, self.reason = "leave", reason

    cdef Fate of(self, Mapping mapping):
        cdef Fate fate = Fate.__new__(Fate)
        fate.mapping = mapping
        fate.action = self.action
        fate.reason = self.reason
        fate.name = self.name
        fate.kind = self.kind
        fate.page_size = self.page_size
        fate.way = self.way
        fate.cost = self.cost
        fate.whole = self.whole
        fate.zero_inode = self.zero_inode
        return fate


cdef bint _alike(Mapping one, Mapping other) noexcept:
    """Whether two lines of a list share their texts, as neighbours of one kind do (`procmaps_line`)."""
    return one.perms is other.perms and one.device is other.device and one.path is other.path \
        and one.inode == other.inode


def sort_mappings(mappings, sorter, dict refused not None):
    """`sorter.fate` of each mapping, by address. ``sorter.asked`` counts what it had to ask about a mapping
    alone. ``refused``: the starts of those that the kernel refuses to track."""
    cdef Mapping mapping
    cdef Fate fate
    cdef Fate model = None
    cdef dict kinds = {}
    cdef list fates = []
    for mapping in mappings:
        if refused and mapping.start in refused:
            fates.append(sorter.fate(mapping))
            continue
        if model is None or not _alike(model.mapping, mapping):
            kind = (mapping.perms, mapping.device, mapping.inode, mapping.path)
            model = kinds.get(kind)
            if model is None:
                asked = sorter.asked
                fate = sorter.fate(mapping)
                fates.append(fate)
                # What a copy costs is its own.
                if sorter.asked == asked and fate.action != "copy":
                    model = kinds[kind] = fate
                continue
        fates.append(model.of(mapping))
    return fates


def region_name(Fate fate not None):
    """The kernel's own name of the mapping, or a name with the address."""
    return fate.name if fate.name.startswith("[") else f"{fate.name}@{fate.mapping.start:x}"


def tracked_regions(list fates not None):
    """The regions that are tracked, of which anonymous neighbours become one; and whether a private mapping
    of a memory file is among them."""
    cdef Fate fate
    cdef Region region
    cdef Region last = None
    cdef bint private_files = False
    cdef bint plain = False             # whether the last one may grow
    cdef bint alike
    cdef uint64_t last_end = 0
    cdef uint64_t last_zeros = 0
    cdef list regions = []
    for fate in fates:
        if fate.action != "track":
            continue
        # A file may be named "anon", too: its memory is a region of its own, of its own kind.
        alike = fate.name == "anon" and fate.kind == "anon" \
            and (not fate.mapping.has_file or fate.zero_inode != 0)
        if plain and alike and last_end == fate.mapping.start and last_zeros == fate.zero_inode:
            last_end = fate.mapping.end
            last.length = last_end - <uint64_t>last.addr     # nobody has seen it yet
            continue
        if fate.kind == "anon" and fate.mapping.has_file and not fate.zero_inode:
            private_files = True
        last_end, last_zeros = fate.mapping.end, fate.zero_inode
        region = Region.__new__(Region)
        region.name = region_name(fate)
        region.addr = fate.mapping.start
        region.length = last_end - fate.mapping.start
        region.page_size = fate.page_size
        region.kind = fate.kind
        region.memfd = -1
        region.memfd_offset = 0
        region.zero_inode = last_zeros
        regions.append(region)
        last = region
        plain = alike
    return regions, private_files

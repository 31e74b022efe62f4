"""The loops that decide about all mappings of a process. `snapengine.process.selection` has the rules.

A process may have 65 000 mappings of few kinds. A decision that needs no information about the single mapping
holds for its kind, and is made once.
"""

cimport cython
from libc.stdint cimport uint64_t

from snapengine.kernel.procmaps_line cimport Mapping
from snapengine.regions cimport Region


@cython.no_gc
@cython.dataclasses.dataclass
cdef class Decision:
    """What is done with one mapping. ``reason``: why it is not tracked. ``way``, ``cost`` (bytes that count
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
        """Change the decision: do not capture the mapping."""
        self.action, self.reason = "leave", reason

    cdef Decision of(self, Mapping mapping):
        cdef Decision decision = Decision.__new__(Decision)
        decision.mapping = mapping
        decision.action = self.action
        decision.reason = self.reason
        decision.name = self.name
        decision.kind = self.kind
        decision.page_size = self.page_size
        decision.way = self.way
        decision.cost = self.cost
        decision.whole = self.whole
        decision.zero_inode = self.zero_inode
        return decision


cdef bint _alike(Mapping one, Mapping other) noexcept:
    """Whether two mappings share their text objects, as the parser makes it for neighbours of one kind."""
    return one.perms is other.perms and one.device is other.device and one.path is other.path \
        and one.inode == other.inode


def decide_all(mappings, decider, dict refused not None):
    """`decider.decide()` of each mapping, by address. ``decider.asked`` counts the questions whose answer
    holds for one mapping only. ``refused``: the starts of the mappings that the kernel refuses to track."""
    cdef Mapping mapping
    cdef Decision decision
    cdef Decision model = None
    cdef dict kinds = {}
    cdef list decisions = []
    for mapping in mappings:
        if refused and mapping.start in refused:
            decisions.append(decider.decide(mapping))
            continue
        if model is None or not _alike(model.mapping, mapping):
            kind = (mapping.perms, mapping.device, mapping.inode, mapping.path)
            model = kinds.get(kind)
            if model is None:
                asked = decider.asked
                decision = decider.decide(mapping)
                decisions.append(decision)
                # The cost of a copy differs from mapping to mapping.
                if decider.asked == asked and decision.action != "copy":
                    model = kinds[kind] = decision
                continue
        decisions.append(model.of(mapping))
    return decisions


def region_name(Decision decision not None):
    """The kernel's name of the mapping ("[heap]"), or a name with the address."""
    return decision.name if decision.name.startswith("[") else f"{decision.name}@{decision.mapping.start:x}"


def tracked_regions(list decisions not None):
    """The tracked regions, with adjacent anonymous mappings merged into one; and whether any of them is a
    private mapping of a memory file."""
    cdef Decision decision
    cdef Region region
    cdef Region last = None
    cdef bint private_files = False
    cdef bint plain = False             # whether the last one may grow
    cdef bint alike
    cdef uint64_t last_end = 0
    cdef uint64_t last_zeros = 0
    cdef list regions = []
    for decision in decisions:
        if decision.action != "track":
            continue
        # A file may also be named "anon": its memory is not merged with anonymous memory.
        alike = decision.name == "anon" and decision.kind == "anon" \
            and (not decision.mapping.has_file or decision.zero_inode != 0)
        if plain and alike and last_end == decision.mapping.start and last_zeros == decision.zero_inode:
            last_end = decision.mapping.end
            last.length = last_end - <uint64_t>last.addr     # not shared yet
            continue
        if decision.kind == "anon" and decision.mapping.has_file and not decision.zero_inode:
            private_files = True
        last_end, last_zeros = decision.mapping.end, decision.zero_inode
        region = Region.__new__(Region)
        region.name = region_name(decision)
        region.addr = decision.mapping.start
        region.length = last_end - decision.mapping.start
        region.page_size = decision.page_size
        region.kind = decision.kind
        region.memfd = -1
        region.memfd_offset = 0
        region.zero_inode = last_zeros
        regions.append(region)
        last = region
        plain = alike
    return regions, private_files

"""The hand-over message: mappings of a peer as JSON, and the control lines after it.

Both sides of the protocol, without sockets. A peer connects to the engine's Unix stream socket, then

1. the engine sends one line ``{"snapengine": 1, "features": BITS}``: the userfaultfd features that it
   wants. A peer with fixed features (Firecracker) need not read it.
2. the peer sends a JSON array of mappings, with the userfaultfd as SCM_RIGHTS. This is the message of
   Firecracker's snapshot loading (``base_host_virt_addr``, ``size``, ``offset``, ``page_size``,
   ``page_size_kib``: the last is an old name, and also in bytes), with optional keys of snapengine:
   ``name``; ``kind`` (one of `regions.KINDS`); ``memfd``, the index of a passed descriptor (the
   userfaultfd is 0) in which the mapping begins at ``offset``, sealed with F_SEAL_SHRINK; and in the
   first mapping
   ``"snapengine": {"version": 1, "controls": ["pause", "resume", "vmstate", "stats"]}``.
3. the engine sends commands such as ``{"cmd": "pause"}``, a line each, only those that were announced. The
   peer answers each with a line ``{"ok": true, ...}`` or ``{"ok": false, "error": "..."}``.
4. the engine sends ``{"cmd": "done", "status": "..."}`` and closes.

The peer must close its own copy of the userfaultfd as soon as it is sent. Every open copy keeps the
protection in force: if a peer kept one and the engine died, the peer's writers would wait for ever.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from snapengine.errors import HandoverError
from snapengine.regions import KINDS, Region

VERSION = 1
CONTROLS = ("pause", "resume", "vmstate", "stats")
MAX_MESSAGE_BYTES = 1 << 20
MAX_MAPPINGS = 4096
MAX_FDS = 64
MAX_DEPTH = 8
MAX_NAME_BYTES = 255
PAGE_SIZES = (4096, 2 << 20, 1 << 30)
ADDRESS_END = 1 << 47  # of user space with 4-level page tables


@dataclass(frozen=True, slots=True)
class Mapping:
    """One mapping as the peer claims it. `memfd` is an index into the passed descriptors, or -1; `kind` is ""
    if the peer did not state it."""

    name: str
    addr: int
    length: int
    offset: int
    page_size: int
    kind: str = ""
    memfd: int = -1


@dataclass(frozen=True, slots=True)
class Offer:
    """A whole hand-over message."""

    mappings: tuple[Mapping, ...]
    controls: frozenset[str] = frozenset()

    @property
    def fds_needed(self) -> int:
        """Descriptors that belong to the message: the userfaultfd and the memfds."""
        return 1 + max(0, *(mapping.memfd for mapping in self.mappings))


class ArrayScanner:
    """Finds the end of a JSON array that arrives in pieces; reads each byte once.

    HandoverError if it is not an array, nests deeper than `MAX_DEPTH` or is longer than `MAX_MESSAGE_BYTES`.
    """

    def __init__(self) -> None:
        self.data = bytearray()
        self.complete = False
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def feed(self, piece: bytes) -> bytes:
        """Take bytes; return what follows the array (b"" while it is not complete)."""
        for at, byte in enumerate(piece):
            if self.complete:
                return piece[at:]
            self._step(byte)
            if len(self.data) > MAX_MESSAGE_BYTES:
                raise HandoverError(f"hand-over message: longer than {MAX_MESSAGE_BYTES} bytes")
        return b""

    def _step(self, byte: int) -> None:
        if self._depth == 0 and byte not in b"[ \t\r\n":
            raise HandoverError("hand-over message: not a JSON array")
        self.data.append(byte)
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif byte == 0x5C:
                self._escaped = True
            elif byte == 0x22:
                self._in_string = False
        elif byte == 0x22:
            self._in_string = True
        elif byte in b"[{":
            self._depth += 1
            if self._depth > MAX_DEPTH:
                raise HandoverError(f"hand-over message: nested deeper than {MAX_DEPTH}")
        elif byte in b"]}":
            self._depth -= 1
            self.complete = self._depth == 0


def parse_offer(data: bytes | bytearray) -> Offer:
    """Parse the message, and check all that needs no system call. HandoverError names the mapping and the
    reason."""
    items = strict_json(data, "hand-over message")
    if not isinstance(items, list):
        raise HandoverError("hand-over message: not a JSON array")
    if not items:
        raise HandoverError("hand-over message: no mappings")
    if len(items) > MAX_MAPPINGS:
        raise HandoverError(f"hand-over message: {len(items)} mappings, at most {MAX_MAPPINGS} are allowed")
    mappings = tuple(_mapping(item, index) for index, item in enumerate(items))
    _check_distinct(mappings)
    return Offer(mappings, _controls(items[0].get("snapengine")))


def encode_offer(regions: Sequence[Region], memfds: Sequence[int], controls: Sequence[str] = ()) -> bytes:
    """The message of a peer that has `regions`. `memfds` are the descriptors passed after the userfaultfd;
    a region's `memfd` is one of them or -1."""
    items: list[dict[str, Any]] = []
    for region in regions:
        item = {
            "base_host_virt_addr": region.addr,
            "size": region.length,
            "offset": region.memfd_offset,
            "page_size": region.page_size,
            "page_size_kib": region.page_size,
            "name": region.name,
            "kind": region.kind,
        }
        if region.memfd >= 0:
            item["memfd"] = 1 + memfds.index(region.memfd)
        items.append(item)
    if controls:
        items[0]["snapengine"] = {"version": VERSION, "controls": list(controls)}
    return json.dumps(items).encode()


def strict_json(data: bytes | bytearray, what: str) -> Any:
    """Parse UTF-8 JSON. HandoverError also for NaN, Infinity, repeated keys and too deep nesting."""
    try:
        return json.loads(
            data.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_distinct_keys
        )
    except (ValueError, RecursionError) as error:
        raise HandoverError(f"{what}: not valid JSON: {str(error)[:120]}") from None


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is repeated")
    return result


def _mapping(item: Any, index: int) -> Mapping:
    where = f"mapping {index}"
    if not isinstance(item, dict):
        raise HandoverError(f"{where}: not an object")
    name = item.get("name", f"region{index}")
    if not isinstance(name, str) or not name.isprintable() or not 0 < _utf8_bytes(name) <= MAX_NAME_BYTES:
        raise HandoverError(f"{where}: name: not a printable string of 1 to {MAX_NAME_BYTES} bytes")
    where = f"mapping {index} ({name[:40]})"
    kind = item.get("kind", "")
    if not isinstance(kind, str) or (kind not in KINDS and "kind" in item):
        raise HandoverError(f"{where}: kind: none of {', '.join(KINDS)}")
    page_size = _integer(item, "page_size", where, _integer(item, "page_size_kib", where, PAGE_SIZES[0]))
    if page_size not in PAGE_SIZES:
        raise HandoverError(f"{where}: page_size: {page_size} is none of {', '.join(map(str, PAGE_SIZES))}")
    mapping = Mapping(
        name=name,
        addr=_integer(item, "base_host_virt_addr", where),
        length=_integer(item, "size", where),
        offset=_integer(item, "offset", where, 0),
        page_size=page_size,
        kind=kind,
        memfd=_integer(item, "memfd", where) if "memfd" in item else -1,
    )
    _check_ranges(mapping, where)
    return mapping


def _utf8_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _integer(item: dict[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = item.get(key, default) if key in item or default is not None else None
    if type(value) is not int:  # a bool is an int to isinstance()
        raise HandoverError(f"{where}: {key}: {'not an integer' if key in item else 'missing'}")
    if value < 0:
        raise HandoverError(f"{where}: {key}: negative")
    return value


def _check_ranges(mapping: Mapping, where: str) -> None:
    if mapping.length == 0:
        raise HandoverError(f"{where}: size: zero")
    for key, value in (
        ("base_host_virt_addr", mapping.addr),
        ("size", mapping.length),
        ("offset", mapping.offset),
    ):
        if value % mapping.page_size:
            raise HandoverError(f"{where}: {key}: {value:#x} is not a multiple of {mapping.page_size}")
        if value > ADDRESS_END:
            raise HandoverError(f"{where}: {key}: beyond the address space")
    if mapping.addr + mapping.length > ADDRESS_END:
        raise HandoverError(f"{where}: base_host_virt_addr + size: beyond the address space")
    if mapping.memfd == 0 or mapping.memfd >= MAX_FDS:
        raise HandoverError(f"{where}: memfd: index {mapping.memfd} is not in 1 ... {MAX_FDS - 1}")
    if mapping.memfd > 0 and not mapping.kind.endswith("shared") and mapping.kind:
        raise HandoverError(f"{where}: memfd: the mapping is private, so its content is not the memfd's")


def _check_distinct(mappings: tuple[Mapping, ...]) -> None:
    names: set[str] = set()
    for mapping in mappings:
        if mapping.name in names:
            raise HandoverError(f"mapping {mapping.name[:40]}: the name is used twice")
        names.add(mapping.name)
    ordered = sorted(mappings, key=lambda mapping: mapping.addr)
    for low, high in itertools.pairwise(ordered):
        if low.addr + low.length > high.addr:
            raise HandoverError(f"mapping {high.name[:40]}: overlaps mapping {low.name[:40]}")


def _controls(value: Any) -> frozenset[str]:
    if value is None:
        return frozenset()
    if not isinstance(value, dict) or type(value.get("version")) is not int:
        raise HandoverError("snapengine: not an object with a version")
    if value["version"] != VERSION:
        raise HandoverError(f"snapengine: version {value['version']} is not supported, only {VERSION}")
    controls = value.get("controls", [])
    if not isinstance(controls, list) or not all(isinstance(control, str) for control in controls):
        raise HandoverError("snapengine: controls: not an array of strings")
    return frozenset(controls) & frozenset(CONTROLS)

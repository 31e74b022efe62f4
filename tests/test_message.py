"""The message of a hand-over: accepted and refused messages, and arbitrary JSON and bytes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from handoverkit import fds_before, open_fds
from hypothesis import given, settings
from hypothesis import strategies as st

from snapengine.errors import HandoverError
from snapengine.handover.message import MAX_MAPPINGS, ArrayScanner, encode_offer, parse_offer, strict_json
from snapengine.regions import Region

MIB = 1 << 20

# As Firecracker writes it: see its documentation of snapshot loading with a page-fault handler.
FIRECRACKER = (
    b'[{"base_host_virt_addr":140000000000000,"size":67108864,"offset":0,"page_size":4096,'
    b'"page_size_kib":4096},{"base_host_virt_addr":140000134217728,"size":33554432,"offset":67108864,'
    b'"page_size":4096,"page_size_kib":4096}]'
)


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    before = fds_before()
    yield
    assert open_fds() == before


# --- the message alone


def test_firecracker_message() -> None:
    offer = parse_offer(FIRECRACKER)
    assert [(m.addr, m.length, m.offset, m.page_size) for m in offer.mappings] == [
        (140000000000000, 64 * MIB, 0, 4096),
        (140000134217728, 32 * MIB, 64 * MIB, 4096),
    ]
    assert [m.name for m in offer.mappings] == ["region0", "region1"]
    assert offer.controls == frozenset()
    assert offer.fds_needed == 1


@pytest.mark.parametrize(
    ("fields", "page_size"),
    [
        ({}, 4096),
        ({"page_size": 2 * MIB}, 2 * MIB),
        ({"page_size_kib": 2 * MIB}, 2 * MIB),
        ({"page_size_kib": 4096, "page_size": 2 * MIB}, 2 * MIB),
        ({"page_size": 1 << 30, "size": 1 << 30}, 1 << 30),
    ],
)
def test_page_size_has_two_names(fields: dict[str, int], page_size: int) -> None:
    mapping = {"base_host_virt_addr": 1 << 40, "size": 2 * MIB, "offset": 0, **fields}
    assert parse_offer(json.dumps([mapping]).encode()).mappings[0].page_size == page_size


def test_what_the_guest_sends_is_understood() -> None:
    regions = [
        Region("ram", 1 << 30, MIB, kind="shared", memfd=77, memfd_offset=MIB),
        Region("rom", 1 << 31, MIB),
    ]
    offer = parse_offer(encode_offer(regions, [77], ["pause", "resume", "fly"]))
    assert [(m.name, m.kind, m.memfd, m.offset) for m in offer.mappings] == [
        ("ram", "shared", 1, MIB),
        ("rom", "anon", -1, 0),
    ]
    assert offer.controls == {"pause", "resume"}
    assert offer.fds_needed == 2


GOOD: dict[str, Any] = {"base_host_virt_addr": 1 << 30, "size": MIB, "offset": 0, "page_size": 4096}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"size": 0}, "size: zero"),
        ({"size": -4096}, "size: negative"),
        ({"size": 4097}, "size: 0x1001 is not a multiple"),
        ({"size": True}, "size: not an integer"),
        ({"size": 4096.0}, "size: not an integer"),
        ({"size": "4096"}, "size: not an integer"),
        ({"size": None}, "size: not an integer"),
        ({"size": 1 << 48}, "size: beyond"),
        ({"size": 1 << 200}, "size: beyond"),
        ({"base_host_virt_addr": -1}, "base_host_virt_addr: negative"),
        ({"base_host_virt_addr": 1}, "base_host_virt_addr: 0x1 is not a multiple"),
        ({"base_host_virt_addr": [1]}, "base_host_virt_addr: not an integer"),
        ({"base_host_virt_addr": (1 << 47) - 4096}, "beyond the address space"),
        ({"base_host_virt_addr": 1 << 64}, "beyond the address space"),
        ({"offset": -1}, "offset: negative"),
        ({"offset": 1}, "offset: 0x1 is not a multiple"),
        ({"offset": False}, "offset: not an integer"),
        ({"page_size": 0}, "page_size: 0 is none of"),
        ({"page_size": 8192}, "page_size: 8192 is none of"),
        ({"page_size": 2 * MIB}, "size: 0x100000 is not a multiple of 2097152"),
        ({"page_size_kib": -1}, "page_size_kib: negative"),
        ({"name": ""}, "name: not a printable"),
        ({"name": "a\nb"}, "name: not a printable"),
        ({"name": "é" * 128}, "name: not a printable"),
        ({"name": "\ud800"}, "name: not a printable"),
        ({"name": 5}, "name: not a printable"),
        ({"kind": "disk"}, "kind: none of"),
        ({"kind": None}, "kind: none of"),
        ({"memfd": 0}, "memfd: index 0"),
        ({"memfd": 64}, "memfd: index 64"),
        ({"memfd": True}, "memfd: not an integer"),
        ({"memfd": 1, "kind": "anon"}, "memfd: the mapping is private"),
        ({"snapengine": 1}, "snapengine: not an object"),
        ({"snapengine": {"version": 2}}, "snapengine: version 2"),
        ({"snapengine": {"version": 1, "controls": "pause"}}, "controls: not an array"),
        ({"snapengine": {"version": 1, "controls": [1]}}, "controls: not an array"),
    ],
)
def test_bad_mapping(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(HandoverError) as caught:
        parse_offer(json.dumps([{**GOOD, **change}]).encode())
    assert reason in str(caught.value)
    assert str(caught.value).startswith(("mapping 0", "snapengine"))


@pytest.mark.parametrize("key", ["base_host_virt_addr", "size"])
def test_missing_field(key: str) -> None:
    mapping = {name: value for name, value in GOOD.items() if name != key}
    with pytest.raises(HandoverError, match=f"mapping 0 .region0.: {key}: missing"):
        parse_offer(json.dumps([mapping]).encode())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"[]", "no mappings"),
        (b"[1]", "mapping 0: not an object"),
        (b"[null]", "mapping 0: not an object"),
        (b"[[]]", "mapping 0: not an object"),
        (b"[{},]", "not valid JSON"),
        (b'[{"size": NaN}]', "NaN is not a number"),
        (b'[{"size": Infinity}]', "Infinity is not a number"),
        (b'[{"size": 1, "size": 2}]', "a key is repeated"),
        (b'[{"size": 1' + b"0" * 5000 + b"}]", "not valid JSON"),
        (b'[{"\xff": 1}]', "not valid JSON"),
        (b"{}", "not a JSON array"),
    ],
)
def test_bad_message(data: bytes, reason: str) -> None:
    with pytest.raises(HandoverError, match=reason):
        parse_offer(data)


def test_too_many_mappings() -> None:
    many = [{**GOOD, "base_host_virt_addr": (1 << 30) + at * MIB} for at in range(MAX_MAPPINGS + 1)]
    assert len(parse_offer(json.dumps(many[:-1]).encode()).mappings) == MAX_MAPPINGS
    with pytest.raises(HandoverError, match="4097 mappings"):
        parse_offer(json.dumps(many).encode())


def test_overlap_and_repeated_name() -> None:
    with pytest.raises(HandoverError, match="region1: overlaps mapping region0"):
        parse_offer(json.dumps([GOOD, {**GOOD, "base_host_virt_addr": (1 << 30) + MIB - 4096}]).encode())
    with pytest.raises(HandoverError, match="the name is used twice"):
        parse_offer(json.dumps([{**GOOD, "name": "a"}, {**GOOD, "name": "a"}]).encode())
    beside = parse_offer(json.dumps([GOOD, {**GOOD, "base_host_virt_addr": (1 << 30) + MIB}]).encode())
    assert len(beside.mappings) == 2


def test_scanner_finds_the_end_in_pieces_of_any_size() -> None:
    data = rb' [{"name": "]}\"[\\", "x": [1, {"y": "\\\\"}]}]'
    for size in range(1, len(data) + 1):
        scanner = ArrayScanner()
        rest = b"".join(scanner.feed((data + b"\n!")[at : at + size]) for at in range(0, len(data) + 2, size))
        assert scanner.complete
        assert bytes(scanner.data) == data.lstrip() or bytes(scanner.data) == data
        assert rest == b"\n!"
    assert strict_json(data, "x")[0]["name"] == ']}"[\\'


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"x", "not a JSON array"),
        (b'{"a": 1}', "not a JSON array"),
        (b"[" * 9, "nested deeper than 8"),
        (b"[" * 100000, "nested deeper than 8"),
        (b'[{"a":' * 5, "nested deeper than 8"),
        (b"[" + b" " * MIB, "longer than 1048576 bytes"),
        (b" " * (MIB + 1), "longer than 1048576 bytes"),
    ],
)
def test_scanner_refuses(data: bytes, reason: str) -> None:
    with pytest.raises(HandoverError, match=reason):
        ArrayScanner().feed(data)


def test_bottomless_answer() -> None:
    with pytest.raises(HandoverError, match="not valid JSON"):
        strict_json(b"[" * 1000000, "answer")


JSON = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.just([]), st.just({}), st.just({"version": 1, "controls": []}),
    st.sampled_from([0, 1, 4096, MIB, 1 << 30]),
)  # fmt: skip
FIELDS = st.sampled_from([*GOOD, "name", "kind", "memfd", "page_size_kib", "snapengine"])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.dictionaries(FIELDS, JSON, max_size=3), max_size=3))
def test_any_json_is_refused_or_sound(changes: list[dict[str, Any]]) -> None:
    data = json.dumps([{**GOOD, **change} for change in changes]).encode()
    with contextlib.suppress(HandoverError):
        for mapping in parse_offer(data).mappings:
            assert 0 < mapping.length <= 1 << 47
            assert mapping.addr % mapping.page_size == mapping.length % mapping.page_size == 0
            assert -1 <= mapping.memfd < 64


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64) | st.text('[]{}",:0 \\', max_size=64).map(str.encode))
def test_any_bytes_are_refused_or_wait_for_more(data: bytes) -> None:
    scanner = ArrayScanner()
    with contextlib.suppress(HandoverError):
        scanner.feed(data)
        if scanner.complete:
            parse_offer(scanner.data)

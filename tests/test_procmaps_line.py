"""Lines of /proc/PID/maps, compared with a simple parser."""

import pytest

from snapengine.kernel.procmaps import Mapping, maps_text, parse_line, parse_maps

LINES = [
    b"55d0c8a00000-55d0c8a02000 r-xp 00001000 fd:01 1234567                    /usr/bin/two words",
    b"55d0c8a02000-55d0c8a03000 r--p 00002000 fd:01 1234567                    /usr/bin/two words",
    b"55d0c8a03000-55d0c8a04000 rw-p 00000000 00:00 0 ",
    b"55d0c8a05000-55d0c8a06000 rw-p 00000000 00:00 0 ",
    b"55d0c8a06000-55d0c8a07000 rw-p 00000000 00:00 0                          [heap]",
    b"55d0c8a07000-55d0c8a08000 rw-s 00003000 00:01 18446744073709551615       /memfd:a\rb\xff (deleted)",
    b"7ffd00000000-7ffd00001000 rw-s ffffffffffff0000 100:fffff 7              /x\\012y ",
    b"7ffd00001000-7ffd00002000 rw-s 00000000 100:fffff 7",
    b"ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]",
]


def by_hand(line):
    fields = line.split(b" ", 5)
    start, end = (int(text, 16) for text in fields[0].split(b"-"))
    path = fields[5].lstrip(b" ") if len(fields) > 5 else b""
    return Mapping(
        start, end, fields[1].decode(), int(fields[2], 16), fields[3].decode(), int(fields[4]),
        path.decode("utf-8", "surrogateescape"),
    )  # fmt: skip


def test_each_line():
    assert [parse_line(line) for line in LINES] == [by_hand(line) for line in LINES]


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_list(end):
    assert parse_maps(b"\n".join(LINES) + end) == [by_hand(line) for line in LINES]


def test_a_process():
    text = maps_text()
    assert parse_maps(text) == [by_hand(line) for line in text.removesuffix(b"\n").split(b"\n")]


def test_neighbours_share_their_texts():
    one, two = parse_maps(b"\n".join(LINES[:2]))
    assert one.path is two.path
    assert one.device is two.device
    assert one.perms != two.perms


@pytest.mark.parametrize(
    ("start", "end", "numbers"),
    [
        (0, 1 << 64, range(9)),
        (-1, 1, []),
        (0x55D0C8A02000, 0x55D0C8A03001, [1, 2]),
        (0x55D0C8A04000, 1 << 64, range(3, 9)),
    ],
)
def test_a_part_of_a_list(start, end, numbers):
    assert parse_maps(b"\n".join(LINES), start, end) == [by_hand(LINES[number]) for number in numbers]


def test_nothing():
    assert parse_maps(b"") == []


@pytest.mark.parametrize("line", [b"1000-2000", b"1000-2000 rw-p 0 00:00", b"\n"])
def test_a_line_that_is_cut(line):
    with pytest.raises(ValueError, match="is cut"):
        parse_maps(line)


def test_a_mapping_does_not_change():
    (mapping,) = parse_maps(LINES[0])
    with pytest.raises(AttributeError):
        mapping.start = 0
    assert len({mapping, by_hand(LINES[0])}) == 1

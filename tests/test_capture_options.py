"""Every option of a capture has a flag, in every command to which it applies."""

from dataclasses import MISSING, fields

import pytest

from snapengine.base.units import parse_size
from snapengine.cli.capture_options import FLAGS, LEFT_OUT, flag_of, make_options
from snapengine.cli.command import make_parser
from snapengine.options import Options

BASES = {
    "save": ["save", "--socket", "s", "out"],
    "qemu save": ["qemu", "save", "--qmp", "s", "out"],
    "ingest": ["ingest", "-", "out"],
}
VALUES = {
    "method": ("dirty-logging",) * 2, "compress": ("zstd:3:always",) * 2, "arming": ("two-step",) * 2,
    "memory_limit": ("17M", 17 << 20), "copy_limit": ("3M", 3 << 20), "rate_limit": ("64K", 64 << 10),
    "spill_dir": ("/d",) * 2, "fault_threads": ("5", 5), "walk_threads": ("3", 3),
    "encoder_threads": ("7", 7), "strict": (None, True), "downtime_limit": ("50ms", 0.05),
    "max_rounds": ("4", 4), "max_seconds": ("9", 9.0), "timeout": ("2.5", 2.5),
}  # fmt: skip
NAMES = [field.name for field in fields(Options)]


def test_every_field_has_a_flag_in_the_order_of_the_fields():
    assert list(FLAGS) == list(VALUES) == NAMES
    assert LEFT_OUT.keys() == BASES.keys()
    assert LEFT_OUT["save"] == ()


@pytest.mark.parametrize("command", BASES)
@pytest.mark.parametrize("name", NAMES)
def test_a_flag_sets_its_field_and_no_other(command, name, capsys):
    text, value = VALUES[name]
    words = [*BASES[command], flag_of(name), *([] if text is None else [text])]
    if name in LEFT_OUT[command]:
        with pytest.raises(SystemExit):
            make_parser().parse_args(words)
        assert f"unrecognized arguments: {flag_of(name)}" in capsys.readouterr().err
        return
    assert make_options(make_parser().parse_args(words)) == Options(**{name: value})
    assert value != Options.__dataclass_fields__[name].default


@pytest.mark.parametrize("command", BASES)
def test_no_flag_is_the_defaults(command):
    assert make_options(make_parser().parse_args(BASES[command])) == Options()
    assert all(field.default is not MISSING for field in fields(Options))


@pytest.mark.parametrize("command", BASES)
def test_the_help_names_each_default(command, capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_args([*BASES[command][: 1 + command.count(" ")], "--help"])
    text = " ".join(capsys.readouterr().out.partition("\noptions:")[2].split())
    for name in NAMES:
        if name in LEFT_OUT[command]:
            assert flag_of(name) not in text
        elif name != "strict":  # off
            assert any("(default: " in part[:260] for part in text.split(f"{flag_of(name)} ")[1:]), name


def test_the_help_names_the_right_defaults():
    kinds = {"memory_limit": parse_size, "copy_limit": parse_size, "method": str, "downtime_limit": float,
             "max_rounds": int, "max_seconds": float, "compress": str}  # fmt: skip
    for name, parse in kinds.items():
        told = FLAGS[name]["help"].partition("(default: ")[2].rstrip(")")
        assert parse(told) == getattr(Options(), name), name

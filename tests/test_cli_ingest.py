"""`snapengine ingest` that fails: QEMU's background-snapshot must find a reader until it ends."""

import os
import random
import subprocess
import sys

import pytest
import streamkit as kit
from clikit import COMMAND

N_PAGES = 4000
STREAM = kit.stream(
    [("pc.ram", n, random.Random(n).randbytes(4096)) for n in range(N_PAGES)],
    blocks=[("pc.ram", N_PAGES * 4096)], end=False,
)  # fmt: skip
MIB = 1 << 20


def start(*arguments):
    return subprocess.Popen(
        [*COMMAND, "ingest", *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


def push(process, data):
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(process.stdin.fileno(), rest) :]


@pytest.mark.parametrize("direct", [["--direct"], []])
@pytest.mark.parametrize(
    ("arguments", "data", "error"),
    [
        (["-", "exec:exit 3"], STREAM, "exit"),
        (["-", "/nowhere/vm.img"], STREAM, "/nowhere"),
        (["--spill-dir", "/nowhere", "-", "exec:exit 3"], STREAM, ""),
        (["--compress", "zstd:99", "-", "null:"], STREAM, "zstd"),
        (["-", "null:"], bytes(4 * MIB), "not a migration stream"),
        (["-", "null:"], STREAM[:MIB] + bytes(4 * MIB), "unknown"),
    ],
    ids=["sink", "no directory", "no spill directory", "options", "no stream", "damaged stream"],
)
def test_the_whole_stream_is_read(arguments, data, error, direct):
    with start(*direct, *arguments) as process:
        push(process, data)  # no BrokenPipeError
        _, text = process.communicate()
    assert process.returncode in (1, 2)
    assert error in text.decode()


NO_DRAIN = """
import sys
from snapengine.cli import main
from snapengine.qemu import from_stream
from_stream.drain = lambda *_: print("drained")
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("kind", "drains"), [("terminal", False), ("pipe", True)])
def test_a_terminal_is_not_drained(kind, drains):
    """Nobody sends a stream there, and its user would wait for the error."""
    other, fd = os.openpty() if kind == "terminal" else os.pipe()[::-1]
    try:
        done = subprocess.run(
            [sys.executable, "-c", NO_DRAIN, "ingest", "-", "/nowhere/vm.img"], stdin=fd, capture_output=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=False,
        )  # fmt: skip
    finally:
        os.close(other)
        os.close(fd)
    assert done.returncode == 1
    assert (b"drained" in done.stdout) == drains


@pytest.mark.parametrize("direct", [["--direct"], []])
def test_what_the_sender_sees(direct):
    """No EPIPE while the stream can be of a background-snapshot; one when it is longer than any."""
    with start(*direct, "-", "exec:exit 3") as process:
        push(process, STREAM)
        with pytest.raises(BrokenPipeError):
            push(process, bytes(1024 * MIB))
        process.stdout.read()
    assert process.returncode == 1

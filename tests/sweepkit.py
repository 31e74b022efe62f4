"""The guest that sweeps memory (guests/sweep.S), and the check that a memory is one of its states."""

import atexit
import functools
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MIB = 1 << 20
PAGE = 4096
SOURCE = Path(__file__).parent / "guests" / "sweep.S"
START = 2 * MIB
PROGRESS = 0x8000
NOISE_SEED = 7


@functools.cache
def _room():
    room = Path(tempfile.mkdtemp(prefix="snapengine-guests-"))
    atexit.register(shutil.rmtree, room)
    return room


@functools.cache
def assemble(**symbols):
    """The path of the firmware, built with these symbols."""
    stem = _room() / "-".join(f"{name}{value:x}" for name, value in symbols.items())
    defined = [part for name, value in symbols.items() for part in ("--defsym", f"{name}={value}")]
    _run(["as", "--32", *defined, "-o", f"{stem}.o", str(SOURCE)])
    _run(["ld", "-m", "elf_i386", "-Ttext", "0", "--oformat", "binary", "-o", f"{stem}.rom", f"{stem}.o"])
    return f"{stem}.rom"


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class Sweep:
    """A machine with `memory` bytes, of which those from START up to `hot` (default: all) are swept.

    `noise`: all of them are filled before, and this share of each page does not compress; None: memory that
    is not swept stays untouched. `delay`: iterations of an empty loop after each page (without it TCG writes
    some million pages a second). `tick`: pages, a power of two, per '.' on the serial port.
    """

    memory: int = 64 * MIB
    hot: int | None = None
    noise: float | None = None
    delay: int = 0
    tick: int = 4096

    @property
    def end(self):
        """The first address that is not swept."""
        return self.hot or self.memory

    @property
    def pages(self):
        return (self.end - START) // PAGE

    @property
    def arguments(self):
        return ["-bios", assemble(START=START, END=self.end, DELAY=self.delay, TICK=self.tick)]

    @property
    def fill(self):
        """An action on a new machine before it starts, or None."""
        return None if self.noise is None else self._fill

    def _fill(self, machine):
        """A block of noise, to which a number is added for each place: no two pages are equal."""
        piece = np.random.default_rng(NOISE_SEED).integers(1, 1 << 62, (1024, PAGE // 8), dtype=np.uint64)
        piece[:, round(self.noise * PAGE / 8) :] = 1
        for at in range(START, self.memory, piece.nbytes):
            data = (piece + np.uint64(at)).tobytes()
            machine.write_ram(at, data[: self.memory - at])

    def wait_ready(self, machine):
        machine.wait_serial("B")

    def progress(self, machine):
        """Address of the counter of written pages."""
        return PROGRESS

    def faults(self, ram):
        """Why these bytes of the RAM, from address 0 on, are no state of one instant; empty if they are one.

        The one-step rule, for both words of a page: along the addresses the number falls at most once, by
        one. The three counts (first words, last words, PROGRESS) differ by at most one write. They differ for
        ever in a machine whose processor state was older or newer than its memory when it was restored.
        """
        words = np.frombuffer(ram, "<u4", count=self.end // 4).reshape(-1, PAGE // 4)
        swept = words[START // PAGE :]
        found, counts = [], []
        for name, numbers in (("first", swept[:, 0]), ("last", swept[:, 4088 // 4])):
            steps = np.flatnonzero(np.diff(numbers.astype(np.int64)))
            if len(steps) > 1 or (len(steps) and int(numbers[0]) - int(numbers[-1]) != 1):
                values = f"{numbers.min()} to {numbers.max()}"
                found.append(f"{name} words: {len(steps)} steps, at pages {steps[:4]}, {values}")
            done = int(steps[0]) + 1 if len(steps) else self.pages
            counts.append((int(numbers[0]) - 1) * self.pages + done)
        first, last = counts
        counted = first - (first - int(words[PROGRESS // PAGE, PROGRESS % PAGE // 4])) % (1 << 32)
        if not found and not counted <= last <= first <= counted + 1:
            found.append(f"{first} first words, {last} last words, {counted} pages counted")
        return found

"""Own memory that its owner unmaps, truncates or protects, before and during a capture or a restore: this
kills no program."""

import json
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from waitkit import PATIENCE_S

import snapengine
from snapengine.image import open_image

PAGE = 4096
MIB = 1 << 20
SIZE = 48 * MIB
pytestmark = pytest.mark.usefixtures("requires_uffd")

# The beginning of each program below. `take` runs after T, when most of `memory` is not saved yet.
PROLOGUE = """
import ctypes, json, mmap, os, sys
import numpy as np
import snapengine
SIZE, MIB, path = 48 << 20, 1 << 20, sys.argv[1]
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
PRIVATE, SHARED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS

def address_of(memory):
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))

def filled(flags=PRIVATE, fd=-1):
    memory = mmap.mmap(fd, SIZE, flags=flags)
    for at in range(0, SIZE, MIB):
        memory[at : at + MIB] = bytes([1 + at // MIB]) * MIB
    return memory

def call(function, memory, offset, length, *rest):
    assert function(ctypes.c_void_p(address_of(memory) + offset), ctypes.c_size_t(length), *rest) == 0

def drop(memory, offset, length):
    call(libc.munmap, memory, offset, length)

def again(memory, offset, length, flags):
    "Replace a part by other memory, filled with 0xee."
    drop(memory, offset, length)
    at = libc.mmap(address_of(memory) + offset, length, 3, flags | 0x10, -1, 0)
    ctypes.memset(at, 0xEE, length)

def save(target, take):
    "Slowly, so that `take` finds the second half unsaved."
    with snapengine.snapshot(target, path, memory_limit=16 << 20, rate_limit=64 << 20) as capture: take()
    print(json.dumps(capture.result.lost_runs), flush=True)
    os._exit(0)
"""


def run(tmp_path, program):
    """Run the program, check that its exit status is 0, and return its last line, parsed as JSON."""
    command = [sys.executable, "-c", PROLOGUE + textwrap.dedent(program), str(tmp_path / "image")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert done.returncode == 0, f"it ended with {done.returncode}: {done.stderr[-2000:]}"
    assert [item.name for item in tmp_path.iterdir() if "partial" in item.name] == []
    return json.loads(done.stdout.splitlines()[-1])


def check_saved(tmp_path, start=0, end=SIZE):
    """The image holds the state at T. Pages in [start, end) may be lost, but never have other content."""
    with open_image(tmp_path / "image") as image:
        for at in range(0, SIZE, MIB):
            expected = bytes([1 + at // MIB]) * MIB
            if not start <= at < end:
                assert image.read(0, at, MIB) == expected, f"at {at:#x}"
                continue
            for offset, length, kind in image.runs(0):
                low, high = max(offset, at), min(offset + length, at + MIB)
                if kind != "lost" and low < high:
                    assert image.read(0, low, high - low) == expected[: high - low], f"at {low:#x}, {kind}"


TAKEN = {
    "unmapped": "memory = filled(); take = lambda: drop(memory, 32 * MIB, 8 * MIB)",
    "unmapped, shared": "memory = filled(SHARED); take = lambda: drop(memory, 32 * MIB, 8 * MIB)",
    "replaced": "memory = filled(); take = lambda: again(memory, 32 * MIB, 8 * MIB, PRIVATE)",
    "replaced, shared": "memory = filled(SHARED); take = lambda: again(memory, 32 * MIB, 8 * MIB, SHARED)",
    "resized without a check": """
        memory = np.zeros(SIZE, np.uint8)
        for at in range(0, SIZE, MIB): memory[at : at + MIB] = 1 + at // MIB
        take = lambda: memory.resize(32 * MIB, refcheck=False)""",
}  # fmt: skip


@pytest.mark.parametrize("how", TAKEN)
def test_memory_that_is_taken_away_is_lost(tmp_path, how):
    lost = run(tmp_path, textwrap.dedent(TAKEN[how]) + "\nsave(memory, take)")
    assert sum(length for _, length in lost) >= 4 * MIB
    check_saved(tmp_path, 32 * MIB, 48 * MIB)


TENSOR = """
class Storage:
    def __init__(self, memory): self.memory = memory
    def data_ptr(self): return address_of(self.memory)
    def nbytes(self): return len(self.memory)
    def __del__(self): self.memory.close()

class Tensor:
    "The part of PyTorch's interface that is used: no buffer protocol, and a storage that can be replaced."
    device = "cpu"
    def __init__(self, storage): self.storage = storage
    def untyped_storage(self): return self.storage
    def data_ptr(self): return self.storage.data_ptr()
    def numel(self): return self.storage.nbytes() // 4
    def element_size(self): return 4
    def is_contiguous(self): return True

tensor = Tensor(Storage(filled()))
"""


def test_a_tensor_that_is_given_another_storage(tmp_path):
    """As ``p.data = torch.empty(0)``, ``set_()`` and ``model.half()`` do: the old storage is kept."""
    take = "\ndef take(): tensor.storage = Storage(mmap.mmap(-1, 4096))\nsave(tensor, take)"
    assert run(tmp_path, TENSOR + take) == []
    check_saved(tmp_path)


def test_a_tensor_whose_storage_is_freed(tmp_path):
    take = "\ndef take(): call(libc.munmap, tensor.storage.memory, 32 * MIB, 16 * MIB)\nsave(tensor, take)"
    assert sum(length for _, length in run(tmp_path, TENSOR + take)) >= 4 * MIB
    check_saved(tmp_path, 32 * MIB, 48 * MIB)


def test_a_storage_that_was_freed_before(tmp_path):
    program = TENSOR + """
target = snapengine.BufferTarget(tensor)
tensor.storage.memory = mmap.mmap(-1, 4096)
try: snapengine.snapshot(target, path).start()
except ValueError as error: print(json.dumps(str(error)))
"""
    assert "moved or resized" in run(tmp_path, program)


ASIDE = {
    "PROT_NONE": "call(libc.mprotect, memory, 32 * MIB, 8 * MIB, 0)",
    "PROT_READ": "call(libc.mprotect, memory, 32 * MIB, 8 * MIB, 1)",
    "PROT_WRITE": "call(libc.mprotect, memory, 32 * MIB, 8 * MIB, 2)",
    "a protection key": """
        key = libc.pkey_alloc(0, 1)
        if key < 0: key = None
        else: call(libc.pkey_mprotect, memory, 32 * MIB, 8 * MIB, 3, key)""",
}  # fmt: skip


@pytest.mark.parametrize("when", ["before", "meanwhile"])
@pytest.mark.parametrize("how", ASIDE)
@pytest.mark.parametrize("flags", ["PRIVATE", "SHARED"])
def test_what_no_load_may_read_is_read_by_the_kernel(tmp_path, flags, how, when):
    make = "def make():\n    global key\n" + textwrap.indent(textwrap.dedent(ASIDE[how]), "    ")
    order = "make(); save(memory, int)" if when == "before" else "save(memory, make)"
    lost = run(tmp_path, f"memory = filled({flags})\n{make}\n{order}")
    assert lost == []
    check_saved(tmp_path)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_guard_pages_hold_nothing(tmp_path, when):
    """MADV_GUARD_INSTALL (Linux 6.13) discards the content: before T it makes a hole, after T lost pages."""
    make = "make = lambda: libc.madvise(ctypes.c_void_p(address_of(memory) + 32 * MIB), 8 * MIB, 102)"
    order = "make(); save(memory, int)" if when == "before" else "save(memory, make)"
    run(tmp_path, f"memory = filled()\n{make}\n{order}")
    with open_image(tmp_path / "image") as image:
        kinds = {kind for offset, _, kind in image.runs(0) if 32 * MIB <= offset < 40 * MIB}
        for at in [*range(0, 32 * MIB, MIB), *range(40 * MIB, SIZE, MIB)]:
            assert image.read(0, at, MIB) == bytes([1 + at // MIB]) * MIB
    assert when == "meanwhile" or "data" not in kinds


ROUNDS = """
memory = filled()
def take(): {take}
target = snapengine.BufferTarget(memory, pause=take if {late} else int, resume=int)
said = ""
try:
    with snapengine.snapshot(target, path, method="dirty-logging", rate_limit=64 << 20) as capture:
        if not {late}: take()
except snapengine.SnapengineError as error: said = str(error)
print(json.dumps([said, capture.result.lost_runs if not said else []]), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("late", [False, True], ids=["in the rounds", "in the pause"])
@pytest.mark.parametrize("how", ["drop(memory, 32 * MIB, 8 * MIB)", ASIDE["PROT_NONE"]])
def test_rounds_of_memory_that_is_taken_away(tmp_path, how, late):
    """The rounds fail, or the image holds the memory at their end, when a part of it no longer exists."""
    said, _ = run(tmp_path, ROUNDS.format(take=how, late=late))
    assert said or (tmp_path / "image").exists()
    if not said:
        gone = (32 * MIB, 40 * MIB) if "drop" in how else (0, 0)
        with open_image(tmp_path / "image") as image:
            for at in [*range(0, gone[0], MIB), *range(gone[1], SIZE, MIB)]:
                assert image.read(0, at, MIB) == bytes([1 + at // MIB]) * MIB
            kinds = {kind for offset, _, kind in image.runs(0) if gone[0] <= offset < gone[1]}
            assert "data" not in kinds


def test_a_file_that_is_cut_short_ends_nobody(tmp_path):
    program = """
    fd = os.memfd_create("cut"); os.ftruncate(fd, SIZE)
    save(filled(mmap.MAP_SHARED, fd), lambda: os.ftruncate(fd, 32 * MIB))
    """
    run(tmp_path, program)
    with open_image(tmp_path / "image") as image:
        assert image.read(0, 31 * MIB, MIB) == b"\x20" * MIB


def test_other_faults_go_to_the_handler_that_was_there(tmp_path):
    """A crash of the program during its capture: faulthandler reports it, and the signal ends the program."""
    program = PROLOGUE + """
import faulthandler
faulthandler.enable()
memory = filled()
call(libc.mprotect, memory, 40 * MIB, MIB, 0)
def crash(): ctypes.string_at(16)
save(memory, crash)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "image")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert done.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in done.stderr
    assert "crash" in done.stderr


PROBE = """
#include <setjmp.h>
#include <signal.h>
static struct sigaction found;
static void go_on(int number, siginfo_t *info, void *context) { found.sa_sigaction(number, info, context); }
void chain(void) {
    struct sigaction action = {.sa_sigaction = go_on, .sa_flags = SA_SIGINFO};
    sigaction(SIGSEGV, 0, &found);
    sigaction(SIGSEGV, &action, 0);
}
static sigjmp_buf back;
static void jump(int number) { siglongjmp(back, number); }
void install(void) { struct sigaction action = {.sa_handler = jump}; sigaction(SIGSEGV, &action, 0); }
int readable(volatile char *at) { if (sigsetjmp(back, 1)) return 0; (void)*at; return 1; }
"""


@pytest.mark.parametrize("chained", [False, True])
def test_a_handler_that_was_there_may_jump(tmp_path, chained):
    """The handler leaves by siglongjmp(), and must be called for the next fault too. The same holds if
    the program sets a handler during a capture, and that one calls the previous handler, which is ours."""
    (tmp_path / "probe.c").write_text(PROBE)
    library = tmp_path / "probe.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "probe.c"], check=True)
    program = PROLOGUE + f"""
probe, memory = ctypes.CDLL({str(library)!r}), filled()
probe.readable.argtypes = [ctypes.c_void_p]
probe.install()
for _ in range({2 * chained}):
    with snapengine.snapshot(np.ones(9), path): probe.chain()
def take():
    print([probe.readable(16) for _ in range(3)], probe.readable(address_of(memory)), flush=True)
save(memory, take)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "image")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert done.stdout.splitlines() == ["[0, 0, 0] 1", "[]"], done.stderr


def test_a_signal_that_is_sent_still_ends_the_program(tmp_path):
    program = PROLOGUE + "save(filled(), lambda: os.kill(os.getpid(), 7))"
    command = [sys.executable, "-c", program, str(tmp_path / "image")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert done.returncode == -signal.SIGBUS


def test_the_handlers_are_put_back(tmp_path):
    program = """
    caught = lambda: [line for line in open("/proc/self/status") if line.startswith("SigCgt")][0]
    before, memory = caught(), filled()
    with snapengine.snapshot(memory, path): inside = caught()
    print(json.dumps([before == caught(), inside == before]))
    """
    assert run(tmp_path, program) == [True, False]


# Which objects are accepted


def test_python_objects_are_refused():
    record = np.zeros(4, [("a", "i8"), ("Offset", "f4"), ("x", [("y", "O")])])
    for array in (np.array([[], ()], object), record):
        with pytest.raises(TypeError, match="Python objects"):
            snapengine.BufferTarget(array)


def test_names_of_fields_are_no_objects(tmp_path):
    array = np.ones(4, [("O", "i8"), ("xO", "f4")])
    with snapengine.snapshot(array, tmp_path / "image"):
        pass
    with open_image(tmp_path / "image") as image:
        assert image.read(0, 0, array.nbytes) == array.tobytes()


@pytest.fixture
def doubles(tmp_path):
    array = np.arange(5000, dtype=np.float64)
    with snapengine.snapshot(array, tmp_path / "image"):
        pass
    with open_image(tmp_path / "image") as image:
        yield image


def test_restoring_into_another_size_is_an_error(doubles):
    with pytest.raises(ValueError, match="do not fit"):
        doubles.restore_into(0, np.zeros(5000, np.float32))
    with pytest.raises(ValueError, match="not within"):
        doubles.restore_into(0, np.zeros(5001))
    with pytest.raises(ValueError, match="empty"):
        doubles.restore_into(0, bytearray())
    part = np.zeros(100)
    doubles.restore_into(0, part, offset=0)
    assert (part == np.arange(100)).all()


def test_restoring_into_what_cannot_be_filled_is_an_error(doubles):
    frozen = np.zeros(5000)
    frozen.flags.writeable = False
    for buffer, error, text in [
        (np.zeros(5000, object), TypeError, "Python objects"),
        (frozen, ValueError, "read-only"),
        (np.zeros(10000)[::2], ValueError, "contiguous"),
        ([0.0] * 5000, TypeError, "neither a buffer nor a tensor"),
    ]:
        with pytest.raises(error, match=text):
            doubles.restore_into(0, buffer)


class Tensor:
    """A CPU tensor over an array."""

    device = "cpu"

    def __init__(self, array):
        self.array = array

    def data_ptr(self):
        return self.array.ctypes.data

    def numel(self):
        return self.array.size

    def element_size(self):
        return self.array.itemsize

    def is_contiguous(self):
        return self.array.flags.c_contiguous


def test_restoring_into_a_tensor(doubles):
    array = np.zeros(5000)
    doubles.restore_into(0, Tensor(array))
    assert (array == np.arange(5000)).all()


GONE = {
    "unmapped": "call(libc.munmap, memory, 32 * MIB, 8 * MIB)",
    "PROT_NONE": "call(libc.mprotect, memory, 32 * MIB, 8 * MIB, 0)",
    "PROT_READ": "call(libc.mprotect, memory, 32 * MIB, 8 * MIB, 1)",
    "cut short": "os.ftruncate(fd, 32 * MIB)",
}


@pytest.mark.parametrize("how", GONE)
@pytest.mark.parametrize("blank", [False, True], ids=["data", "zeros"])
@pytest.mark.parametrize("compress", ["none", "zstd:1:always"])
def test_restoring_into_memory_that_is_gone_is_an_error(tmp_path, how, blank, compress):
    program = f"""
    fd = os.memfd_create("gone"); os.ftruncate(fd, SIZE)
    source = filled()
    if {blank}: source[32 * MIB :] = bytes(16 * MIB)
    with snapengine.snapshot(source, path, compress={compress!r}): pass
    memory = mmap.mmap(fd, SIZE)
    {GONE[how]}
    with snapengine.open_image(path) as image:
        try: image.restore_into(0, memory)
        except OSError as error: print(json.dumps([error.errno, str(error)]), flush=True)
    os._exit(0)
    """
    number, text = run(tmp_path, program)
    assert number == 14
    assert "cannot be filled" in text

"""Helpers for tests of cores: a C program with a known state, stopped by ptrace, and an image of it.

This kit reads registers and memory by itself, so that these tests do not depend on the package for that.
"""

import contextlib
import ctypes
import os
import shutil
import struct
import subprocess

import pytest
from waitkit import PATIENCE_S, until

from snapengine.image.writer import Writer
from snapengine.kernel.procmaps import read_maps
from snapengine.process.record import NotCaptured, read_process
from snapengine.process.thread_state import ThreadState
from snapengine.regions import PAGE_BYTES, Region
from snapengine.storage.sinks import MemorySink

DATA, ZERO, HOLE, LOST = range(4)
PTRACE_CONT, PTRACE_DETACH, PTRACE_GETREGSET, PTRACE_SEIZE, PTRACE_INTERRUPT, PTRACE_GETSIGMASK = (
    7, 17, 0x4204, 0x4206, 0x4207, 0x420A,
)  # fmt: skip
WALL = 0x40000000
BIG_BYTES = 64 << 20
PAUSE = 34  # the number of the system call

PROGRAM = r"""
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int global_variable = 1;
const char constant_text[] = "never written";
char untouched[3 * 4096] __attribute__((aligned(4096))) = {[4096] = 'a', 's', ' ', 'E', 'L', 'F'};
char *heap_text;
char *big;
double inner_value;

void inner(int number)
{
    double value = number * 1.5;
    inner_value = value;
    __asm__ volatile("movsd %0, %%xmm7" : : "m"(value) : "xmm7");
    for (;;)
        pause();
}

void outer(int number) { inner(number + 1); __asm__ volatile(""); }

void *worker(void *argument) { outer((int)(long)argument); return 0; }

int main(void)
{
    pthread_t thread;
    global_variable = 20260731;
    heap_text = strdup("a string on the heap");
    big = mmap(0, BIG, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    madvise(big, BIG, MADV_NOHUGEPAGE);
    strcpy(big + BIG / 2, "in the middle");
    pthread_create(&thread, 0, worker, (void *)10L);
    pthread_create(&thread, 0, worker, (void *)20L);
    puts("ready");
    fflush(stdout);
    outer(0);
    return 0;
}
"""


class Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def ptrace(request, tid, addr=0, data=0):
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.restype = ctypes.c_long
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    if libc.ptrace(request, tid, addr, data) < 0:
        raise OSError(ctypes.get_errno(), f"ptrace {request:#x}")


def regset(tid, kind, size):
    buffer = ctypes.create_string_buffer(size)
    iovec = Iovec(ctypes.addressof(buffer), size)
    ptrace(PTRACE_GETREGSET, tid, kind, ctypes.addressof(iovec))
    return buffer.raw[: iovec.length]


def build_program(directory):
    """The compiled program. Skips (not in CI) where there is no gcc."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    source = directory / "program.c"
    source.write_text(PROGRAM)
    command = ["gcc", "-g", "-O0", f"-DBIG={BIG_BYTES}UL", "-pthread", "-o", "program", "program.c"]
    subprocess.run(command, cwd=directory, check=True)
    return directory / "program"


@contextlib.contextmanager
def running(path):
    """The pid of the program; all its three threads are in pause()."""
    process = subprocess.Popen([path, "one argument"], stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"ready\n"
        until(
            lambda: all(syscall_of(process.pid, tid) == PAUSE for tid in tasks(process.pid)),
            "a thread does not reach its pause()",
        )
        yield process.pid
    finally:
        process.kill()
        process.communicate()


def tasks(pid):
    return sorted(map(int, os.listdir(f"/proc/{pid}/task")))


def syscall_of(pid, tid):
    with open(f"/proc/{pid}/task/{tid}/syscall") as file:
        number = file.read().split()[0]
    return int(number) if number.isdigit() else -1


@contextlib.contextmanager
def stopped(pid):
    """The states of the threads, while all of them are stopped."""
    seized = []
    try:
        for tid in tasks(pid):
            try:
                ptrace(PTRACE_SEIZE, tid)
            except PermissionError:
                pytest.skip("this user may not trace")
            seized.append(tid)
            ptrace(PTRACE_INTERRUPT, tid)
            os.waitpid(tid, WALL)
        yield [thread_state(pid, tid) for tid in seized]
    finally:
        for tid in seized:
            ptrace(PTRACE_DETACH, tid)


def thread_state(pid, tid):
    mask = ctypes.c_uint64()
    ptrace(PTRACE_GETSIGMASK, tid, 8, ctypes.addressof(mask))
    with open(f"/proc/{pid}/task/{tid}/comm") as file:
        comm = file.read().strip()
    sets = (regset(tid, 1, 216), regset(tid, 2, 512), regset(tid, 0x202, 1 << 16))
    return ThreadState(tid, comm, *sets, mask.value)


def page_states(pid, start, pages):
    """Per page: whether it is populated, and whether it is the process's own (not a file's).

    The vdso counts as populated: only its use puts it into the page tables.
    """
    if any(mapping.start == start and mapping.path == "[vdso]" for mapping in read_maps(pid)):
        return [(True, True)] * pages
    with open(f"/proc/{pid}/pagemap", "rb") as file:
        file.seek(start // PAGE_BYTES * 8)
        entries = struct.unpack(f"<{pages}Q", file.read(8 * pages))
    return [(bool(entry >> 62), bool(entry >> 62) and not entry >> 61 & 1) for entry in entries]


def wanted(pid, mapping):
    """Why a mapping is not captured, or None: the vdso and all that may differ from a file are captured."""
    if mapping.shared or mapping.path in ("[vvar]", "[vvar_vclock]", "[vsyscall]") or mapping.perms[0] != "r":
        return "not private memory"
    if mapping.path == "[vdso]" or mapping.perms[1] == "w":
        return None
    states = page_states(pid, mapping.start, (mapping.end - mapping.start) // PAGE_BYTES)
    return None if any(own for _, own in states) else "as in the file"


def image_of(pid, cut, threads=(), lost=()):
    """The bytes of an image; `lost`: the addresses of pages to record as lost."""
    captured, left = [], []
    for mapping in read_maps(pid):
        reason = wanted(pid, mapping)
        if reason is None:
            captured.append(mapping)
        else:
            left.append(NotCaptured(mapping.start, mapping.end, mapping.perms, mapping.path, reason))
    record = read_process(pid, cut, threads=threads, not_captured=left)
    sink = MemorySink()
    writer = Writer(sink)
    first, places = 0, []
    for number, mapping in enumerate(captured):
        places.append((Region(f"m{number}", mapping.start, mapping.end - mapping.start), first))
        first += (mapping.end - mapping.start) // PAGE_BYTES
    writer.begin(places)
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for region, first in places:
            write_region(writer, pid, memory, region, first, lost)
    for name, blob in record.to_vmstate().items():
        writer.vmstate(name, blob, level=1)
    writer.finish({})
    sink.commit()
    return sink.getvalue()


def write_region(writer, pid, memory, region, first, lost):
    """Chunks of at most 256 pages: data and zero pages unchanged, unpopulated ones as holes."""
    states = page_states(pid, region.addr, region.length // PAGE_BYTES)
    for start in range(0, len(states), 256):
        entries, data = [], b""
        for page in range(start, min(start + 256, len(states))):
            addr, kind = region.addr + page * PAGE_BYTES, HOLE
            if addr in lost:
                kind = LOST
            elif states[page][0]:
                content = os.pread(memory.fileno(), PAGE_BYTES, addr)
                kind = DATA if any(content) else ZERO
                data += content if kind == DATA else b""
            if entries and entries[-1][2] == kind:
                entries[-1] = (entries[-1][0], entries[-1][1] + 1, kind)
            else:
                entries.append((first + page, 1, kind))
        writer.py_chunk(entries, data)


def gdb(program, core, *commands):
    """The output of gdb."""
    command = ["gdb", "-batch", "-nx", "-iex", "set debuginfod enabled off", "-iex", "set auto-load off"]
    for text in commands:
        command += "-ex", text
    done = subprocess.run(
        [*command, str(program), str(core)], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    return done.stdout + done.stderr

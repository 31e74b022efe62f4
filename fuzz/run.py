"""Fuzz one target: ``python fuzz/run.py TARGET [option of libFuzzer...]``; without one, list them.

The fuzzer is libFuzzer, by atheris. It is guided by the coverage of our Python code, whose byte code atheris
instruments, and of the extension modules, which .ci/fuzz builds with counters (fuzz/trace_pc.c). An input
that breaks an invariant is kept as build/fuzz/crash-*: add it to fuzz/corpus/TARGET with the fix.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from pathlib import Path

import atheris
from atheris import core_with_libfuzzer

HERE = Path(__file__).parent
COUNTERS = 16384


def count_edges() -> None:
    """Hand the counters of the C code to libFuzzer, if the extension modules have any."""
    counting = ctypes.CDLL(os.environ["SNAPENGINE_TRACE_PC"], mode=ctypes.RTLD_GLOBAL)
    fuzzer = ctypes.CDLL(core_with_libfuzzer.__file__)
    counters = ctypes.addressof(ctypes.c_uint8.in_dll(counting, "fuzz_counters"))
    table = (ctypes.c_uint64 * (2 * COUNTERS)).in_dll(counting, "fuzz_addresses")
    for number in range(COUNTERS):
        table[2 * number] = counters + number  # any address will do, as long as each has its own
    start, end = ctypes.c_void_p(counters), ctypes.c_void_p(counters + COUNTERS)
    fuzzer.__getattr__("__sanitizer_cov_8bit_counters_init")(start, end)
    at = ctypes.addressof(table)
    fuzzer.__getattr__("__sanitizer_cov_pcs_init")(ctypes.c_void_p(at), ctypes.c_void_p(at + 16 * COUNTERS))


def main() -> None:
    """libFuzzer ends the process."""
    sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]
    if len(sys.argv) < 2:
        from targets import TARGETS

        print(*TARGETS, sep="\n")
        return
    if "SNAPENGINE_TRACE_PC" in os.environ:
        count_edges()
    with atheris.instrument_imports(include=["snapengine"]):
        from targets import TARGETS, seeds
    name = sys.argv[1]
    corpus = HERE / "corpus" / name
    with tempfile.TemporaryDirectory(prefix="snapengine-fuzz-") as folder:
        for number, seed in enumerate(seeds(name)):
            Path(folder, f"seed-{number}").write_bytes(seed)
        places = [folder, *([str(corpus)] if corpus.is_dir() else [])]
        options = ["-timeout=20", "-rss_limit_mb=2048", "-artifact_prefix=build/fuzz/", *sys.argv[2:]]
        atheris.Setup([sys.argv[0], *options, *places], TARGETS[name], internal_libfuzzer=True)
        atheris.Fuzz()


if __name__ == "__main__":
    main()

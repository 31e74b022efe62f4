"""Build the extension modules; all other metadata is in pyproject.toml."""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

SOURCES = sorted(Path("pyx").rglob("*.pyx"))
# Flags of a sanitizer or of coverage: see .ci/instrumented, which builds apart from the sources.
INSTRUMENT = os.environ.get("SNAPENGINE_INSTRUMENT", "").split()
# Sources to compile, all if none is named: the tests rebuild some with other flags.
ONLY = os.environ.get("SNAPENGINE_ONLY", "").split()
# gcov counts lines of a .pyx. Cython's own tracing (CYTHON_TRACE_NOGIL) takes the GIL for each line of the
# capture threads. A Python thread that holds it may wait in a page fault for just those threads: a deadlock.
LINES = "--coverage" in INSTRUMENT
SANITIZED = ["-O1", "-g", "-fno-omit-frame-pointer", *INSTRUMENT] if INSTRUMENT else []
# -g0: debug information would put the paths of the build machine into the wheel.
FLAGS = ["-O2", "-g0", "-pthread", "-Wall", "-Wextra", "-Wno-unused-parameter"]
C_ROOT = Path("build/coverage/cython" if LINES else "build/cython")
INTERFACES = [
    *Path("snapengine").rglob("*.pxd"),
    *Path("snapengine").rglob("*.h"),
    *Path("pyx").rglob("*.h"),
]


def interfaces_changed() -> bool:
    """cythonize() looks for a module's own .pxd beside its .pyx; ours is in snapengine/."""
    newest = max(path.stat().st_mtime for path in INTERFACES)
    results = [C_ROOT / source.with_suffix(".c") for source in SOURCES]  # not those of sources that are gone
    return any(path.exists() and path.stat().st_mtime < newest for path in results)


extensions = [
    Extension(
        ".".join(["snapengine", *source.relative_to("pyx").with_suffix("").parts]),
        [str(source)],
        include_dirs=["snapengine/include", "pyx"],
        depends=[str(path) for path in INTERFACES],
        extra_compile_args=[*FLAGS, *SANITIZED],
        extra_link_args=["-pthread", *SANITIZED],
    )
    for source in SOURCES
    if not ONLY or str(source) in ONLY
]

setup(
    options={"build_ext": {"parallel": os.cpu_count()}},
    ext_modules=cythonize(
        extensions,
        build_dir=str(C_ROOT),
        nthreads=2,
        force=interfaces_changed(),
        emit_linenums=LINES,
        compiler_directives={"language_level": 3, "embedsignature": True},
    )
)

"""Build the floors and the peers' loops into build/bench/: `python bench/setup_floors.py`."""

import os
import sys
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent.parent
TARGET = Path("build/bench")
FOLDERS = ("bench", "bench/peers")
C_DIR = ROOT / "build/cython/bench"


def sources() -> list[str]:
    """The sources of all modules, relative to the repository."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).glob("*.pyx")]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def interfaces() -> list[Path]:
    """The interfaces that the modules are compiled against."""
    found = [path for suffix in ("pxd", "h") for path in (ROOT / "snapengine").rglob(f"*.{suffix}")]
    return [*found, *(ROOT / "bench/peers").glob("*.pxd")]


def interfaces_changed() -> bool:
    """Whether to compile again: cythonize() compares a module with its source only."""
    newest = max(path.stat().st_mtime for path in interfaces())
    return any(path.stat().st_mtime < newest for path in C_DIR.rglob("*.c"))


def build() -> None:
    """Compile the modules that have changed."""
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        extensions = [
            Extension(
                Path(source).stem,
                [source],
                include_dirs=["snapengine/include", "pyx"],
                depends=[str(path) for path in interfaces()],
                extra_compile_args=["-O2", "-g0", "-pthread", "-Wall", "-Wextra", "-Wno-unused-parameter"],
            )
            for source in sources()
        ]
        modules = cythonize(
            extensions, build_dir="build/cython", include_path=[".", *FOLDERS], language_level=3, quiet=True,
            nthreads=os.cpu_count() or 1, force=interfaces_changed(),
        )  # fmt: skip
        arguments = ["-q", "build_ext", "--build-lib", str(TARGET), "--build-temp", "build/temp.bench"]
        options = {"build_ext": {"parallel": os.cpu_count() or 1}}
        setup(name="floors", script_args=arguments, options=options, packages=[], py_modules=[],
              ext_modules=modules)  # fmt: skip
    finally:
        os.chdir(before)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    build()

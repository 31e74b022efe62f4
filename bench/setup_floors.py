"""Build floors.pyx for the bench: `python bench/setup_floors.py` leaves the module in build/bench/."""

import os
import sys
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent.parent
TARGET = Path("build/bench")


def build() -> None:
    """Compile into build/bench/, relative to the root of the repository, if anything is newer."""
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        extension = Extension(
            "floors",
            ["bench/floors.pyx"],
            include_dirs=["snapengine/include", "pyx"],
            extra_compile_args=["-O2", "-g0", "-pthread", "-Wall", "-Wextra", "-Wno-unused-parameter"],
        )
        modules = cythonize(
            [extension], build_dir="build/cython", include_path=["."], language_level=3, quiet=True
        )
        arguments = ["-q", "build_ext", "--build-lib", str(TARGET), "--build-temp", "build/temp.bench"]
        setup(name="floors", script_args=arguments, packages=[], py_modules=[], ext_modules=modules)
    finally:
        os.chdir(before)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    build()

"""How an embedder builds against the installed package: its own setup.py, and `get_include()`."""

from Cython.Build import cythonize
from setuptools import Extension, setup

import snapengine

include = snapengine.get_include()
flags = ["-Wall", "-Wextra", "-Werror=implicit-function-declaration"]
modules = [
    Extension("cython_consumer", ["cython_consumer.pyx"], include_dirs=include, extra_compile_args=flags),
    Extension("c_consumer", ["c_consumer.c"], include_dirs=include, extra_compile_args=flags),
]
setup(name="embed", ext_modules=cythonize(modules, include_path=include, language_level=3))

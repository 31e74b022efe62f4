"""Builds the example: python setup.py -q build_ext --inplace"""

from setuptools import Extension, setup

import snapengine

setup(
    name="embedder",
    ext_modules=[Extension("embedder", ["embedder.c"], include_dirs=snapengine.get_include())],
)

"""Builds the example: python setup.py -q build_ext --inplace"""

from Cython.Build import cythonize
from setuptools import Extension, setup

import snapengine

include = snapengine.get_include()
modules = [Extension("embedder", ["embedder.pyx"], include_dirs=include)]
setup(name="embedder", ext_modules=cythonize(modules, include_path=include, language_level=3))

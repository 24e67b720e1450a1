"""The compiled half of the NumPy backend; everything else is in pyproject.toml."""

import numpy
from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "anystore._moves",
            ["anystore/_moves.c"],
            include_dirs=[numpy.get_include()],
            extra_compile_args=["-O3", "-Wall", "-Wextra", "-Wno-unused-parameter"],
            # Without a compiler, or where it does not compile, the plain NumPy half does the same, only slower.
            optional=True,
        )
    ]
)

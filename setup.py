"""The compiled halves of the NumPy backend and of prioritised sampling; everything else is in pyproject.toml."""

import numpy
from setuptools import Extension, setup


def compiled(name: str) -> Extension:
    """The extension module of this name."""
    return Extension(
        name,
        [f"{name.replace('.', '/')}.c"],
        include_dirs=[numpy.get_include()],
        extra_compile_args=["-O3", "-Wall", "-Wextra", "-Wno-unused-parameter"],
        # Without a compiler, or where it does not compile, the plain half does the same, only slower.
        optional=True,
    )


setup(ext_modules=[compiled("anystore._moves"), compiled("anystore.replay._sum_tree")])

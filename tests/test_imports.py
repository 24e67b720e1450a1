"""Which libraries an import brings in: those that were asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIBRARIES = {
    "cupy",
    "torch",
    "jax",
    "array_api_strict",
    "tensorflow",
    "tf_agents",
    "gymnasium",
    "ml_dtypes",
    "matplotlib",
}
USE = """
import sys
from anystore import ArraySpec, Storage
store = Storage({"x": ArraySpec((2,), "float32")}, 4, backend=%r)
store.set([1, 2], {"x": [[1, 2], [3, 4]]})
store.get(1)
"""


def imported_by(program: str) -> set[str]:
    listing = f"{program}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run([sys.executable, "-c", listing], check=True, capture_output=True, text=True).stdout.split()
    )


def test_importing_anystore_brings_in_no_array_library_but_numpy():
    found = imported_by("from anystore import *")
    assert "numpy" in found
    assert not found & LIBRARIES


def test_using_numpy_brings_in_no_other():
    assert not imported_by(USE % "numpy") & LIBRARIES


@pytest.mark.parametrize(
    ("backend", "brings"),
    [("torch", {"torch"}), ("jax", {"jax", "ml_dtypes"}), ("array_api_strict", {"array_api_strict"})],
)
def test_using_one_brings_in_no_other(backend, brings):
    pytest.importorskip(backend)
    found = imported_by(USE % backend)
    assert found & LIBRARIES <= brings | ({"ml_dtypes"} & found)
    assert backend in found

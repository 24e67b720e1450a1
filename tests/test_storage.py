"""The contract, on every backend."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import numpy as np
import pytest

from anystore import ArraySpec, Storage, backends, moves, rows
from anystore.convert import to_numpy
from anystore.values import CASTINGS, can_cast
from tests import stand_in
from tests.contract import StorageContract
from tests.on_backends import OnDisk
from tests.test_moves import plain_moves

ALL = StorageContract.dtypes
EXTENSIONS = ("bfloat16", "float8_e4m3fn", "float8_e5m2")


class TestNumpy(StorageContract):
    backend, device = "numpy", "cpu"
    dtypes = (*ALL, "uint16", "uint32", "uint64", "float16", "complex64", "complex128", ">i4", "S3", *EXTENSIONS)


class TestPlainNumpy(TestNumpy):
    """Without the compiled moves."""

    @pytest.fixture(autouse=True)
    def _uncompiled(self, monkeypatch):
        plain = plain_moves()
        for name in plain.__all__:
            monkeypatch.setattr(moves, name, getattr(plain, name))
        monkeypatch.setattr(rows, "all_inside", plain.all_inside)


class TestDisk(OnDisk, TestNumpy):
    pass


class TestTorch(StorageContract):
    backend, device = "torch", "cpu"
    backward_views = False
    dtypes = (*ALL, "uint16", "uint32", "uint64", "float16", "complex64", "complex128", *EXTENSIONS)
    no_dtypes = (">i4", "M8[ns]")


class TestTorchAsOnADevice(TestTorch):
    """With torch's own operations, as on a GPU, but on the CPU."""

    @pytest.fixture(autouse=True)
    def _opened(self, monkeypatch):
        backend = importlib.import_module("anystore.backends.torch")
        monkeypatch.setattr(backend, "TorchHostBackend", backend.TorchBackend)
        monkeypatch.setattr(backends, "_shared", {})


@pytest.mark.gpu
class TestTorchCuda(TestTorch):
    backend, device = "torch", "cuda:0"


class TestJax(StorageContract):
    backend, device = "jax", "cpu"
    views = False
    dtypes = (
        "bool",
        "uint8",
        "int8",
        "int16",
        "int32",
        "uint16",
        "uint32",
        "float16",
        "float32",
        "complex64",
        *EXTENSIONS,
    )
    no_dtypes = ("int64", "uint64", "float64", "complex128", ">i4")


@pytest.mark.gpu
class TestJaxCuda(TestJax):
    backend, device = "jax", "cuda:0"


class TestStrict(StorageContract):
    backend, device = "array_api_strict", "cpu"
    dtypes = (*ALL, "uint16", "uint32", "uint64", "complex64", "complex128")
    no_dtypes = ("float16", "bfloat16")


class TestStrictWithoutFloat64(TestStrict):
    device = "no_float64"
    dtypes = tuple(name for name in TestStrict.dtypes if name not in ("float64", "complex128"))
    no_dtypes = ("float64", "complex128", "float16")


class TestStrictWithout64Bits(TestStrict):
    device = "no_x64"
    dtypes = tuple(name for name in TestStrict.dtypes if name not in ("int64", "uint64", "float64", "complex128"))
    no_dtypes = ("float64", "complex128", "int64", "uint64")


class TestStrictDevice1(TestStrict):
    device = "device1"


class TestStrictDevice2(TestStrict):
    device = "device2"


@pytest.mark.gpu
class TestCupy(StorageContract):
    backend, device = "cupy", "cuda:0"
    dtypes = (*ALL, "uint16", "uint32", "uint64", "float16", "complex64", "complex128", "bfloat16")
    no_dtypes = ("float8_e5m2", ">i4")


class TestCupyOnAStandIn(StorageContract):
    """The CuPy backend's own code where there is no GPU; on its second device, to see that it stays there."""

    backend, device = "cupy", "cuda:1"
    dtypes = TestCupy.dtypes
    no_dtypes = TestCupy.no_dtypes
    on_a_stand_in = True

    @pytest.fixture(autouse=True)
    def _installed(self, monkeypatch):
        with stand_in.installed(monkeypatch):
            yield

    def wipe(self, store, nest):
        with stand_in.Device(1):
            super().wipe(store, nest)


@pytest.mark.parametrize(
    ("backend", "dtype", "value"),
    [
        ("numpy", "bfloat16", 1j),
        ("numpy", "bfloat16", np.complex64(1j)),
        ("numpy", "float8_e5m2", np.full((), 1j)),
        ("torch", "bfloat16", 1j),
        ("jax", "bfloat16", np.complex64(1j)),
        ("numpy", "int4", 1.5),
        ("numpy", "int4", np.float32(1.5)),
        ("jax", "int4", 1.5),
        ("numpy", "uint4", np.int8(-1)),
    ],
)
def test_extension_types_lose_no_kind(backend: str, dtype: str, value: Any) -> None:
    """NumPy finds them to be of the same kind as any other."""
    pytest.importorskip(backend)
    pytest.importorskip("ml_dtypes")
    store = Storage({"x": ArraySpec((), dtype)}, 3, backend=backend, device="cpu")
    with pytest.raises(TypeError, match=f"^x: expected {dtype}, found .*, which casting='same_kind' refuses"):
        store.set(0, {"x": value})
    assert to_numpy(store.get(...)["x"]).astype(np.float32).tolist() == [0, 0, 0]


def test_integers_past_64_bits_in_an_extension_type() -> None:
    pytest.importorskip("ml_dtypes")
    store = Storage({"x": ArraySpec((), "bfloat16")}, 3)
    store.set(0, {"x": 2**64})
    assert float(store.get(0)["x"]) == 2.0**64
    with pytest.raises(OverflowError, match="^x: expected integers that fit bfloat16, found "):
        store.set(0, {"x": 2**128})


@pytest.mark.parametrize(
    ("dtype", "value"),
    [("int32", ["a", "b"]), ("int32", np.array(["a", "b"])), ("longdouble", [10**400, 1])],
    ids=["strings", "an array of strings", "an integer past all floats"],
)
def test_what_cannot_be_converted_is_refused_by_path(dtype: str, value: Any) -> None:
    store = Storage({"x": ArraySpec((2,), dtype)}, 3, casting="unsafe")
    with pytest.raises((TypeError, OverflowError), match="^x: "):
        store.set(0, {"x": value})
    assert not store.get(...)["x"].any()


def test_casting_is_that_of_numpy_for_its_own_dtypes() -> None:
    names = ("bool", "int8", "uint8", "int64", "uint64", "float16", "float64", "complex64", "complex128", "M8[s]", "S3")
    for found, expected in itertools.product(map(np.dtype, names), repeat=2):
        for casting in CASTINGS:
            assert can_cast(found, expected, casting) == np.can_cast(found, expected, casting)

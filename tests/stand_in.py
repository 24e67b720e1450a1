"""A stand-in for CuPy on NumPy memory: as much of it as the CuPy backend calls, with CuPy's own strictness.

It lets the contract run the backend's Python where there is no GPU. What it cannot show is that CuPy itself does
what is expected of it here; for that the same contract runs on a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import sys
import types
from typing import Any

import array_api_compat
import numpy as np

import anystore.backends


class Device:
    """One of two devices; `current` is what CuPy would use if it is not told."""

    current = 0
    mem_info = (2**34, 2**35)
    __hash__ = None  # type: ignore[assignment]  # as CuPy's

    def __init__(self, number: int | None = None) -> None:
        self.id = Device.current if number is None else number
        self._outer: list[int] = []

    def __enter__(self) -> Device:
        self._outer.append(Device.current)
        Device.current = self.id
        return self

    def __exit__(self, *error: object) -> None:
        Device.current = self._outer.pop()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and other.id == self.id


class ndarray:  # noqa: N801  # CuPy's name
    """An array that is not NumPy's: it is neither read as one nor mixed with one in silence."""

    def __init__(self, host: Any) -> None:
        self._host = host
        self.device = Device()

    def _check_device(self) -> None:
        assert self.device.id == Device.current, "the current device is not the array's own"

    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    flags = property(lambda self: self._host.flags)

    def get(self) -> Any:
        return self._host.copy()

    def copy(self) -> ndarray:
        self._check_device()
        return ndarray(self._host.copy())

    def reshape(self, shape: Any) -> ndarray:
        return ndarray(self._host.reshape(shape))

    def astype(self, dtype: Any, copy: bool = True) -> ndarray:
        return ndarray(self._host.astype(dtype, copy=copy))

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def __getitem__(self, index: Any) -> ndarray:
        found = self._host[_rows(index)]
        return ndarray(found if isinstance(found, np.ndarray) else np.array(found))

    def __setitem__(self, index: Any, value: Any) -> None:
        self._check_device()
        assert isinstance(value, ndarray), "CuPy takes no NumPy array here"
        rows = _rows(index)
        assert (
            not isinstance(rows, np.ndarray)
            or len(np.unique(rows)) == rows.size
            or (value.ndim < self.ndim or _equal_writes(rows, value._host))
        )
        self._host[rows] = value._host


def _equal_writes(rows: Any, values: Any) -> bool:
    """Whether all values for a row are the same, without which the outcome is undefined."""
    return all((values[rows == row] == values[rows == row][0]).all() for row in rows)


def _rows(index: Any) -> Any:
    if isinstance(index, ndarray):
        return index._host
    assert not isinstance(index, np.ndarray)
    return index


def asarray(value: Any, dtype: Any = None) -> ndarray:
    if isinstance(value, ndarray):
        same = value.device.id == Device.current and dtype in (None, value.dtype)
        return value if same else ndarray(value._host.astype(dtype or value.dtype))
    return ndarray(np.array(value, dtype))


def take(array: ndarray, rows: ndarray, axis: int, out: ndarray | None = None) -> ndarray:
    array._check_device()
    # CuPy wraps what is out of range; nothing that is may come this far.
    assert rows.size == 0 or (rows._host.min() >= 0 and rows._host.max() < array.shape[0])
    if out is None:
        return ndarray(np.take(array._host, rows._host, axis))
    out._host[...] = np.take(array._host, rows._host, axis)
    return out


def module() -> types.ModuleType:
    """What ``import cupy`` finds."""
    cupy = types.ModuleType("cupy")
    cupy.ndarray, cupy.asarray, cupy.take = ndarray, asarray, take  # type: ignore[attr-defined]
    cupy.zeros = lambda shape, dtype: ndarray(np.zeros(shape, dtype))  # type: ignore[attr-defined]
    cupy.zeros_like = lambda array: ndarray(np.zeros_like(array._host))  # type: ignore[attr-defined]
    cupy.may_share_memory = lambda a, b: np.may_share_memory(a._host, b._host)  # type: ignore[attr-defined]
    cupy.get_default_memory_pool = lambda: types.SimpleNamespace(free_bytes=lambda: 0)  # type: ignore[attr-defined]
    cupy.cuda = types.SimpleNamespace(  # type: ignore[attr-defined]
        Device=Device,
        is_available=lambda: True,
        runtime=types.SimpleNamespace(getDeviceCount=lambda: 2),
    )
    cupy.__version__ = "stand-in"
    cupy.__spec__ = importlib.machinery.ModuleSpec("cupy", None)
    ndarray.__module__ = "cupy"
    return cupy


@contextlib.contextmanager
def installed(monkeypatch: Any) -> Any:
    """Within, "cupy" names a backend on the stand-in."""
    cupy = module()
    compat = types.ModuleType("array_api_compat.cupy")
    compat.__dict__.update({name: value for name, value in vars(cupy).items() if not name.startswith("__")})
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "array_api_compat.cupy", compat)
    monkeypatch.setattr(array_api_compat, "cupy", compat, raising=False)
    monkeypatch.delitem(sys.modules, "anystore.backends.cupy", raising=False)
    monkeypatch.setattr(anystore.backends, "_shared", {})
    importlib.import_module("anystore.backends.cupy")
    yield cupy
    sys.modules.pop("anystore.backends.cupy")

"""NumPy, on the CPU."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anystore.backends.base import Array, Backend, resolve_device
from anystore.rows import Rows, basic_index
from anystore.specs import ArraySpec, limits

__all__ = ["NumpyBackend"]

_NUMBERS = {bool: "b", int: "iu", float: "fc", complex: "c"}
"""The kinds of dtype that a Python number of each class is written to as it is."""


class NumpyBackend(Backend):
    """NumPy arrays in main memory."""

    name = library = "numpy"

    def __init__(self, device: Any = None) -> None:
        self.device = "cpu" if device is None else resolve_device(str(device), self.devices(), "NumPy")

    @property
    def xp(self) -> ModuleType:
        # As long to import as NumPy itself, and needed by those who ask for it only.
        return importlib.import_module("array_api_compat.numpy")

    @classmethod
    def devices(cls) -> list[str]:
        return ["cpu"]

    def native_dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        return dtype

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        return np.zeros(shape, dtype)

    def gather(self, buffers: Sequence[NDArray[Any]], rows: Rows, copy: bool | None) -> list[Array]:
        if type(rows) is np.ndarray:
            # The rows are known to be good: "clip" spares NumPy a second check.
            return [buffer.take(rows, 0, None, "clip") for buffer in buffers]
        index = basic_index(rows)  # type: ignore[arg-type]
        if copy:
            return [buffer[index].copy() for buffer in buffers]
        return [buffer[index] for buffer in buffers]

    def gather_into(self, buffers: Sequence[NDArray[Any]], rows: Rows, out: Sequence[Array]) -> None:
        for buffer, array in zip(buffers, out):
            if isinstance(rows, np.ndarray):
                buffer.take(rows, 0, array, "clip")
            else:
                array[...] = buffer[basic_index(rows)]

    def scatter(self, buffers: Sequence[NDArray[Any]], rows: Rows, leaves: Sequence[Array]) -> None:
        # Of several values for one row NumPy leaves the last, since the rows are C-contiguous.
        index = rows if isinstance(rows, np.ndarray) else basic_index(rows)
        for buffer, leaf in zip(buffers, [_apart(leaf, buffers) for leaf in leaves]):
            buffer[index] = leaf

    def fits(self, leaves: Sequence[Any], specs: Sequence[ArraySpec], lead: tuple[int, ...]) -> bool:
        for leaf, spec in zip(leaves, specs):
            kind = type(leaf)
            if kind is np.ndarray:
                if leaf.dtype != spec.dtype or leaf.shape != (lead + spec.shape if lead else spec.shape):
                    return False
            elif lead or spec.shape or kind is not spec.dtype.type:
                # A number of Python's own, which NumPy writes as it should unless it is an integer too large.
                if kind not in _NUMBERS or spec.dtype.kind not in _NUMBERS[kind] or lead or spec.shape:
                    return False
                low, high = limits(spec.dtype)
                if kind is int and not low <= leaf <= high:
                    return False
        return True

    def from_numpy(self, array: NDArray[Any]) -> NDArray[Any]:
        return array

    def move(self, array: Array, dtype: np.dtype[Any]) -> Array:
        return array.astype(dtype, copy=False)

    def writable(self, array: Array) -> bool:
        return isinstance(array, np.ndarray) and array.flags.writeable


def _apart(leaf: Any, buffers: Sequence[NDArray[Any]]) -> Any:
    """`leaf`, copied if it is a view of a buffer, which would change under its reader."""
    if getattr(leaf, "base", None) is not None and any(np.may_share_memory(leaf, buffer) for buffer in buffers):
        return leaf.copy()
    return leaf

"""Any other namespace of the array API standard, by the standard's own words."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anystore.backends.base import Array, Backend, host_memory, no_dtype, resolve_device
from anystore.convert import to_numpy
from anystore.moves import basic_index
from anystore.rows import Rows


class GenericBackend(Backend):
    """Arrays of a namespace that follows the array API standard and lets its arrays be written to.

    Parameters
    ----------
    namespace : module
        What ``array.__array_namespace__()`` gives.
    device : str or device object, optional
        One of ``namespace.__array_namespace_info__().devices()``, or what it prints as.

    Notes
    -----
    The standard has no assignment through an index array, so such a write goes row by row.
    """

    def __init__(self, namespace: ModuleType, device: Any = None) -> None:
        self._xp = namespace
        self.name = namespace.__name__
        self.library = self.name.partition(".")[0]
        info = namespace.__array_namespace_info__()
        devices = {_spell(each): each for each in info.devices() if each is not None}
        if device is None:
            device = info.default_device()
        self.device = resolve_device(_spell(device), list(devices), self.name)
        self._device = devices[self.device]
        self._dtypes = info.dtypes(device=self._device)
        self.has_views = self._shares_views()

    @property
    def xp(self) -> ModuleType:
        return self._xp

    @classmethod
    def devices(cls) -> list[str]:
        raise NotImplementedError("which devices there are depends on the namespace")

    def native_dtype(self, dtype: np.dtype[Any]) -> Any:
        if not dtype.isnative or dtype.name not in self._dtypes:
            raise no_dtype(f"{self.name} on {self.device}", dtype)
        return self._dtypes[dtype.name]

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        if shape[0] > np.iinfo(self.index_dtype).max:
            raise ValueError(f"{self.name} on {self.device} counts rows in {self.index_dtype}")
        return self._xp.zeros(shape, dtype=self.native_dtype(dtype), device=self._device)

    def gather(self, buffers: Sequence[Array], rows: Rows, copy: bool | None) -> list[Array]:
        if isinstance(rows, np.ndarray):
            index = self.as_index(rows.reshape(-1))
            return [self._take(buffer, index, rows.shape) for buffer in buffers]
        views = [buffer[basic_index(rows)] for buffer in buffers]
        return [self._xp.asarray(view, copy=True) for view in views] if copy else views

    def scatter(self, buffers: Sequence[Array], rows: Rows, leaves: Sequence[Array]) -> None:
        # Read once, since they may be a view of a buffer themselves.
        flat = rows.reshape(-1).tolist() if isinstance(rows, np.ndarray) else []
        # The standard cannot tell whether two arrays share memory, and a leaf may be a view of a buffer.
        for buffer, leaf in zip(buffers, [self._xp.asarray(leaf, copy=True) for leaf in leaves]):
            if not isinstance(rows, np.ndarray):
                buffer[basic_index(rows)] = leaf
                continue
            if leaf.ndim < buffer.ndim - 1 + rows.ndim:
                leaf = self._xp.broadcast_to(leaf, rows.shape + buffer.shape[1:])
            leaf = self._xp.reshape(leaf, (rows.size, *buffer.shape[1:]))
            for position, row in enumerate(flat):
                buffer[row, ...] = leaf[position, ...]

    def flatnonzero(self, mask: Array) -> Array:
        return self.as_index(np.flatnonzero(to_numpy(mask)))

    def from_numpy(self, array: NDArray[Any]) -> Array:
        return self._xp.asarray(array, dtype=self.native_dtype(array.dtype), device=self._device)

    def move(self, array: Array, dtype: Any) -> Array:
        # First, since the device may lack the dtype that the array has.
        array = self._xp.astype(array, dtype, copy=False)
        return array if array.device == self._device else array.to_device(self._device)

    def writable(self, array: Array) -> bool:
        return super().writable(array) and array.device == self._device

    def free_memory(self) -> int | None:
        return host_memory() if self.device == "cpu" else None

    def _take(self, buffer: Array, index: Array, shape: tuple[int, ...]) -> Array:
        return self._xp.reshape(self._xp.take(buffer, index, axis=0), shape + buffer.shape[1:])

    def _shares_views(self) -> bool:
        array = self._xp.zeros((2,), dtype=self._xp.bool, device=self._device)
        view = array[0:1]
        view[0] = True
        return bool(array[0])


class StrictBackend(GenericBackend):
    """array_api_strict, the standard's own reference."""

    def __init__(self, device: Any = None) -> None:
        super().__init__(importlib.import_module("array_api_strict"), device)

    def count_nonzero(self, mask: Array) -> int:
        # Its count_nonzero returns int64, also on a device that has none.
        dtype = self.native_dtype(self.index_dtype)
        return int(self.xp.sum(self.xp.astype(mask, dtype), dtype=dtype))

    @classmethod
    def devices(cls) -> list[str]:
        strict = importlib.import_module("array_api_strict")
        return [_spell(device) for device in strict.__array_namespace_info__().devices()]


def _spell(device: Any) -> str:
    """What a device prints as, less what is the same for every device of the library."""
    text = str(device)
    quoted = re.search(r"'([^']+)'", text)
    name = quoted[1] if quoted else text
    return "cpu" if name.upper() in ("CPU", "CPU_DEVICE") else name

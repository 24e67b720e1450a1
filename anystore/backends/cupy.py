"""CuPy, on an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import array_api_compat.cupy
import cupy
import numpy as np
from numpy.typing import NDArray

from anystore.backends.base import Array, Backend, no_dtype, parse_device, resolve_device
from anystore.rows import Rows, basic_index, last_writes
from anystore.specs import is_extension

__all__ = ["CupyBackend"]


class CupyBackend(Backend):
    """CuPy arrays on one GPU.

    Notes
    -----
    Everything runs on CuPy's current stream, under the store's own device whatever the current one is.
    """

    name = library = "cupy"

    def __init__(self, device: Any = None) -> None:
        devices = self.devices()
        if not devices:
            raise ValueError("no CUDA device can be used here; CuPy runs on NVIDIA GPUs only")
        if device is None:
            device = cupy.cuda.Device()
        if isinstance(device, cupy.cuda.Device):
            device = f"cuda:{device.id}"
        self.device = resolve_device(str(device), devices, "CuPy")
        # array-api-compat lets CuPy's creation functions ignore device= (array-api-compat #337).
        self._device = cupy.cuda.Device(parse_device(self.device)[1])

    @property
    def xp(self) -> ModuleType:
        return array_api_compat.cupy

    @classmethod
    def devices(cls) -> list[str]:
        if not cupy.cuda.is_available():
            return []
        return [f"cuda:{number}" for number in range(cupy.cuda.runtime.getDeviceCount())]

    def native_dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        known = dtype.name == "bfloat16" if is_extension(dtype) else dtype.kind in "biufc" and dtype.itemsize <= 16
        if not known or not dtype.isnative:
            raise no_dtype("CuPy", dtype)
        return dtype

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        with self._device:
            return cupy.zeros(shape, dtype)

    def gather(self, buffers: Sequence[Array], rows: Rows, copy: bool | None) -> list[Array]:
        with self._device:
            if isinstance(rows, np.ndarray):
                index = cupy.asarray(rows)
                return [cupy.take(buffer, index, axis=0) for buffer in buffers]
            views = [buffer[basic_index(rows)] for buffer in buffers]
            return [view.copy() for view in views] if copy else views

    def gather_into(self, buffers: Sequence[Array], rows: Rows, out: Sequence[Array]) -> None:
        with self._device:
            index = cupy.asarray(rows) if isinstance(rows, np.ndarray) else basic_index(rows)
            for buffer, array in zip(buffers, out):
                if isinstance(rows, np.ndarray) and array.flags.c_contiguous:
                    cupy.take(buffer, index, axis=0, out=array)
                else:
                    array[...] = buffer[index]

    def scatter(self, buffers: Sequence[Array], rows: Rows, leaves: Sequence[Array]) -> None:
        with self._device:
            leaves = [
                leaf.copy() if any(cupy.may_share_memory(leaf, buffer) for buffer in buffers) else leaf
                for leaf in leaves
            ]
            if not isinstance(rows, np.ndarray):
                for buffer, leaf in zip(buffers, leaves):
                    buffer[basic_index(rows)] = leaf
                return
            index = cupy.asarray(rows.reshape(-1))
            last = last_writes(rows.reshape(-1))
            for buffer, leaf in zip(buffers, leaves):
                if leaf.ndim == buffer.ndim - 1 + rows.ndim:
                    leaf = leaf.reshape((rows.size, *buffer.shape[1:]))
                    leaf = leaf if last is None else leaf[cupy.asarray(last)]
                buffer[index] = leaf

    def from_numpy(self, array: NDArray[Any]) -> Array:
        with self._device:
            return cupy.asarray(array)

    def move(self, array: Array, dtype: np.dtype[Any]) -> Array:
        with self._device:
            return cupy.asarray(array, dtype)

    def writable(self, array: Any) -> bool:
        return isinstance(array, cupy.ndarray) and array.device.id == self._device.id

    def free_memory(self) -> int | None:
        with self._device:
            return int(self._device.mem_info[0] + cupy.get_default_memory_pool().free_bytes())

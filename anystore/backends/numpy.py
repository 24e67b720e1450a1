"""NumPy, on the CPU: in main memory, or in files on a disk."""

from __future__ import annotations

import functools
import importlib
import math
import mmap
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anystore import moves
from anystore.backends.base import Array, Backend, free_disk, is_disk, resolve_device
from anystore.backends.random import NumpyRandom, Random
from anystore.moves import basic_index
from anystore.rows import Rows

_LARGE = 1 << 22
"""From this many bytes on, buffers are in huge pages, or on the disk."""


class NumpyBackend(Backend):
    """NumPy arrays in main memory, or on a disk.

    Notes
    -----
    With the device "disk:/scratch", buffers of 4 MiB or more are in files of that directory that are memory-mapped and
    have no names: they may be larger than the memory, and are gone with the storage, or with the process, however it
    ends. Their room on the disk is taken at once, and each holds a file open. A process that is forked off shares these
    files and nothing else of the storage, which only one of the two may go on to use.
    """

    name = library = "numpy"
    index_dtype, float_dtype = np.dtype("int64"), np.dtype("float64")

    def __init__(self, device: Any = None) -> None:
        device = "cpu" if device is None else str(device)
        self._scratch = _directory(device) if is_disk(device) else None
        on_disk = self._scratch is not None
        self.device = f"disk:{self._scratch}" if on_disk else resolve_device(device, self.devices(), "NumPy")

    @property
    def xp(self) -> ModuleType:
        return _namespace()

    @classmethod
    def devices(cls) -> list[str]:
        return ["cpu"]

    def native_dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        return dtype

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        return zeros(shape, dtype, self._scratch)

    @property
    def books_elsewhere(self) -> bool:
        return self._scratch is not None

    def free_memory(self) -> int | None:
        if self._scratch is None:
            return super().free_memory()
        try:
            return free_disk(self._scratch)
        except OSError:  # which allocation then tells of
            return None

    def gather(self, buffers: Sequence[NDArray[Any]], rows: Rows, copy: bool | None) -> list[Array]:
        if copy or type(rows) is np.ndarray:
            return moves.gather(buffers, rows)
        if type(rows) is int:
            return moves.view_one(buffers, rows)
        index = basic_index(rows)  # type: ignore[arg-type]  # a range, then
        return [buffer[index] for buffer in buffers]

    def gather_into(self, buffers: Sequence[NDArray[Any]], rows: Rows, out: Sequence[Array]) -> None:
        moves.gather_into(buffers, rows, out)

    def scatter(self, buffers: Sequence[NDArray[Any]], rows: Rows, leaves: Sequence[Array]) -> None:
        if not moves.scatter(buffers, rows, leaves):
            raise ValueError(
                "nothing was written: the storage is open for reading only; open it with mode='r+' to write"
            )

    def scatter_as_is(self, buffers: Sequence[NDArray[Any]], rows: Rows, leaves: Sequence[Any]) -> bool:
        return moves.scatter(buffers, rows, leaves)

    def from_numpy(self, array: NDArray[Any]) -> NDArray[Any]:
        return array

    def inside(self, array: NDArray[Any], length: int) -> bool:
        return moves.all_inside(array, length) or super().inside(array, length)

    def bounds(self, array: NDArray[Any]) -> tuple[float, float]:
        # In half the time of np.min and np.max.
        return float(np.minimum.reduce(array, None)), float(np.maximum.reduce(array, None))

    def array(self, buffer: NDArray[Any]) -> NDArray[Any]:
        # An array of its own, since users may give one another shape.
        return buffer.view()

    def move(self, array: Array, dtype: np.dtype[Any]) -> NDArray[Any]:
        return np.asarray(array, dtype)

    def random(self, seed: int | None = None) -> Random:
        return NumpyRandom(seed)

    def writable(self, array: Array) -> bool:
        return type(array) is np.ndarray and array.flags.writeable


def _directory(device: str) -> str:
    directory = device.partition(":")[2]
    if not os.path.isdir(directory):
        raise ValueError(f"expected 'disk:' and a directory that is there, found {device!r}")
    return os.path.abspath(directory)


@functools.cache
def _namespace() -> ModuleType:
    # As long to import as NumPy itself, and needed by those who ask for it only.
    return importlib.import_module("array_api_compat.numpy")


def zeros(shape: tuple[int, ...], dtype: np.dtype[Any], scratch: str | None = None) -> NDArray[Any]:
    """An array of zeros whose memory is committed only as it is written to, in huge pages where the system has them.

    The first write to each page of a large array takes longer than the copy itself, and huge pages are few. With a
    directory in `scratch`, a large array is in a file there.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _LARGE or (scratch is None and not hasattr(mmap, "MADV_HUGEPAGE")):
        return np.zeros(shape, dtype)
    pages = _pages(nbytes) if scratch is None else _pages_of_a_file(nbytes, scratch)
    array: NDArray[Any] = np.frombuffer(pages, np.uint8).view(dtype)
    return array.reshape(shape)


def _pages(nbytes: int) -> mmap.mmap:
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _pages_of_a_file(nbytes: int, directory: str) -> mmap.mmap:
    import tempfile

    with tempfile.TemporaryFile(dir=directory) as file:
        # Not as it is written to: the system ends a process that does so when the disk is full.
        os.posix_fallocate(file.fileno(), 0, nbytes)
        return mmap.mmap(file.fileno(), nbytes)

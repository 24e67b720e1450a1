"""The kernels of kernels.cu: compiled once per process and device, launched on a stream of the current device.

A room of its own because two backends launch them: everything here goes by address, whoever owns the memory.
"""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any, NamedTuple

import cupy
from numpy.typing import NDArray

from anystore.leaf_table import THREADS, LeafTable, Placed, RowsOfLaunch, blocks_for, launches, slot_bits

OPTIONS = ("--std=c++17",)
_BLOCK = (THREADS,)


class Stream(NamedTuple):
    """A stream of whatever library, by its address; None in its place stands for CuPy's current one."""

    ptr: int


def on_device(number: int) -> Any:
    """The context in which a device is the one that CuPy launches on."""
    return cupy.cuda.Device(number)


def current_device() -> int:
    """The device that CuPy launches on."""
    number: int = cupy.cuda.runtime.getDevice()
    return number


def source() -> str:
    """The text of kernels.cu."""
    return resources.files("anystore").joinpath("kernels.cu").read_text(encoding="utf-8")


@functools.cache
def _kernel(name: str) -> Any:
    """A kernel, which CuPy compiles when it is first launched on a device: all of the file at once."""
    return cupy.RawKernel(source(), name, OPTIONS)


def gather(table: LeafTable | Placed, base: int, rows: RowsOfLaunch, stream: Stream | None = None) -> None:
    """Fill the batch of every leaf with the rows of its buffer."""
    _move("gather", table, base, rows, stream)


def scatter(table: LeafTable | Placed, base: int, rows: RowsOfLaunch, stream: Stream | None = None) -> None:
    """Write the batch of every leaf to the rows of its buffer."""
    _move("scatter", table, base, rows, stream)


def _move(name: str, table: LeafTable | Placed, base: int, rows: RowsOfLaunch, stream: Stream | None) -> None:
    kernel = _kernel(name)
    for launch in launches(table, base, rows):
        if launch.passed is None:
            launch.passed = (_by_value(launch.memory),)
        kernel((launch.blocks,), _BLOCK, launch.passed, stream=stream)


def _by_value(memory: NDArray[Any]) -> Any:
    """What has CuPy pass this memory: by an undocumented class, since it looks an array's address up at each launch."""
    pointer = getattr(getattr(cupy.cuda, "function", None), "CPointer", None)
    return memory if pointer is None else pointer(memory.ctypes.data)


def check(
    index: int, dtype: Any, count: int, capacity: int, rows: int, outside: int, stream: Stream | None = None
) -> None:
    """Write the rows that `count` integers of this dtype mean to `rows`, and what is wrong with them to `outside`.

    That is two uint64: the largest row past the end, and the size of the most negative one before the start; 0 for
    none.
    """
    _set_bytes(outside, 0, 16, stream)
    arguments = (index, dtype.itemsize, int(dtype.kind == "i"), count, capacity, rows, outside)
    _kernel("check")((blocks_for(count),), _BLOCK, arguments, stream=stream)


def note_last_writes(rows: int, count: int, slots: int, order: int, stream: Stream | None = None) -> None:
    """Write to `order`, for each of the rows, the position of the last value that is written to it.

    `slots` is where there are `slots_nbytes(count)` bytes to work in.
    """
    bits = slot_bits(count)
    _set_bytes(slots, 0xFF, slots_nbytes(count), stream)
    _kernel("note_rows")((blocks_for(count),), _BLOCK, (rows, count, slots, bits), stream=stream)
    _kernel("last_writes")((blocks_for(count),), _BLOCK, (rows, count, slots, bits, order), stream=stream)


def _set_bytes(address: int, byte: int, nbytes: int, stream: Stream | None) -> None:
    on = cupy.cuda.get_current_stream() if stream is None else stream
    cupy.cuda.runtime.memsetAsync(address, byte, nbytes, on.ptr)


def slots_nbytes(count: int) -> int:
    """The bytes that `note_last_writes` needs to work in."""
    return 16 << slot_bits(count)

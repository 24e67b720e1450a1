"""What the kernels of kernels.cu do, in NumPy, on the very arguments of their launches: with these they are compared.

The addresses in the arguments must be those of main memory.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anystore.leaf_table import ENTRY, HEADER, LANES, THREADS

LEAF = np.dtype(
    [
        ("buffer", np.uint64),
        ("batch", np.uint64),
        ("width", np.uint64),
        ("step", np.uint64),
        ("first_block", np.uint32),
        ("lane", np.uint32),
    ]
)
"""An entry of the leaf table; kernels.cu says what the fields are."""
assert LEAF.itemsize == ENTRY.size


def gather(blocks: int, launch: NDArray[Any]) -> None:
    """Fill the batch of every leaf with the rows of its buffer."""
    for leaf, rows, order in _read(blocks, launch):
        assert order is None
        buffer, batch = _rows_at(leaf["buffer"], rows, leaf), _rows_at(leaf["batch"], np.arange(len(rows)), leaf)
        for i, row in enumerate(rows):
            batch[i] = buffer[row]


def scatter(blocks: int, launch: NDArray[Any]) -> None:
    """Write the batch of every leaf to the rows of its buffer."""
    for leaf, rows, order in _read(blocks, launch):
        order = np.arange(len(rows)) if order is None else order
        buffer = _rows_at(leaf["buffer"], rows, leaf)
        batch = _rows_at(leaf["batch"], order, leaf, leaf["step"])
        written: dict[int, Any] = {}
        for row, i in zip(rows.tolist(), order.tolist(), strict=True):
            value = batch[i].copy()
            # On a GPU the writes come in any order.
            assert written.setdefault(row, value).tobytes() == value.tobytes(), f"row {row} is written two values"
            buffer[row] = value


def check(
    _: int, index: int, itemsize: int, is_signed: int, count: int, capacity: int, rows: int, outside: int
) -> None:
    """The rows that an index means, and how far those outside are."""
    found = memory(index, f"{'i' if is_signed else 'u'}{itemsize}", count).tolist()
    past, before = memory(outside, np.uint64, 2).tolist()
    memory(outside, np.uint64, 2)[:] = (
        max([past, *(row for row in found if row >= capacity)]),
        max([before, *(-row for row in found if row < -capacity)]),
    )
    if all(-capacity <= row < capacity for row in found):
        memory(rows, np.int64, count)[:] = [row % capacity for row in found]


def note_rows(_: int, rows: int, count: int, slots: int, bits: int) -> None:
    """The last position of every row; a table that only `last_writes` reads is laid out here in another way."""
    table = memory(slots, np.int64, 2 << bits)
    assert (table == -1).all()
    assert count <= 1 << (bits - 1)
    last = {row: i for i, row in enumerate(memory(rows, np.int64, count).tolist())}
    for slot, (row, i) in enumerate(last.items()):
        table[2 * slot : 2 * slot + 2] = row, i


def last_writes(_: int, rows: int, count: int, slots: int, bits: int, order: int) -> None:
    """For each row the last of its positions."""
    last = dict(memory(slots, np.int64, 2 << bits).reshape(-1, 2).tolist())
    memory(order, np.int64, count)[:] = [last[row] for row in memory(rows, np.int64, count).tolist()]


KERNELS = {function.__name__: function for function in (gather, scatter, check, note_rows, last_writes)}


def memory(address: int, dtype: Any, count: int) -> NDArray[Any]:
    """So many elements of main memory at an address."""
    dtype = np.dtype(dtype)
    if count == 0:
        return np.empty(0, dtype)
    return np.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(int(address)), dtype)


def leaves_of(launch: NDArray[Any]) -> NDArray[Any]:
    """The leaf table of a launch."""
    leaves = HEADER.unpack_from(launch.tobytes())[6]
    return np.frombuffer(launch.tobytes(), LEAF, leaves, HEADER.size)


def _read(blocks: int, launch: NDArray[Any]) -> Any:
    """For each leaf its entry, the rows of the buffer and those of the batch."""
    assert launch.size == 1
    count, base, at, order_at, start, step, _, inside = HEADER.unpack_from(launch.tobytes())
    table = leaves_of(launch).copy()
    table["batch"] += np.uint64(base)
    own = np.frombuffer(launch.tobytes(), np.int64, offset=HEADER.size + table.nbytes)
    rows = own[:count] if inside & 1 else memory(at, np.int64, count) if at else start + step * np.arange(count)
    order = own[count : 2 * count] if inside & 2 else memory(order_at, np.int64, count) if order_at else None
    ends = [*table["first_block"][1:].tolist(), blocks]
    for leaf, end in zip(table, ends, strict=True):
        assert leaf["lane"] in (1, 2, 4, 8, 16)
        for number in (leaf["buffer"], leaf["batch"], leaf["width"], leaf["step"]):
            assert number % leaf["lane"] == 0
        assert end - leaf["first_block"] == _blocks(int(leaf["width"] // leaf["lane"]), count)
        yield leaf, rows, order


def _blocks(lanes: int, count: int) -> int:
    """As many blocks as have a lane to move, counted one by one."""
    if lanes >= THREADS:
        return count * len(range(0, lanes, THREADS * LANES))
    return len(range(0, count, THREADS // lanes * LANES))


def _rows_at(address: Any, rows: Any, leaf: Any, step: Any = None) -> NDArray[Any]:
    """The bytes at an address as rows of the width of the leaf, as far as the last that is needed."""
    width, step = int(leaf["width"]), int(leaf["width"] if step is None else step)
    last = int(rows.max(initial=0))
    found = memory(address, np.uint8, last * step + width)
    return np.lib.stride_tricks.as_strided(found, (last + 1, width), (step, 1))

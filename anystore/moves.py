"""The rows of every leaf of NumPy arrays, moved in one call: in plain NumPy here, compiled in _moves.c.

The compiled functions take the place of these where they were built. These are what they are tested against.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anystore.specs import limits

__all__ = ["all_inside", "gather", "gather_into", "last_writes", "scatter", "view_one"]

_NUMBERS = {bool: "b", int: "iu", float: "f"}
"""The kinds of dtype that a Python number of each class is written to as it is."""


def leading_shape(rows: Any) -> tuple[int, ...]:
    """The axes that a batch of these rows has in front of those of an item."""
    if type(rows) is int:
        return ()
    if type(rows) is range:
        return (len(rows),)
    shape: tuple[int, ...] = rows.shape
    return shape


def basic_index(rows: int | range) -> tuple[Any, ...]:
    """What to index a buffer with to have these rows as a view, a single number of a single row included."""
    if isinstance(rows, int):
        return rows, ...
    # Counting down to row 0 ends at -1, which a slice would read as the last row.
    return slice(rows.start, rows.stop if rows.stop >= 0 else None, rows.step), ...


def all_inside(index: NDArray[Any], capacity: int) -> bool:
    """Whether `index` is a C-contiguous array of intp whose every element is at least 0 and below `capacity`."""
    if index.dtype != np.intp or not index.flags.c_contiguous or index.ndim == 0:
        return False
    return index.size == 0 or bool(index.min() >= 0 and index.max() < capacity)


def last_writes(rows: NDArray[np.intp]) -> NDArray[np.intp] | None:
    """For each of the rows, the position of the last value that is written to it, both counted through all axes.

    With ``values[last_writes(rows)]``, of flat values, every write to a row writes the same value, so that the last one
    wins in whatever order a library writes. None stands for "each row is there once".
    """
    rows = rows.reshape(-1)
    order = np.argsort(rows, kind="stable")
    changes = np.flatnonzero(np.diff(rows[order]))
    ends = np.append(changes, rows.size - 1)  # of each run of equal rows
    if ends.size >= rows.size:
        return None
    last = np.empty_like(order)
    last[order] = np.repeat(order[ends], np.diff(ends, prepend=-1))
    return last


def gather(buffers: Sequence[NDArray[Any]], rows: Any) -> list[NDArray[Any]]:
    """The rows of every buffer, in memory of their own."""
    if type(rows) is np.ndarray:
        # The rows are known to be good: "clip" spares NumPy a second check.
        return [buffer.take(rows, 0, None, "clip") for buffer in buffers]
    index = basic_index(rows)
    return [buffer[index].copy() for buffer in buffers]


def view_one(buffers: Sequence[NDArray[Any]], row: int) -> list[NDArray[Any]]:
    """Live views of one row of every buffer."""
    return [buffer[row, ...] for buffer in buffers]


def gather_into(buffers: Sequence[NDArray[Any]], rows: Any, out: Sequence[NDArray[Any]]) -> None:
    """Fill each array of `out`, of the shape and dtype that `gather` would return, with the rows of its buffer."""
    if any(np.may_share_memory(array, other) for array in out for other in (*buffers, rows)):
        for array, leaf in zip(out, gather(buffers, rows)):
            array[...] = leaf
        return
    for buffer, array in zip(buffers, out):
        if type(rows) is np.ndarray:
            buffer.take(rows, 0, array, "clip")
        else:
            array[...] = buffer[basic_index(rows)]


def scatter(buffers: Sequence[NDArray[Any]], rows: Any, leaves: Sequence[Any]) -> bool:
    """Write a leaf to the rows of each buffer, if every one can be taken just as it is; else write nothing.

    That is an array of the dtype of its buffer and the shape of the rows or of one item, and a number, NumPy's or
    Python's, that its buffer holds without a change. Of several values for one row the last stays.

    Returns
    -------
    bool
        Whether the leaves were written.
    """
    lead = leading_shape(rows)
    if not all(_fits(leaf, buffer, lead) for leaf, buffer in zip(leaves, buffers)):
        return False
    # Of several values for one row NumPy leaves the last, since the rows are C-contiguous.
    # The rows are copied, since they may be a view of a buffer themselves.
    index = rows.copy() if type(rows) is np.ndarray else basic_index(rows)
    arrays = [_apart(np.asarray(leaf, buffer.dtype), buffers) for leaf, buffer in zip(leaves, buffers)]
    for buffer, array in zip(buffers, arrays):
        buffer[index] = array
    return True


def _fits(leaf: Any, buffer: NDArray[Any], lead: tuple[int, ...]) -> bool:
    if not buffer.flags.writeable:
        return False
    if type(leaf) is np.ndarray:
        shape = buffer.shape[1:]
        return bool(leaf.dtype == buffer.dtype) and (leaf.shape == lead + shape or leaf.shape == shape)
    if buffer.ndim > 1:
        return False
    number = type(leaf)
    if number not in _NUMBERS or buffer.dtype.kind not in _NUMBERS[number]:
        return number is buffer.dtype.type and buffer.dtype.kind in "biufc" and buffer.dtype.isnative
    low, high = limits(buffer.dtype)
    return number is not int or low <= leaf <= high


def _apart(leaf: Any, buffers: Sequence[NDArray[Any]]) -> Any:
    """`leaf`, copied if it is a buffer or a view of one, which would change under its reader."""
    owns_memory = leaf.base is None
    if any(leaf is buffer if owns_memory else np.may_share_memory(leaf, buffer) for buffer in buffers):
        return leaf.copy()
    return leaf


with contextlib.suppress(ImportError):
    from anystore._moves import all_inside, gather, gather_into, last_writes, scatter, view_one

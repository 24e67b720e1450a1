"""An index as the user wrote it, and the rows that it means.

Whatever the index, the rows are one of three, all of them inside the storage:

- an ``int``: one item, without a leading axis;
- a ``range``: a slice;
- a C-contiguous NumPy array of ``intp``: a batch with the array's shape in front.

A backend that checks rows where they live adds a fourth for itself: a C-contiguous array of its own, of int64.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

import numpy as np
from numpy.typing import NDArray

from anystore.convert import is_array, to_numpy
from anystore.moves import all_inside

if TYPE_CHECKING:
    from anystore.backends.base import Backend


IndexArray = NDArray[np.intp]
Rows = Union[int, range, IndexArray]

_TAKEN = "an index is an int, a slice, integers (a list, a range, an array), a mask of the capacity's length, or ..."


@dataclass(frozen=True, slots=True)
class KnownRows:
    """Rows that anystore drew itself, taken as an index without a check.

    Attributes
    ----------
    rows : Rows
        On the host, or on the device of the storage they are for.
    capacity : int
        That of the storage they were drawn for; one of fewer rows refuses them.
    """

    rows: Any
    capacity: int


def find_rows(index: Any, capacity: int, backend: Backend | None = None) -> Rows:
    """The rows that `index` means in a storage of `capacity` rows; those on the backend's device are checked there.

    Raises
    ------
    IndexError
        If a row is out of range, or an array is neither of integers nor a mask of the right length.
    TypeError
        If `index` is of no kind that is taken.
    """
    if type(index) is int:
        return _inside(index, capacity)
    if type(index) is slice:
        return _from_slice(index, capacity)
    if type(index) is np.ndarray:
        return index if all_inside(index, capacity) else _from_array(index, capacity)
    if index is Ellipsis:
        return range(capacity)
    if type(index) is KnownRows:
        return _known(index, capacity)
    if is_array(index) and not isinstance(index, np.generic):
        rows = None if backend is None else backend.check_rows(index, capacity)
        return _from_array(to_numpy(index), capacity) if rows is None else rows
    if isinstance(index, (bool, np.bool_, str, bytes, bytearray, tuple)):
        raise TypeError(f"{_TAKEN}; found a {type(index).__name__}: {index!r:.80}")
    if isinstance(index, Sequence):
        return _from_sequence(index, capacity)
    try:
        return _inside(operator.index(index), capacity)
    except TypeError:
        raise TypeError(f"{_TAKEN}; found a {type(index).__name__}: {index!r:.80}") from None


def _inside(row: int, capacity: int) -> int:
    if 0 <= row < capacity:
        return row
    if -capacity <= row < 0:
        return row + capacity
    raise out_of_range(row, capacity)


def out_of_range(row: int, capacity: int) -> IndexError:
    """The error for a row that is not there."""
    return IndexError(f"row {row} is out of range for a capacity of {capacity}")


def _known(index: KnownRows, capacity: int) -> Rows:
    if index.capacity > capacity:
        raise IndexError(f"the rows were drawn for a capacity of {index.capacity}, and this one is {capacity}")
    rows: Rows = index.rows
    return rows


def _from_slice(index: slice, capacity: int) -> range:
    try:
        rows = range(*index.indices(capacity))
    except TypeError:
        raise TypeError(f"expected a slice of integers, found {index}") from None
    if len(rows) > 1:
        return rows
    # An empty one may start and stop at -1, which is a row to a buffer; the step of a single one may be any.
    return range(rows.start, rows.start + 1) if rows else range(0)


def _from_array(index: NDArray[Any], capacity: int) -> Rows:
    kind = index.dtype.kind
    if kind == "b":
        return _from_mask(index, capacity)
    if kind not in "iu":
        raise IndexError(f"{_TAKEN}; found an array of {index.dtype}")
    if index.ndim == 0:
        return _inside(int(index), capacity)
    if index.size == 0:
        return np.empty(index.shape, np.intp)
    # Checked in the index's own dtype: a uint64 past the range of intp would come out negative.
    low, high = index.min(), index.max()
    if high >= capacity or low < -capacity:
        raise out_of_range(high if high >= capacity else low, capacity)
    rows = np.ascontiguousarray(index, np.intp)
    return rows if low >= 0 else np.where(rows < 0, rows + capacity, rows)


def _from_mask(mask: NDArray[np.bool_], capacity: int) -> IndexArray:
    if mask.shape != (capacity,):
        raise IndexError(f"expected a mask of shape ({capacity},), one for each row, found one of shape {mask.shape}")
    return np.flatnonzero(mask)


def _from_range(index: range, capacity: int) -> Rows:
    for end in (*index[:1], *index[-1:]):  # before it is made into an array, which may be long
        _inside(end, capacity)
    if len(index) < 2:  # whose step may be past 64 bits
        return _from_array(np.array(index, np.intp), capacity)
    return _from_array(np.arange(index.start, index.stop, index.step, dtype=np.intp), capacity)


def _from_sequence(index: Sequence[Any], capacity: int) -> Rows:
    if isinstance(index, range):
        return _from_range(index, capacity)
    try:
        array = np.asarray(index)
    except Exception:
        raise TypeError(f"{_TAKEN}; found a {type(index).__name__} that is none of these: {index!r:.80}") from None
    if array.size == 0:
        return np.empty(array.shape, np.intp)  # NumPy makes an array of floats of an empty list
    elements = index if array.ndim == 1 else np.asarray(index, object).flat
    if array.dtype.kind in "iu" and not {bool, np.bool_}.isdisjoint(map(type, elements)):
        raise TypeError(f"{_TAKEN}; found a {type(index).__name__} of integers and bools: {index!r:.80}")
    if array.dtype.hasobject:
        for row in array.flat:  # integers past 64 bits are out of range, and anything else is no integer
            if type(row) is int:
                _inside(row, capacity)
    return _from_array(array, capacity)

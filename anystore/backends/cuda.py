"""What the backends on NVIDIA GPUs share: the kernels check, read and write rows, whoever owns the memory."""

from __future__ import annotations

import bisect
import math
import threading
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from anystore import kernels
from anystore.backends.base import Array, Backend
from anystore.convert import on_gpu
from anystore.leaf_table import LeafTable, Placed, Record, RowsOfLaunch, sent_ahead
from anystore.moves import last_writes, leading_shape
from anystore.rows import Rows, out_of_range
from anystore.specs import as_dtype
from anystore.staging import Sent

T = TypeVar("T")
_KEPT = 16
"""Of at most so many kinds of batches something is kept."""
_NOTHING_SENT = Sent(None, [0])


class Buffers(list[Array]):
    """The buffers of one storage, with what every call needs to know of them.

    Attributes
    ----------
    specs : list of tuple
        The shape of a row of each, and its dtype.
    record : Record
        Where they are, and how wide.
    """

    def __init__(self, buffers: Sequence[Array], address_of: Callable[[Array], int]) -> None:
        super().__init__(buffers)
        self.specs = [(tuple(buffer.shape[1:]), buffer.dtype) for buffer in buffers]
        addresses = [address_of(buffer) for buffer in buffers]
        self.record = Record(addresses, [math.prod(shape) * dtype.itemsize for shape, dtype in self.specs])
        self._made: dict[Any, Any] = {}
        spans = sorted((start, start + buffer.nbytes) for start, buffer in zip(addresses, buffers) if buffer.nbytes)
        self._starts, self._ends = [start for start, _ in spans], [end for _, end in spans]

    def lately(self, kind: Any, make: Callable[[], T]) -> T:
        """What was made for a kind of batch when one was last read, or is made now."""
        made: T | None = self._made.get(kind)
        if made is None:
            made = make()
            if len(self._made) >= _KEPT:
                self._made.clear()
            self._made[kind] = made
        return made

    def overlap(self, start: int, nbytes: int) -> bool:
        """Whether any of so many bytes at this address are those of a buffer; buffers do not overlap one another."""
        before_end = bisect.bisect_left(self._starts, start + nbytes)
        return before_end > 0 and start < self._ends[before_end - 1]


class Borrowed:
    """Arrays of other libraries that are read in place, kept until the GPU has read them.

    Whoever owns the memory gives it to somebody else as soon as nobody refers to it, and knows nothing of the stream
    that still reads from it. Threads may share it.
    """

    def __init__(self) -> None:
        self._noted = threading.local()
        self._lock = threading.Lock()
        self._kept: list[tuple[Callable[[], bool], list[Any]]] = []

    def note(self, array: Any) -> None:
        """An array that this thread is about to have read."""
        self._noted.__dict__.setdefault("arrays", []).append(array)

    def keep(self, launched: Callable[[], Callable[[], bool]]) -> None:
        """What was noted is read by what is launched by now; `launched` gives what tells whether that is done."""
        arrays = self._noted.__dict__.pop("arrays", None)
        if arrays:
            with self._lock:
                before, self._kept = self._kept, [kept for kept in self._kept if not kept[0]()]
                self._kept.append((launched(), arrays))
            del before  # outside of the lock, since arrays of any library end here

    def forget(self) -> None:
        """What was noted has been read, or never will be."""
        self._noted.__dict__.pop("arrays", None)


class CudaBackend(Backend):
    """Arrays on one NVIDIA GPU.

    A library owes what is its own to say: where an array is, how one is made, copied and sent, and which stream and
    which device are current. The rest goes by address.
    """

    _address: Callable[[Array], int]
    """Where the memory of an array starts."""
    _device: Any
    """The device, in the library's own words."""

    _borrowed: Borrowed

    @abstractmethod
    def here(self) -> AbstractContextManager[object]:
        """In which the current device is that of the arrays, to the library and to CuPy, which launches."""

    @abstractmethod
    def _launched(self) -> Callable[[], bool]:
        """What tells whether all is done that was launched on the current stream by now."""

    def _stream(self) -> kernels.Stream | None:
        """The library's current stream; None for that of CuPy."""
        return None

    @abstractmethod
    def _is_contiguous(self, array: Array) -> bool:
        """Whether the memory of an array holds its very values, in C order and with nothing in between."""

    @abstractmethod
    def _copy(self, array: Array) -> Array:
        """A C-contiguous copy."""

    @abstractmethod
    def _on_this_device(self, array: Any) -> Array:
        """An array on a GPU, of whatever library, as one of this library on this device."""

    @abstractmethod
    def _send(self, arrays: Sequence[NDArray[Any]]) -> Sent:
        """Send C-contiguous arrays in one copy."""

    def _empty(self, shape: Any, dtype: Any = None) -> Array:
        """An array of the library's own dtype, int64 unless another is asked for, that holds anything."""
        xp = self.xp
        return xp.empty(shape, dtype=xp.int64 if dtype is None else dtype, device=self._device)

    def together(self, buffers: Sequence[Array]) -> Buffers:
        return buffers if isinstance(buffers, Buffers) else Buffers(buffers, self._address)

    # Rows that live on the device -------------------------------------------------------------------------------------

    def check_rows(self, index: Any, capacity: int) -> Rows | None:
        if index.ndim == 0 or not (self.writable(index) or on_gpu(index)):
            return None
        with self.here():
            try:
                return self._checked_rows(self._on_this_device(index), capacity)
            finally:
                self._borrowed.forget()  # the check waits for the device

    def _checked_rows(self, index: Array, capacity: int) -> Rows | None:
        dtype = as_dtype(index.dtype)
        if dtype.kind == "b" and index.shape == (capacity,):
            return self.as_rows(self.flatnonzero(index))
        if dtype.kind not in "iu" or 0 in index.shape:
            return None
        return self._check(index if self._is_contiguous(index) else self._copy(index), dtype, capacity)

    def _check(self, index: Array, dtype: np.dtype[Any], capacity: int) -> Rows:
        rows: Rows = self._empty(index.shape)
        outside = self._empty(2)
        count, places = math.prod(index.shape), (self._address(rows), self._address(outside))
        kernels.check(self._address(index), dtype, count, capacity, *places, self._stream())
        past, before = (number % 2**64 for number in outside.tolist())  # the one synchronisation
        if past or before:
            raise out_of_range(past or -before, capacity)
        return rows

    def _order(self, rows: Any, count: int) -> Any:
        """For each row the last of its values, where the rows are; None where each is there once."""
        if isinstance(rows, np.ndarray):
            return last_writes(rows)
        if isinstance(rows, (int, range)) or count < 2:
            return None
        slots, order = self._empty(kernels.slots_nbytes(count) // 8), self._empty(count)
        places = self._address(slots), self._address(order)
        kernels.note_last_writes(self._address(rows), count, *places, self._stream())
        return order

    # Reading and writing ----------------------------------------------------------------------------------------------

    def gather_into(self, buffers: Sequence[Array], rows: Rows, out: Sequence[Array]) -> None:
        with self.here():
            filled = [array if self._is_contiguous(array) else self._empty(array.shape, array.dtype) for array in out]
            self._fill(self.together(buffers).record, rows, filled)
            for source, array in zip(filled, out):
                if source is not array:
                    array[...] = source

    def _fill(self, record: Record, rows: Rows, leaves: Sequence[Array]) -> None:
        """Gather the rows into contiguous arrays."""
        count = math.prod(leading_shape(rows))
        self._gather(record, record.table([self._address(leaf) for leaf in leaves], record.widths, count), 0, rows)

    def _gather(self, record: Record, table: LeafTable | Placed, base: int, rows: Rows) -> None:
        sent = self._send_ahead(record, rows, None)
        kernels.gather(table, base, self._of_launch(rows, None, sent.addresses[0]), self._stream())

    def _send_ahead(self, record: Record, rows: Rows, order: Any) -> Sent:
        """Rows that a launch has no room for, and their order, to be held until it is launched; at 0 if none are."""
        ahead = sent_ahead(record, rows, order)
        return _NOTHING_SENT if ahead is None else self._send([ahead])

    def scatter_as_is(self, buffers: Sequence[Array], rows: Rows, leaves: Sequence[Any]) -> bool:
        """Write a whole batch of the library's own arrays, if they are so plain that a glance tells."""
        self._borrowed.forget()  # what an earlier write noted that was refused
        buffers, lead = self.together(buffers), leading_shape(rows)
        batches = self._plain(leaves, buffers, lead)
        if batches is None or 0 in lead:
            return False
        with self.here():
            order = self._order(rows, math.prod(lead))
            sent = self._send_ahead(buffers.record, rows, order)
            self._move(buffers.record, rows, order, batches, buffers.record.widths, sent.addresses[0])
        return True

    def _plain(self, leaves: Sequence[Any], buffers: Buffers, lead: tuple[int, ...]) -> list[int] | None:
        """The addresses of leaves that are read where they are, as they are; None if one of them may not be."""
        addresses = []
        for leaf, (shape, dtype) in zip(leaves, buffers.specs):
            if not self._is_plain(leaf, lead + shape, dtype):
                return None
            address = self._address(leaf)
            if buffers.overlap(address, leaf.nbytes):
                return None
            addresses.append(address)
        return addresses

    @abstractmethod
    def _is_plain(self, leaf: Any, shape: tuple[int, ...], dtype: Any) -> bool:
        """Whether a leaf is a contiguous array of the library's own on this device, of this shape and dtype."""

    def scatter(self, buffers: Sequence[Array], rows: Rows, leaves: Sequence[Array]) -> None:
        """Write a leaf to the rows of each buffer; those that are NumPy arrays are sent in one copy."""
        if math.prod(leading_shape(rows)):
            with self.here():
                self._write(self.together(buffers), rows, leaves)
                self._borrowed.keep(self._launched)

    def _write(self, buffers: Buffers, rows: Rows, leaves: Sequence[Array]) -> None:
        lead, record = leading_shape(rows), buffers.record
        count = math.prod(lead)
        order = self._order(rows, count)
        ahead = sent_ahead(record, rows, order)
        leaves = [self._readable(leaf, buffers) for leaf in leaves]
        host = [leaf for leaf in leaves if isinstance(leaf, np.ndarray)]
        sent = self._send(host if ahead is None else [*host, ahead])
        places = iter(sent.addresses)
        batches = [next(places) if isinstance(leaf, np.ndarray) else self._address(leaf) for leaf in leaves]
        steps = tuple(
            width if leaf.ndim == len(lead) + len(shape) else 0
            for leaf, width, (shape, _) in zip(leaves, record.widths, buffers.specs)
        )
        self._move(record, rows, order, batches, steps, 0 if ahead is None else sent.addresses[-1])

    def _move(
        self, record: Record, rows: Rows, order: Any, batches: Sequence[int], steps: tuple[int, ...], sent: int
    ) -> None:
        """Scatter batches from their addresses; `sent` is that of rows that were sent ahead, or 0."""
        count = math.prod(leading_shape(rows))
        if (count == 1 or steps == record.widths) and self._copied(record, rows, count, 0, batches):
            return
        kernels.scatter(record.table(batches, steps, count), 0, self._of_launch(rows, order, sent), self._stream())

    def _copied(self, record: Record, rows: Rows, count: int, base: int, batches: Sequence[int]) -> bool:
        """Write whole batches, so far behind a base, if that takes no launch; else write nothing and return False."""
        return False

    def _readable(self, leaf: Array, buffers: Buffers) -> Array:
        """A C-contiguous leaf that can be read while the buffers are written to."""
        if isinstance(leaf, np.ndarray):
            return np.asarray(leaf, order="C")
        if self._is_contiguous(leaf) and not buffers.overlap(self._address(leaf), leaf.nbytes):
            return leaf
        return self._copy(leaf)

    def _of_launch(self, rows: Any, order: Any, sent: int) -> RowsOfLaunch:
        """What a launch is told of the rows; `sent` is the address of those that were sent ahead, or 0."""
        if isinstance(rows, (int, range, np.ndarray)):
            return RowsOfLaunch.of(rows, order, sent)
        return RowsOfLaunch(math.prod(rows.shape), self._address(rows), 0 if order is None else self._address(order))

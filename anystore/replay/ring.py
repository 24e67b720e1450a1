"""The running numbers of items, and the rows that they are in.

Items are numbered from 0 as they are added, whatever becomes of them later; item `n` is in row ``n % capacity``. A
number says therefore both where an item is, and whether it is still there. Among the items that are there, each has a
place as well: 0 is that of the oldest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from anystore.backends import Backend
from anystore.backends.base import Array
from anystore.rows import KnownRows
from anystore.storage import Storage


class Ring:
    """Where the next items go, and which ones are there.

    Places and numbers are arrays of any library.

    Parameters
    ----------
    capacity : int
        The number of rows.
    backend : Backend
        Where the items are, whose `bookkeeping` places and numbers are computed with.

    Attributes
    ----------
    total : int
        How many items were ever added: the number of the next one.
    period : int
        A multiple of the capacity. Numbers are handed out modulo it, so that they fit into what the library counts in.
    """

    __slots__ = ("_books", "_cleared", "_overwrote", "capacity", "period", "total")

    def __init__(self, capacity: int, backend: Backend) -> None:
        self.capacity = capacity
        self._books = backend.bookkeeping
        most = int(np.iinfo(backend.index_dtype).max) + 1
        self.period = capacity * (most // capacity - 1) or capacity
        self.total = 0
        self._cleared = 0
        self._overwrote = False

    @property
    def items(self) -> range:
        """The numbers of the items that are there, oldest first."""
        total = self.total  # once, for those who ask without the lock of the buffer
        return range(max(self._cleared, total - self.capacity), total)

    @property
    def overwrote(self) -> bool:
        """Whether items had to go for newer ones, since the ring was last cleared."""
        return self._overwrote or self.total - self._cleared > self.capacity

    def rows(self, places: Array) -> Array:
        """The rows of the items at these places."""
        return _turned(places, self.items, self.capacity)

    def index(self, places: Array) -> KnownRows:
        """The rows of the items at these places, as an index of a storage."""
        return KnownRows(self._books.as_rows(self.rows(places)), self.capacity)

    def numbers(self, places: Array) -> Array:
        """The numbers of the items at these places, modulo the period."""
        return _turned(places, self.items, self.period)

    def places(self, numbers: Array) -> Array:
        """The places of the items of these numbers, modulo the period; outside [0, size) of those that are gone."""
        items = self.items
        places = numbers - items.start % self.period
        return places % self.period if items.stop > self.period else places

    def places_of(self, numbers: NDArray[np.int64]) -> Array:
        """The places of the items of these numbers, which are in main memory and not modulo the period."""
        return self._books.as_index(numbers - self.items.start)

    def in_order(self, leaf: Storage) -> NDArray[Any]:
        """A copy in main memory of what the storage of one leaf has for all items, oldest first."""
        items = self.items
        runs = self._runs(items.start, len(items))
        return np.concatenate([leaf.backend.to_host(leaf._buffers[0], run) for run in runs])

    def next_rows(self, count: int) -> list[range]:
        """The rows of the next `count` items, or of the newest `capacity` of them.

        One run of rows, or two where the ring closes.
        """
        return self._runs(self.total + max(0, count - self.capacity), min(count, self.capacity))

    def _runs(self, number: int, count: int) -> list[range]:
        """The rows of `count` items from this number on."""
        start = number % self.capacity
        stop = start + count
        if stop <= self.capacity:
            return [range(start, stop)]
        return [range(start, self.capacity), range(stop - self.capacity)]

    def advance(self, count: int) -> None:
        """Count `count` more items."""
        self.total += count

    def forget(self, start: int) -> None:
        """Forget the items before number `start`, as if newer ones had overwritten them."""
        if start > self.items.start:
            self._cleared, self._overwrote = min(start, self.total), True

    def clear(self) -> None:
        """Forget all items; numbers go on from where they are."""
        self._cleared, self._overwrote = self.total, False

    def state(self) -> dict[str, Any]:
        """What `restore` takes."""
        return {"oldest": self.items.start, "total": self.total, "overwrote": self.overwrote}

    def restore(self, state: dict[str, Any]) -> None:
        """Hold the newest of the items that the ring held which `state` is of; it may have had another capacity."""
        self.total, self._cleared = state["total"], state["oldest"]
        self._overwrote = state["overwrote"] or self.total - self._cleared > self.capacity


def _turned(places: Array, items: range, length: int) -> Array:
    start = items.start % length
    turned = places + start if start else places
    return turned % length if start + len(items) > length else turned

"""The running numbers of items, and the rows that they are in.

Items are numbered from 0 as they are added, whatever becomes of them later; item `n` is in row ``n % capacity``. A
number says therefore both where an item is, and whether it is still there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from anystore.convert import to_numpy
from anystore.storage import Storage

__all__ = ["Ring", "in_order"]


class Ring:
    """Where the next items go, and which ones are there.

    Parameters
    ----------
    capacity : int
        The number of rows.

    Attributes
    ----------
    total : int
        How many items were ever added: the number of the next one.
    """

    __slots__ = ("_cleared", "_overwrote", "capacity", "total")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
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

    def places(self, count: int) -> list[range]:
        """The rows of the next `count` items, or of the newest `capacity` of them.

        One run of rows, or two where the ring closes.
        """
        start = (self.total + max(0, count - self.capacity)) % self.capacity
        stop = start + min(count, self.capacity)
        if stop <= self.capacity:
            return [range(start, stop)]
        return [range(start, self.capacity), range(stop - self.capacity)]

    def advance(self, count: int) -> None:
        """Count `count` more items."""
        self.total += count

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


def in_order(leaf: Storage, items: range) -> NDArray[Any]:
    """A copy in main memory of what the storage of one leaf has for these items, oldest first."""
    start = items.start % leaf.capacity
    stop = min(start + len(items), leaf.capacity)
    runs = [slice(start, stop), slice(0, len(items) - (stop - start))]
    # Copies, since a storage whose live rows were given away is saved whole ever after.
    return np.concatenate([to_numpy(leaf.get(run, copy=True)) for run in runs])

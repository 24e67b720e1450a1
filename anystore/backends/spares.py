"""Batches of CuPy arrays that are given out again when nobody holds them: making them takes longer than reading rows.

A room of its own because only reference counts tell that nobody holds a batch, and that takes care.
"""

from __future__ import annotations

import collections
import sys
from sys import getrefcount
from typing import Any

from anystore.backends.base import Array

LARGEST = 1 << 20
"""The bytes of the largest batches worth keeping: to fill a larger one takes longer than to make its arrays."""
_LAST = 4
"""So many of the last batches of a shape are kept, so that a user may hold all but one of them."""
_ALONE = next(map(getrefcount, [object()]))
"""The count of an object that is in one list and nowhere else, as counted here."""
_COUNTED: bool = getattr(sys, "_is_gil_enabled", lambda: True)()
"""Whether a count is all there is: Python without its lock keeps more than one."""


class Spare:
    """A batch, with what it takes to tell that nobody holds a part of it.

    Parameters
    ----------
    memory : cupy.cuda.MemoryPointer
        The memory of the batch, which begins there.
    leaves : list of cupy.ndarray
        All that lies in this memory, each from a pointer of its own on.
    """

    __slots__ = ("_counts", "_held", "_leaves", "_shapes", "address")

    def __init__(self, memory: Any, leaves: list[Array]) -> None:
        self.address: int = memory.ptr
        self._leaves = len(leaves)
        self._shapes = [leaf.shape for leaf in leaves]
        # A view refers to the array that it is of; what is made from a pointer, to this or to the memory behind it.
        self._held = [*leaves, *(leaf.data for leaf in leaves), memory.mem]
        self._counts = [_ALONE] * len(leaves) + [_ALONE + 1] * len(leaves) + [_ALONE + len(leaves)]

    def leaves(self) -> list[Array]:
        """The arrays of the batch."""
        return self._held[: self._leaves]

    def is_free(self) -> bool:
        """Whether nobody holds a part of the batch, and its arrays have the shapes that they were made with."""
        if not _COUNTED or list(map(getrefcount, self._held)) != self._counts:
            return False
        return [leaf.shape for leaf in self.leaves()] == self._shapes


class Spares:
    """The last batches of a shape, read on one stream. Threads may share it."""

    def __init__(self) -> None:
        self._lent: collections.deque[Spare] = collections.deque(maxlen=_LAST)

    def take(self) -> Spare | None:
        """A batch that nobody holds."""
        if len(self._lent) < _LAST:
            return None
        try:
            spare = self._lent.popleft()
        except IndexError:  # another thread was faster
            return None
        return spare if spare.is_free() else None

    def lend(self, spare: Spare) -> list[Array]:
        """The arrays of a batch, which is noted as one that may come back."""
        leaves = spare.leaves()
        self._lent.append(spare)  # not before somebody holds them
        return leaves

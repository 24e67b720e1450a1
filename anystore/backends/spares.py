"""Batches of CuPy arrays that are given out again when nobody holds them: making them takes longer than reading rows.

A room of its own because nothing but reference counts tells that nobody holds a batch, and that takes care.
"""

from __future__ import annotations

import collections
import operator
import sys
from sys import getrefcount
from typing import Any
from weakref import getweakrefcount

from anystore.backends.base import Array

_SHAPE, _ADDRESS = operator.attrgetter("shape"), operator.attrgetter("ptr")
_LAST = 4
"""So many of the last batches of a kind are kept, so that a user may hold all but one of them."""
_ALONE = next(map(getrefcount, [object()]))
"""The count of an object that is in one list and nowhere else, as counted here."""
_COUNTED: bool = getattr(sys, "_is_gil_enabled", lambda: True)()
"""Whether a count is all there is: Python without its lock keeps more than one."""
LARGEST = 1 << 18 if _COUNTED else -1
"""The bytes of the largest batches that are kept; for larger ones it makes little difference how they are made."""


class Spare:
    """A batch, with what it takes to tell that nobody holds a part of it.

    Parameters
    ----------
    memory : cupy.cuda.MemoryPointer
        Where the batch begins.
    leaves : list of cupy.ndarray
        The arrays in this memory, each with a `MemoryPointer` of its own.
    """

    __slots__ = ("_counts", "_held", "_leaves", "_made", "address")

    def __init__(self, memory: Any, leaves: list[Array]) -> None:
        self.address: int = memory.ptr
        self._leaves = len(leaves)
        # A view refers to the array that it is of; what is made from a pointer, to this or to the memory behind it.
        self._held = [*leaves, *(leaf.data for leaf in leaves), memory.mem]
        self._counts = [_ALONE] * len(leaves) + [_ALONE + 1] * len(leaves) + [_ALONE + len(leaves)]
        self._made = self._as_they_are()

    def _as_they_are(self) -> list[Any]:
        """What a user can change of arrays, of pointers, and of memory, which can be given back to its pool."""
        return [*map(_SHAPE, self._held[: self._leaves]), *map(_ADDRESS, self._held[self._leaves :])]

    def leaves(self) -> list[Array]:
        """The arrays of the batch."""
        return self._held[: self._leaves]

    def is_free(self) -> bool:
        """Whether nobody holds a part of the batch, nor a weak reference to one, and all is as it was made."""
        if list(map(getrefcount, self._held)) != self._counts or any(map(getweakrefcount, self.leaves())):
            return False
        return self._as_they_are() == self._made


class Spares:
    """The last batches of a kind: of a shape, read on one stream. Threads may share it."""

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

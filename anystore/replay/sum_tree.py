"""A value for each row, and their sums in a tree: what draws a row with its share of the whole.

The tree is wide, `WIDTH` values under each sum, so that it is shallow: few steps on a device where every step is a
launch, one or two cache lines a step on a CPU. Sums are added up anew from the values below them, never corrected by a
difference, so that no rounding error grows with time.

In the operations of the array API here; compiled in _sum_tree.c for what is in main memory.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from anystore.backends import Backend
from anystore.backends.base import Array

WIDTH = 16

compiled: ModuleType | None
try:
    from anystore.replay import _sum_tree as compiled
except ImportError:
    compiled = None


class SumTree:
    """A value at least 0 for each row, all zeros at first.

    Parameters
    ----------
    capacity : int
        The number of rows.
    backend : Backend
        Where the tree lives: in float64 if the library has it there, else in float32.
    """

    def __init__(self, capacity: int, backend: Backend) -> None:
        self._backend = backend
        lengths = [_padded(capacity)]
        while lengths[-1] > WIDTH:
            lengths.append(_padded(lengths[-1] // WIDTH))
        self._dtype = backend.float_dtype
        self._levels = [backend.allocate((length,), self._dtype) for length in lengths]
        self._compiled = compiled if isinstance(self._levels[0], np.ndarray) else None
        self._places = backend.as_index(np.arange(WIDTH))

    @property
    def depth(self) -> int:
        """How many levels there are, each of which takes a draw of its own."""
        return len(self._levels)

    def total(self) -> float:
        """The sum of all values; on a device, this waits for it."""
        return float(self._backend.xp.sum(self._backend.array(self._levels[-1])))

    def find(self, uniforms: Array) -> Array:
        """Rows, each drawn with a chance in proportion to its value.

        Parameters
        ----------
        uniforms : array of shape (depth, count)
            Independent draws from [0, 1). Each level has one of its own: the bits of a single float32 would not do for
            a million rows.

        Returns
        -------
        array of integers, of shape (count,)
            Rows whose value is greater than 0, as long as there is any.
        """
        if self._compiled is not None:
            return self._compiled.find(self._levels, uniforms)
        nodes = None
        for level, draws in zip(reversed(self._levels), [uniforms[step, ...] for step in range(self.depth)]):
            blocks = self._block(level, nodes, draws.shape[0])
            chosen = _choose(blocks, draws, self._backend.xp)
            nodes = chosen if nodes is None else nodes * WIDTH + chosen
        return nodes

    def get(self, rows: Array) -> Array:
        """The values of rows."""
        return self._read(self._levels[0], rows)

    def set(self, rows: Array, values: Array) -> None:
        """Give rows these values; of several for one row the last one stays."""
        index = self._backend.as_rows(rows)
        values = self._backend.xp.astype(values, self._backend.native_dtype(self._dtype), copy=False)
        self._backend.scatter([self._levels[0]], index, [values])
        if self._compiled is not None:
            self._compiled.add_up(self._levels, index)
            return
        nodes = rows
        for below, level in zip(self._levels, self._levels[1:]):
            nodes = nodes // WIDTH
            sums = self._backend.xp.sum(self._block(below, nodes, nodes.shape[0]), axis=-1)
            self._backend.scatter([level], self._backend.as_rows(nodes), [sums])

    def set_run(self, rows: range, value: float) -> None:
        """Give all rows of a run the same value, at a small part of what `set` would take for each."""
        xp = self._backend.xp
        filling = self._backend.from_numpy(np.full((), value, self._dtype))
        self._backend.scatter([self._levels[0]], rows, [filling])
        if self._compiled is not None:
            self._compiled.add_up(self._levels, np.arange(rows.start, rows.stop))
            return
        for below, level in zip(self._levels, self._levels[1:]):
            rows = range(rows.start // WIDTH, (rows.stop - 1) // WIDTH + 1)
            (block,) = self._backend.gather([below], range(rows.start * WIDTH, rows.stop * WIDTH), None)
            self._backend.scatter([level], rows, [xp.sum(xp.reshape(block, (len(rows), WIDTH)), axis=-1)])

    def _block(self, level: Any, nodes: Array | None, count: int) -> Array:
        """The `WIDTH` values under each node, or those of the top level for each draw."""
        if nodes is None:
            top = self._backend.array(level)
            return self._backend.xp.broadcast_to(top[None, :], (count, WIDTH))
        return self._read(level, nodes[:, None] * WIDTH + self._places[None, :])

    def _read(self, level: Any, rows: Array) -> Array:
        return self._backend.gather([level], self._backend.as_rows(rows), True)[0]


def _padded(length: int) -> int:
    return -(-length // WIDTH) * WIDTH


def _choose(blocks: Array, draws: Array, xp: ModuleType) -> Array:
    """For each block of values the place of one, with a chance in proportion to the value."""
    sums = xp.cumulative_sum(blocks, axis=-1)
    whole = sums[:, -1]
    targets = draws * whole
    # A product that is rounded up to the whole sum would lead past the last value that is not 0.
    targets = xp.where(targets < whole, targets, xp.zeros_like(targets))
    below = xp.astype((sums <= targets[:, None]) & (whole > 0)[:, None], xp.int32)
    return xp.sum(below, axis=-1, dtype=xp.int32)

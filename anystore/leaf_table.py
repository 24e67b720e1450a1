"""What the launches of kernels.cu are told, the leaf table and the rows; and how a batch lies in one block of memory.

A room of its own, apart from kernels.py, because it is plain NumPy: all of it is tested where there is no GPU.
"""

from __future__ import annotations

import functools
import itertools
import operator
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

THREADS = 256
"""The threads of a block."""
WIDEST_LANE = 16
"""The most bytes that a thread moves at once."""
LANES = 4
"""The lanes that a thread moves."""
ALIGNMENT = 256
"""The leaves of a batch that lie in one block of memory start at multiples of so many bytes, as what CUDA allocates."""
LAUNCH_BYTES = 4096
"""What a launch takes by value: as much as drivers before CUDA 12.1 allow."""

ENTRY = struct.Struct("<QQQQII")
"""An entry of the leaf table: buffer, batch, width, step, first block, lane. kernels.cu says what they are."""
HEADER = struct.Struct("<qQQQqqii")
"""What stands in front of the table: count, base, rows, order, start, step, leaves, inside."""
MOST_LEAVES = (LAUNCH_BYTES - HEADER.size) // ENTRY.size
"""The most leaves that one launch moves."""
_LAUNCH = np.dtype((np.void, LAUNCH_BYTES))
_KEPT = 16
"""The batch sizes whose layout is kept."""


@dataclass(slots=True)
class RowsOfLaunch:
    """Which rows of the buffers a launch moves, and which row of the batch goes with each."""

    count: int
    rows: int = 0
    """The address of the rows, int64 on the device; 0 for those inside the launch, or evenly spaced ones."""
    order: int = 0
    """The address of the rows of the batch, int64 on the device; 0 for one after the other."""
    start: int = 0
    step: int = 0
    inside: bytes = b""
    """The rows themselves, int64, where they are few enough to travel in the launch; behind them the order."""

    @classmethod
    def of(cls, rows: Any, order: NDArray[np.intp] | None = None, sent: int = 0) -> RowsOfLaunch:
        """Rows of the host: evenly spaced ones, or an array that travels in the launch or was sent ahead to `sent`."""
        if isinstance(rows, int):
            return cls(1, start=rows, step=1)
        if isinstance(rows, range):
            return cls(len(rows), start=rows.start, step=rows.step)
        if sent:
            return cls(rows.size, sent, 0 if order is None else sent + rows.nbytes)
        return cls(rows.size, inside=rows.tobytes() + (b"" if order is None else order.tobytes()))


class Launch:
    """What one launch takes by value: a header, the leaf table, and the rows if they are inside.

    Attributes
    ----------
    blocks : int
        The number of its blocks.
    leaves : int
        The number of leaves in its table.
    memory : array
        All of it; an array of size one is what CuPy passes by value (cupy #4829).
    passed : object
        What CuPy is given in its place, where kernels.py has found something that takes less time.
    """

    __slots__ = ("_batches", "_bytes", "_rows_at", "blocks", "leaves", "memory", "passed")

    def __init__(self, entries: bytes, blocks: int) -> None:
        self.blocks = blocks
        self.memory = np.zeros(1, _LAUNCH)
        self.passed: Any = None
        self._bytes = self.memory.view(np.uint8).data
        self.leaves = len(entries) // ENTRY.size
        self._batches = np.ndarray(self.leaves, np.uint64, self.memory, HEADER.size + 8, (ENTRY.size,))
        self._rows_at = HEADER.size + len(entries)
        self._bytes[HEADER.size : self._rows_at] = entries

    def place(self, batches: Sequence[int]) -> None:
        """Have the batches of its leaves elsewhere."""
        self._batches[:] = batches

    def fill(self, base: int, rows: RowsOfLaunch) -> None:
        """Have it move these rows, of a batch at this base."""
        inside, count = rows.inside, rows.count
        which = 0 if not inside else 1 if len(inside) == 8 * count else 3
        HEADER.pack_into(self._bytes, 0, count, base, rows.rows, rows.order, rows.start, rows.step, self.leaves, which)
        if inside:
            self._bytes[self._rows_at : self._rows_at + len(inside)] = inside


class LeafTable:
    """The leaf table of each launch: one, unless it is too long for one; none, if there is nothing to move.

    The launches are kept for the next call with this table. CUDA has copied what it takes by value when a launch
    returns.
    """

    def __init__(self) -> None:
        self._tables: list[tuple[bytes, int]] = []
        self._free: list[list[Launch]] = []
        """Those that nobody fills at the moment: as many as there were threads at it at once."""

    def add(self, entries: bytes, blocks: int) -> None:
        """Add a launch of so many blocks, by its entries, one after the other."""
        self._tables.append((entries, blocks))

    def take(self) -> list[Launch]:
        """Launches that are the caller's own, until they are given back."""
        try:
            return self._free.pop()  # which no other thread, and no signal handler, comes into
        except IndexError:
            return [Launch(entries, blocks) for entries, blocks in self._tables]

    def give_back(self, launches: list[Launch]) -> None:
        """Have others take them."""
        self._free.append(launches)


@dataclass(slots=True)
class Placed:
    """A leaf table of batches that lie anywhere, each at an address of its own; launches are kept as with a LeafTable.

    Only those that have bytes are in the table.
    """

    table: LeafTable
    batches: Sequence[int]

    def take(self) -> list[Launch]:
        """Launches that are the caller's own, until they are given back."""
        launches, first = self.table.take(), 0
        for launch in launches:
            launch.place(self.batches[first : first + launch.leaves])
            first += launch.leaves
        return launches

    def give_back(self, launches: list[Launch]) -> None:
        """Have others take them."""
        self.table.give_back(launches)


@dataclass(frozen=True, eq=False)
class Packed:
    """Where the leaves of a batch lie in one block of memory, and the table that moves them, with its base there."""

    nbytes: int
    offsets: tuple[int, ...]
    table: LeafTable
    elsewhere: LeafTable
    """The same for batches that are not in one block, but as well aligned; their places are yet to be written to it."""


class Record:
    """The buffers of a storage, as far as moving their rows goes.

    Parameters
    ----------
    addresses : sequence of int
        Where each buffer starts.
    widths : sequence of int
        The bytes of a row of each.
    """

    def __init__(self, addresses: Sequence[int], widths: Sequence[int]) -> None:
        self.addresses, self.widths = tuple(addresses), tuple(widths)
        self._room = LAUNCH_BYTES - HEADER.size - ENTRY.size * sum(width > 0 for width in widths)
        self._packed: dict[int, Packed] = {}

    def carries(self, rows: int) -> bool:
        """Whether so many rows and orders travel in the launch, behind the table, so that nothing is sent ahead."""
        return 8 * rows <= self._room

    def packed(self, count: int) -> Packed:
        """The layout of a batch of `count` rows in one block of memory; it is kept for the next such batch."""
        packed = self._packed.get(count)
        if packed is None:
            nbytes, offsets = pack([count * width for width in self.widths])
            packed = Packed(nbytes, offsets, *(self._table(offsets, self.widths, count) for _ in range(2)))
            if len(self._packed) >= _KEPT:
                self._packed.clear()
            self._packed[count] = packed
        return packed

    def table(self, batches: Sequence[int], steps: tuple[int, ...], count: int) -> LeafTable | Placed:
        """The leaf table for `count` rows, without the leaves that have no bytes.

        Parameters
        ----------
        batches : sequence of int
            Where the batch of each leaf starts, or how far behind the base of the launch, a multiple of ALIGNMENT.
        steps : tuple of int
            The bytes from row to row of each batch: the row's own, or 0 for a single row that goes to all.
        """
        if steps == self.widths and functools.reduce(operator.or_, batches, 0) % WIDEST_LANE == 0:
            return Placed(self.packed(count).elsewhere, tuple(itertools.compress(batches, self.widths)))
        return self._table(batches, steps, count)

    def _table(self, batches: Sequence[int], steps: Sequence[int], count: int) -> LeafTable:
        table = LeafTable()
        entries, leaves, blocks = b"", 0, 0
        for buffer, batch, width, step in zip(self.addresses, batches, self.widths, steps):
            if width == 0 or count == 0:
                continue
            lane = widest_lane(buffer | batch | width | step)
            entries += ENTRY.pack(buffer, batch, width, step, blocks, lane)
            leaves, blocks = leaves + 1, blocks + blocks_of(width // lane, count)
            if leaves == MOST_LEAVES:
                table.add(entries, blocks)
                entries, leaves, blocks = b"", 0, 0
        if leaves:
            table.add(entries, blocks)
        return table


def pack(sizes: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """The bytes of a block of memory that holds so many bytes for each leaf, and where in it each of them starts."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return end, tuple(offsets)


def launches(table: LeafTable | Placed, base: int, rows: RowsOfLaunch) -> Iterator[Launch]:
    """Each launch of a table, to be launched before the next is asked for."""
    taken = table.take()
    for launch in taken:
        launch.fill(base, rows)
        yield launch
    table.give_back(taken)


def first_of_run(rows: Any) -> int | None:
    """The first of rows that lie side by side; None for any others."""
    if isinstance(rows, int):
        return rows
    return rows.start if isinstance(rows, range) and (rows.step == 1 or len(rows) == 1) else None


def sent_ahead(record: Record, rows: Any, order: Any) -> NDArray[np.intp] | None:
    """Rows of the host that a launch has no room for, with their order behind them; None if nothing is sent ahead."""
    if not isinstance(rows, np.ndarray) or record.carries(rows.size if order is None else 2 * rows.size):
        return None
    return rows.reshape(-1) if order is None else np.concatenate([rows.reshape(-1), order])


def widest_lane(bits: int) -> int:
    """The largest power of two, up to 16 bytes, that divides all the addresses and lengths that were or-ed together."""
    bits |= WIDEST_LANE
    return bits & -bits


def blocks_of(lanes: int, count: int) -> int:
    """The blocks that move `count` rows of so many lanes, as kernels.cu shares them out."""
    if lanes >= THREADS:
        return count * -(-lanes // (THREADS * LANES))
    return -(-count // (THREADS // lanes * LANES))


def blocks_for(count: int) -> int:
    """The blocks of a kernel that has a thread for each row."""
    return -(-count // THREADS)


def slot_bits(count: int) -> int:
    """For finding the last of several writes to a row: the bits of the number of slots, at least twice that of rows."""
    return (2 * count).bit_length()

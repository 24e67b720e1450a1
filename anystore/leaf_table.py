"""What the launches of kernels.cu are told, the leaf table and the rows; and how a batch lies in one block of memory.

A room of its own, apart from kernels.py, because it is plain NumPy: all of it is tested where there is no GPU.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

THREADS = 256
"""The threads of a block."""
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
_PADDING = bytes(LAUNCH_BYTES)
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


@dataclass(slots=True)
class LeafTable:
    """The leaf table of each launch: one, unless it is too long for one; none, if there is nothing to move."""

    entries: list[bytes]
    """For each launch its entries, one after the other."""
    blocks: list[int]
    """For each launch the number of its blocks."""

    def add(self, entries: bytes, blocks: int) -> None:
        """Add a launch."""
        self.entries.append(entries)
        self.blocks.append(blocks)


@dataclass(frozen=True, eq=False)
class Packed:
    """Where the leaves of a batch lie in one block of memory, and the table that moves them, with its base there."""

    nbytes: int
    offsets: tuple[int, ...]
    table: LeafTable


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
            packed = Packed(nbytes, offsets, self.table(offsets, self.widths, count))
            if len(self._packed) >= _KEPT:
                self._packed.clear()
            self._packed[count] = packed
        return packed

    def table(self, batches: Sequence[int], steps: Sequence[int], count: int) -> LeafTable:
        """The leaf table for `count` rows, without the leaves that have no bytes.

        Parameters
        ----------
        batches : sequence of int
            Where the batch of each leaf starts, or how far behind the base of the launch, a multiple of ALIGNMENT.
        steps : sequence of int
            The bytes from row to row of each batch: the row's own, or 0 for a single row that goes to all.
        """
        table = LeafTable([], [])
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


def launches(table: LeafTable, base: int, rows: RowsOfLaunch) -> Iterator[tuple[int, NDArray[Any]]]:
    """For each launch the number of its blocks and what it takes by value.

    An array of size one is what CuPy passes by value (cupy #4829).
    """
    inside = 0 if not rows.inside else 1 if len(rows.inside) == 8 * rows.count else 3
    for entries, blocks in zip(table.entries, table.blocks):
        leaves = len(entries) // ENTRY.size
        header = HEADER.pack(rows.count, base, rows.rows, rows.order, rows.start, rows.step, leaves, inside)
        launch = header + entries + rows.inside
        yield blocks, np.frombuffer(launch + _PADDING[len(launch) :], _LAUNCH)


def first_of_run(rows: Any) -> int | None:
    """The first of rows that lie side by side; None for any others."""
    if isinstance(rows, int):
        return rows
    return rows.start if isinstance(rows, range) and (rows.step == 1 or len(rows) == 1) else None


def sent_ahead(record: Record, rows: Any, order: Any) -> NDArray[np.intp] | None:
    """Rows of the host that a launch has no room for, with their order behind them; None if nothing is sent ahead."""
    if not isinstance(rows, np.ndarray):
        return None
    flat = rows.reshape(-1) if order is None else np.concatenate([rows.reshape(-1), order])
    return None if record.carries(flat.size) else flat


def widest_lane(bits: int) -> int:
    """The largest power of two, up to 16 bytes, that divides all the addresses and lengths that were or-ed together."""
    bits |= 16
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

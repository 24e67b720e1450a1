"""The ``.npy`` files of a snapshot: their header, and their content in bounded pieces with a checksum.

A file is of the first version of NumPy's format, of the third where field names ask for it, always in C order. Its
header is the one way to write its dtype and shape down, so that a reader, who knows both, compares instead of parsing.
"""

from __future__ import annotations

import collections
import functools
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anystore.snapshot import files
from anystore.snapshot.blocks import Blocks
from anystore.snapshot.files import SnapshotError
from anystore.snapshot.threads import Task, Threads
from anystore.specs import is_extension

PIECE = 1 << 22
"""The bytes that are on the way at a time, unless a single row has more."""
ROWS = 1 << 18
"""The rows that are on the way at a time."""
THREADS = 3
"""That read and take checksums, which takes as long as reading."""
AHEAD = 6
"""The pieces that may be worked on, besides the one that is looked at."""


def stored_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in the file: that of the values, or unsigned integers of its size where NumPy alone lacks it."""
    return np.dtype(f"u{dtype.itemsize}") if is_extension(dtype) else dtype


def header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """All that stands before the values in a file of this shape and (stored) dtype; a multiple of 64 bytes."""
    descr = np.lib.format.dtype_to_descr(dtype)
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    plain = text.isascii() and len(text) < 60_000
    encoded, width = text.encode(), 2 if plain else 4
    length = -(-(8 + width + len(encoded) + 1) // 64) * 64 - 8 - width
    lead = b"\x93NUMPY" + bytes([1 if plain else 3, 0]) + length.to_bytes(width, "little")
    return lead + encoded.ljust(length - 1) + b"\n"


def as_bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    """The bytes of an array in C order, without a copy where it is in that order."""
    flat: NDArray[np.uint8] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return flat


def rows_at_a_time(row_nbytes: int) -> int:
    """How many rows of so many bytes are moved together."""
    return min(max(PIECE // max(row_nbytes, 1), 1), ROWS)


def combined(first: int, second: int, nbytes: int) -> int:
    """The CRC-32 of some bytes and `nbytes` more behind them, from that of each of the two.

    The bytes behind multiply the polynomial of the first by x to the power of their bits, modulo that of the CRC; bits
    are in reverse order, so that 0x80000000 stands for 1.
    """
    return _product(first, _power(nbytes)) ^ second


@functools.lru_cache(maxsize=64)
def _power(nbytes: int) -> int:
    """The power of x that is eight times `nbytes`."""
    result, square = 0x80000000, 0x00800000
    while nbytes:
        if nbytes & 1:
            result = _product(result, square)
        square, nbytes = _product(square, square), nbytes >> 1
    return result


def _product(one: int, other: int) -> int:
    product = 0
    while one:
        if one & 0x80000000:
            product ^= other
        one = one << 1 & 0xFFFFFFFF
        other = other >> 1 ^ (0xEDB88320 if other & 1 else 0)
    return product


class _Checksum:
    """The CRC-32 of bytes whose pieces are each worked on by a thread, so many of them at a time."""

    def __init__(self, threads: Threads, lead: bytes) -> None:
        self.value = zlib.crc32(lead)
        self._threads = threads
        self._pending: collections.deque[tuple[Task[int], int]] = collections.deque()

    def add(self, work: Callable[[], int], nbytes: int) -> None:
        """Begin with the next piece; `work` returns its CRC-32."""
        self._pending.append((self._threads.submit(work), nbytes))

    def wait(self, most: int = 0) -> None:
        """Wait until no more than so many pieces are being worked on."""
        while len(self._pending) > most:
            task, nbytes = self._pending[0]  # which `abandon` waits for, if an interrupt comes
            self.value = combined(self.value, task.result(), nbytes)
            self._pending.popleft()

    def abandon(self) -> None:
        """Wait until nothing is being worked on, whatever comes of it."""
        for task, _ in self._pending:
            task.wait()


def write_npy(
    path: Path,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    pieces: Iterable[NDArray[Any]],
    advance: Callable[[int], None],
    blocks: Blocks,
) -> int:
    """Write a new file, wait until it is on the disk, and return its CRC-32.

    Parameters
    ----------
    pieces : iterable of arrays
        What the file holds, one after the other, each of any shape and of `dtype`.
    advance : callable
        Called with the number of bytes of each piece that is on its way.
    """

    def content() -> Iterator[NDArray[np.uint8]]:
        yield np.frombuffer(header(shape, stored_dtype(dtype)), np.uint8)
        for piece in pieces:
            yield as_bytes(piece)
            advance(piece.nbytes)

    fd = files.create(path)
    try:
        checksum = blocks.write(fd, content())
        files.fsync(fd)
    finally:
        files.close(fd)
    return checksum


class NpyFile:
    """A file of a snapshot that is to be read.

    Parameters
    ----------
    path : Path
        Where it is.
    shape, dtype
        Those of the values in it, by the manifest.
    crc32 : int or None
        The checksum of the whole file; None if there is none.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], crc32: int | None) -> None:
        self.path = path
        self.shape = shape
        self.dtype = dtype
        self.crc32 = crc32
        self.count = shape[0] if shape else 1
        self.row_nbytes = math.prod(shape[1:]) * dtype.itemsize
        self.nbytes = math.prod(shape) * dtype.itemsize
        self._header = header(shape, stored_dtype(dtype))

    @property
    def offset(self) -> int:
        """Where the values begin."""
        return len(self._header)

    def check(self) -> None:
        """Check the size and the header, without reading more.

        Raises
        ------
        SnapshotError
            If one of them is not what the manifest says.
        FileNotFoundError
            If the file is not there.
        """
        fd = files.open_regular(self.path)
        try:
            self._check(fd)
        finally:
            os.close(fd)

    def _check(self, fd: int) -> None:
        found, expected = os.fstat(fd).st_size, self.offset + self.nbytes
        if found != expected:
            raise SnapshotError(f"{self.path}: expected {expected:,} bytes, found {found:,}")
        if os.pread(fd, self.offset, 0) != self._header:
            wanted = f"the header of an array of shape {self.shape} and {stored_dtype(self.dtype)}"
            raise SnapshotError(f"{self.path}: expected {wanted}, found another")

    def pieces(
        self, threads: Threads, place: Callable[[range], NDArray[Any]] | None = None
    ) -> Iterator[tuple[range, NDArray[Any]]]:
        """The rows in bounded pieces, and the values of each; a piece lives until the next.

        Parameters
        ----------
        place : callable, optional
            Gives a C-contiguous array for these rows to be read into; by default memory that is used in turns.

        Raises
        ------
        SnapshotError
            If the file is not as it was written; the checksum is known after the last piece.
        """
        fd, checksum = files.open_regular(self.path), _Checksum(threads, self._header)
        try:
            self._check(fd)
            step = rows_at_a_time(self.row_nbytes)
            place = self._in_turns(step) if place is None else place
            stop = self.count if self.nbytes else 0  # however many rows of nothing there are
            begun: collections.deque[tuple[range, NDArray[Any]]] = collections.deque()
            for start in range(0, stop, step):
                rows = range(start, min(start + step, stop))
                piece = place(rows)
                data = as_bytes(piece)
                checksum.add(functools.partial(self._fill, fd, rows, data), len(data))
                begun.append((rows, piece))
                if len(begun) > AHEAD:
                    checksum.wait(AHEAD)
                    yield begun.popleft()
            while begun:
                checksum.wait(len(begun) - 1)
                yield begun.popleft()
            self._compare(checksum.value)
        finally:
            checksum.abandon()
            os.close(fd)

    def _in_turns(self, step: int) -> Callable[[range], NDArray[Any]]:
        """Memory for pieces: one that is looked at, and those that are read meanwhile."""
        shape = (min(step, self.count), *self.shape[1:])
        scratch = [np.empty(shape, self.dtype) for _ in range(min(AHEAD + 1, -(-self.count // step)))]
        return lambda rows: scratch[rows.start // step % len(scratch)][: len(rows)]

    def read(self, rows: range) -> NDArray[Any]:
        """The values of a few rows; the checksum tells nothing of them."""
        array: NDArray[Any] = np.empty((len(rows), *self.shape[1:]), self.dtype)
        fd = files.open_regular(self.path)
        try:
            self._fill(fd, rows, as_bytes(array))
        finally:
            os.close(fd)
        return array

    def _fill(self, fd: int, rows: range, data: NDArray[np.uint8]) -> int:
        """Read rows into memory, and return the CRC-32 of their bytes."""
        view, place = data.data, self.offset + rows.start * self.row_nbytes
        while view.nbytes:
            count = os.preadv(fd, [view], place)
            if count == 0:
                raise SnapshotError(f"{self.path}: ended while it was read")
            view, place = view[count:], place + count
        return zlib.crc32(data.data)

    def _compare(self, found: int) -> None:
        if self.crc32 is not None and found != self.crc32:
            raise SnapshotError(
                f"{self.path}: expected the checksum {self.crc32:08x}, found {found:08x}: the file is damaged"
            )

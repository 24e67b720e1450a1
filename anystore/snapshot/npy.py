"""The ``.npy`` files of a snapshot: their header, and their content in bounded pieces with a checksum.

A file is of the first version of NumPy's format, of the third where field names ask for it, always in C order. Its
header is the one way to write its dtype and shape down, so that a reader, who knows both, compares instead of parsing.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anystore.snapshot import files
from anystore.snapshot.files import SnapshotError
from anystore.specs import is_extension

__all__ = ["PIECE", "ROWS", "NpyFile", "as_bytes", "header", "rows_at_a_time", "stored_dtype", "write_npy"]

PIECE = 1 << 22
"""The bytes that are on the way at a time, unless a single row has more."""
ROWS = 1 << 18
"""The rows that are on the way at a time."""
_THREAD = 1 << 16
"""The bytes from which on their checksum is worth a thread."""


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


class _Checksum:
    """The CRC-32 of bytes that follow each other, taken in a thread while they are written or the next are read."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self._threads = threads
        self._pending: Future[int] | None = None
        self._value = 0

    def add(self, data: Any) -> None:
        """Begin with more bytes, which must stay as they are until the next call."""
        value = self.value()
        if len(data) < _THREAD:
            self._value = zlib.crc32(data, value)
        else:
            self._pending = self._threads.submit(zlib.crc32, data, value)

    def value(self) -> int:
        """That of all the bytes."""
        if self._pending is not None:
            self._value = self._pending.result()
            self._pending = None
        return self._value


def write_npy(
    path: Path,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    pieces: Iterable[NDArray[Any]],
    advance: Callable[[int], None],
    threads: ThreadPoolExecutor,
) -> int:
    """Write a new file, wait until it is on the disk, and return its CRC-32.

    Parameters
    ----------
    pieces : iterable of arrays
        What the file holds, one after the other, each of any shape and of `dtype`.
    advance : callable
        Called with the number of bytes of each piece that was written.
    """
    checksum = _Checksum(threads)
    fd = files.create(path)
    try:
        lead = header(shape, stored_dtype(dtype))
        checksum.add(lead)
        files.write(fd, lead)
        for piece in pieces:
            data = as_bytes(piece)
            checksum.add(data)
            files.write(fd, data)
            value = checksum.value()  # before the memory of the piece may be used for the next
            advance(len(data))
        files.fsync(fd)
        value = checksum.value()
    finally:
        files.close(fd)
    return value


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
        self, threads: ThreadPoolExecutor, place: Callable[[range], NDArray[Any]] | None = None
    ) -> Iterator[tuple[range, NDArray[Any]]]:
        """The rows in bounded pieces, and the values of each; a piece lives until the one after the next.

        Parameters
        ----------
        place : callable, optional
            Gives a C-contiguous array for these rows to be read into; by default memory that is used in turns.

        Raises
        ------
        SnapshotError
            If the file is not as it was written; the checksum is known after the last piece.
        """
        fd = files.open_regular(self.path)
        try:
            self._check(fd)
            checksum, step = _Checksum(threads), rows_at_a_time(self.row_nbytes)
            checksum.add(self._header)
            os.lseek(fd, self.offset, os.SEEK_SET)
            scratch = self._scratch(step)
            stop = self.count if self.nbytes else 0  # however many rows of nothing there are
            for turn, start in enumerate(range(0, stop, step)):
                rows = range(start, min(start + step, stop))
                piece = scratch[turn % 2][: len(rows)] if place is None else place(rows)
                data = as_bytes(piece)
                self._fill(fd, data)
                checksum.add(data)
                yield rows, piece
            self._compare(checksum.value())
        finally:
            os.close(fd)

    def read(self, rows: range) -> NDArray[Any]:
        """The values of a few rows; the checksum tells nothing of them."""
        array: NDArray[Any] = np.empty((len(rows), *self.shape[1:]), self.dtype)
        fd = files.open_regular(self.path)
        try:
            os.lseek(fd, self.offset + rows.start * self.row_nbytes, os.SEEK_SET)
            self._fill(fd, as_bytes(array))
        finally:
            os.close(fd)
        return array

    def _scratch(self, step: int) -> list[NDArray[Any]]:
        shape = (min(step, self.count), *self.shape[1:])
        return [np.empty(shape, self.dtype) for _ in range(2)]

    def _fill(self, fd: int, data: NDArray[np.uint8]) -> None:
        view = memoryview(data)  # type: ignore[arg-type]  # which it takes
        while view.nbytes:
            count = os.readv(fd, [view])
            if count == 0:
                raise SnapshotError(f"{self.path}: ended while it was read")
            view = view[count:]

    def _compare(self, found: int) -> None:
        if self.crc32 is not None and found != self.crc32:
            raise SnapshotError(
                f"{self.path}: expected the checksum {self.crc32:08x}, found {found:08x}: the file is damaged"
            )

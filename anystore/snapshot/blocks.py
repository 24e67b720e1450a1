"""Bytes on their way to a file: gathered in blocks, which a thread writes while the next one is filled.

Blocks go past the system's cache where they can, which takes a fraction of the time (figures in `benchmarks/results`),
and leaves in memory what the system has there of other files.
"""

from __future__ import annotations

import collections
import itertools
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from anystore.backends.numpy import zeros
from anystore.snapshot import files
from anystore.snapshot.threads import Threads

BLOCK = 1 << 22
"""The bytes of a block. What goes past the cache is in whole pages, in memory and in the file."""
COUNT = 3
"""One that is filled, one that is written, and one that is written next."""


class Blocks:
    """Memory for blocks, and the thread that writes them, to one file at a time; a context manager."""

    def __init__(self) -> None:
        self._blocks = zeros((COUNT, BLOCK), np.dtype(np.uint8))  # in huge pages, which a disk reads faster
        self._thread = Threads(1)

    def __enter__(self) -> Blocks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.__exit__(kind, error, traceback)

    def write(self, fd: int, pieces: Iterable[NDArray[np.uint8]]) -> int:
        """Write bytes to a file that is empty, and return their CRC-32.

        Parameters
        ----------
        pieces : iterable of arrays
            The bytes, one piece after the other, of any length; each is done with when the next is asked for.
        """
        checksum, pending = 0, collections.deque[Future[None]]()
        try:
            for block in self._filled(pieces):
                checksum = zlib.crc32(block.data, checksum)
                pending.append(self._thread.submit(_write, fd, block))
                if len(pending) == COUNT:
                    pending.popleft().result()
            while pending:
                pending.popleft().result()
        finally:
            # Behind whatever was submitted, also what an interrupt has kept from being noted.
            self._thread.submit(int).result()
        return checksum

    def _filled(self, pieces: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
        """The bytes in blocks, of which the last may be shorter; each is filled anew after COUNT others."""
        blocks = itertools.cycle(self._blocks)
        block, filled = next(blocks), 0
        for piece in pieces:
            while len(piece):
                part, piece = piece[: BLOCK - filled], piece[BLOCK - filled :]
                block[filled : filled + len(part)] = part
                filled += len(part)
                if filled == BLOCK:
                    yield block
                    block, filled = next(blocks), 0
        if filled:
            yield block[:filled]


def _write(fd: int, block: NDArray[np.uint8]) -> None:
    if len(block) == BLOCK:
        files.pass_by_cache(fd, True)
    files.write(fd, block)

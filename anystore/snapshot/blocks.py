"""Bytes on their way to a file: gathered in blocks, which a thread writes while the next one is filled.

Blocks go past the system's cache where they can, which takes a fraction of the time (figures in `benchmarks/results`),
and leaves in memory what the system has there of other files.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import zlib
from _thread import start_new_thread
from collections.abc import Iterable, Iterator
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from anystore.backends.numpy import zeros
from anystore.snapshot import files

BLOCK = 1 << 22
"""The bytes of a block. What goes past the cache is in whole pages, in memory and in the file."""
COUNT = 3
"""One that is filled, one that is written, and one that is written next."""


class Blocks:
    """Memory for blocks, for one file at a time."""

    def __init__(self) -> None:
        self._blocks = zeros((COUNT, BLOCK), np.dtype(np.uint8))  # in huge pages, which a disk reads faster

    def write(self, fd: int, pieces: Iterable[NDArray[np.uint8]]) -> int:
        """Write bytes to a file that is empty, and return their CRC-32.

        Parameters
        ----------
        pieces : iterable of arrays
            The bytes, one piece after the other, of any length; each is done with when the next is asked for.
        """
        checksum = 0
        with _Writer(fd) as writer:
            for block in self._filled(pieces):
                checksum = zlib.crc32(block.data, checksum)
                writer.write(block)
        return checksum

    def _filled(self, pieces: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
        """The bytes in blocks, of which the last may be shorter; each of `COUNT` is filled anew in its turn."""
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


class _Writer:
    """A thread that writes blocks to a file, one after the other; a context manager, at whose end all are written.

    An interrupt may come anywhere. The thread has a descriptor of its own, so that it never writes to another file,
    whoever still waits for it; and what is waited at are queues alone, since an interrupt in the midst of a method of
    `threading` may leave its locks held. At the end of the program, when Python starts no thread any more, blocks are
    written by whoever gives them.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._given: queue.SimpleQueue[NDArray[np.uint8] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[bool | BaseException] = queue.SimpleQueue()
        self._has_thread = False
        self._pending = 0

    def __enter__(self) -> _Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._given.put(None)
        while self._has_thread and (answer := self._done.get()) is not False:
            if isinstance(answer, BaseException) and error is None:
                raise answer

    def write(self, block: NDArray[np.uint8]) -> None:
        """Write a block, in turn; all but the last COUNT - 1 are written then."""
        if not self._has_thread and len(block) == BLOCK:
            self._start()
        if not self._has_thread:
            _write(self._fd, block)
            return
        self._given.put(block)
        self._pending += 1
        if self._pending == COUNT:
            answer = self._done.get()
            self._pending -= 1
            if isinstance(answer, BaseException):
                raise answer

    def _start(self) -> None:
        fd = files.duplicate(self._fd)
        try:
            start_new_thread(_write_all, (fd, self._given, self._done))
        except RuntimeError:
            os.close(fd)
        else:
            self._has_thread = True


def _write_all(
    fd: int,
    given: queue.SimpleQueue[NDArray[np.uint8] | None],
    done: queue.SimpleQueue[bool | BaseException],
) -> None:
    """Write what is given, until None is, or an error comes; answer True for each block, or the error; then False."""
    try:
        while (block := given.get()) is not None:
            _write(fd, block)
            done.put(True)
    except BaseException as error:
        done.put(error)
    with contextlib.suppress(OSError):  # the other descriptor of the file is told of what matters
        os.close(fd)
    done.put(False)


def _write(fd: int, block: NDArray[np.uint8]) -> None:
    if len(block) == BLOCK:
        files.pass_by_cache(fd, True)
    files.write(fd, block)

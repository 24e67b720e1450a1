"""What the host sends to a GPU: packed into pinned memory that is used again and again, sent in one asynchronous copy.

A room of its own because it alone knows when pinned memory may be written to again.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import cupy
import numpy as np
from numpy.typing import NDArray

from anystore import moves
from anystore.leaf_table import Packed, pack

Specs = Sequence[tuple[tuple[int, ...], Any]]
"""The shape of a row of each leaf, and its dtype."""
_LEAST = 1 << 16
"""The bytes of a block at first."""
_KEPT = 64
"""The batches whose views of a block are kept."""


class Sent(NamedTuple):
    """Where on the device arrays are that were sent together."""

    memory: Any
    """To be held until all that reads them has been launched."""
    addresses: list[int]


class Pinned:
    """A block of pinned memory, and the event that tells when what was in it has been sent.

    Attributes
    ----------
    host : array of uint8
        The block, to be filled.
    ptr : int
        Its address.
    """

    def __init__(self, nbytes: int) -> None:
        self._memory = cupy.cuda.alloc_pinned_memory(nbytes)
        self._sent = cupy.cuda.Event(disable_timing=True)
        self._views: dict[Packed, list[NDArray[Any]]] = {}
        self.host = np.frombuffer(self._memory, np.uint8, nbytes)
        self.ptr: int = self._memory.ptr

    def take(self, leaves: Sequence[Any], packed: Packed, specs: Specs, lead: tuple[int, ...]) -> bool:
        """Fill the block with a batch that has these axes in front, if it is one that `moves.scatter` takes."""
        count = math.prod(lead)
        rows: Any = 0 if not lead else range(count) if len(lead) == 1 else np.arange(count, dtype=np.intp).reshape(lead)
        return moves.scatter(self._views_of(packed, count, specs), rows, list(leaves))

    def _views_of(self, packed: Packed, count: int, specs: Specs) -> list[NDArray[Any]]:
        """The leaves of a batch of so many rows, as arrays in the block."""
        views = self._views.get(packed)
        if views is None:
            views = [
                np.ndarray((count, *shape), dtype, self.host, offset)
                for (shape, dtype), offset in zip(specs, packed.offsets)
            ]
            if len(self._views) >= _KEPT:
                self._views.clear()
            self._views[packed] = views
        return views

    def send(self, nbytes: int) -> Any:
        """Memory from the pool of the current device, to which the first bytes of the block are on their way."""
        memory = cupy.cuda.alloc(nbytes)
        copy_async(memory.ptr, self.ptr, nbytes)
        return memory

    def close(self) -> None:
        """Note that what is on its way now is all."""
        self._sent.record()

    def wait(self) -> None:
        """Wait until all has been sent."""
        self._sent.synchronize()


class Staging:
    """Two blocks of pinned memory that take turns: one is filled while what was in the other may still be on its way.

    Notes
    -----
    Threads may share it: one fills a block at a time. A block grows to the largest batch that was sent, and is not
    given back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: list[Pinned | None] = [None, None]
        self._turn = 0

    @contextlib.contextmanager
    def block(self, nbytes: int) -> Iterator[Pinned]:
        """A block of at least so many bytes, to be filled and sent before the end of the ``with``."""
        with self._lock:
            self._turn ^= 1
            block = self._blocks[self._turn]
            if block is not None:
                block.wait()
            if block is None or len(block.host) < nbytes:
                block = self._blocks[self._turn] = Pinned(max(_LEAST, 1 << (nbytes - 1).bit_length()))
            try:
                yield block
            finally:
                block.close()

    def send(self, arrays: Sequence[NDArray[Any]]) -> Sent:
        """Send C-contiguous arrays together."""
        nbytes, offsets = pack([array.nbytes for array in arrays])
        if nbytes == 0:
            return Sent(None, [0] * len(arrays))
        with self.block(nbytes) as block:
            fill(block.host, arrays, offsets)
            memory = block.send(nbytes)
        return Sent(memory, [memory.ptr + offset for offset in offsets])


def fill(block: NDArray[np.uint8], arrays: Sequence[NDArray[Any]], offsets: Sequence[int]) -> None:
    """Copy C-contiguous arrays into a block of bytes, each to its place there."""
    for array, offset in zip(arrays, offsets):
        block[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)


def copy_async(target: int, source: int, nbytes: int) -> None:
    """Copy from address to address, whatever memory they are in, on the current stream of the current device."""
    if nbytes:
        runtime = cupy.cuda.runtime
        runtime.memcpyAsync(target, source, nbytes, runtime.memcpyDefault, cupy.cuda.get_current_stream().ptr)

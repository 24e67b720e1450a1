"""torch, on an NVIDIA GPU: the rows of all leaves are moved by one launch, which CuPy compiles and launches."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from anystore import kernels
from anystore.backends.base import Array
from anystore.backends.torch import TorchBackend
from anystore.convert import on_gpu, to_numpy
from anystore.leaf_table import Record, RowsOfLaunch, pack, sent_ahead
from anystore.moves import last_writes, leading_shape
from anystore.rows import Rows, out_of_range
from anystore.specs import as_dtype


class _Together(list[torch.Tensor]):
    """The buffers of one storage, with what every call needs to know of them."""

    def __init__(self, buffers: Sequence[torch.Tensor]) -> None:
        super().__init__(buffers)
        widths = [math.prod(buffer.shape[1:]) * buffer.itemsize for buffer in buffers]
        self.record = Record([buffer.data_ptr() for buffer in buffers], widths)
        self._storages = {buffer.untyped_storage().data_ptr() for buffer in buffers}

    def apart(self, leaf: torch.Tensor) -> torch.Tensor:
        """A leaf that can be read while the buffers are written to: contiguous, on memory that is none of theirs."""
        if leaf.untyped_storage().data_ptr() in self._storages:
            return leaf.clone(memory_format=torch.contiguous_format)
        return leaf.contiguous()


class TorchCudaBackend(TorchBackend):
    """torch tensors on an NVIDIA GPU, where CuPy is installed.

    Notes
    -----
    Everything runs on torch's current stream of the store's own device; what is owed to streams and threads is what
    the CuPy backend asks for. Memory is torch's own throughout.

    This code has run on tensors in main memory, but not on a GPU yet.
    """

    def together(self, buffers: Sequence[torch.Tensor]) -> _Together:
        return buffers if isinstance(buffers, _Together) else _Together(buffers)

    def gather(self, buffers: Sequence[torch.Tensor], rows: Rows, copy: bool | None) -> list[Array]:
        if not copy and self.views(rows):
            return super().gather(buffers, rows, copy)
        lead = leading_shape(rows)
        with self._here():
            leaves = [buffer.new_empty(lead + buffer.shape[1:]) for buffer in buffers]
            self._fill(buffers, rows, leaves)
        return leaves

    def gather_into(self, buffers: Sequence[torch.Tensor], rows: Rows, out: Sequence[Array]) -> None:
        with self._here():
            filled = [
                tensor if tensor.is_contiguous() else torch.empty_like(tensor, memory_format=torch.contiguous_format)
                for tensor in out
            ]
            self._fill(buffers, rows, filled)
            for source, tensor in zip(filled, out):
                if source is not tensor:
                    tensor.copy_(source)

    def _fill(self, buffers: Sequence[torch.Tensor], rows: Rows, leaves: Sequence[torch.Tensor]) -> None:
        """Gather the rows into contiguous tensors."""
        record = self.together(buffers).record
        table = record.table([leaf.data_ptr() for leaf in leaves], record.widths, math.prod(leading_shape(rows)))
        _held, sent = self._send(sent_ahead(record, rows, None))
        kernels.gather(table, 0, _of_launch(rows, None, *sent), self._stream())

    def scatter_as_is(self, buffers: Sequence[torch.Tensor], rows: Rows, leaves: Sequence[Any]) -> bool:
        return False

    @torch.no_grad()
    def scatter(self, buffers: Sequence[torch.Tensor], rows: Rows, leaves: Sequence[Array]) -> None:
        """Write a leaf to the rows of each buffer; those that are NumPy arrays are sent in one copy."""
        together, lead = self.together(buffers), leading_shape(rows)
        record, count = together.record, math.prod(lead)
        if count == 0:
            return
        with self._here():
            order = self._order(rows)
            here = [None if isinstance(leaf, np.ndarray) else together.apart(leaf) for leaf in leaves]
            host = [np.ascontiguousarray(leaf) for leaf in leaves if isinstance(leaf, np.ndarray)]
            _held, sent = self._send([*host, *sent_ahead(record, rows, order)])
            places = iter(sent)
            batches = [next(places) if leaf is None else leaf.data_ptr() for leaf in here]
            steps = [
                width if leaf.ndim == len(lead) + buffer.ndim - 1 else 0
                for leaf, buffer, width in zip(leaves, buffers, record.widths)
            ]
            table = record.table(batches, steps, count)
            kernels.scatter(table, 0, _of_launch(rows, order, *places), self._stream())

    def check_rows(self, index: Any, capacity: int) -> Rows | None:
        if index.ndim == 0 or not (on_gpu(index) or self.writable(index)):
            return None
        with self._here():
            index = self._own(index)
            dtype = as_dtype(index.dtype)
            if index.dtype == torch.bool and index.shape == (capacity,):
                rows: Rows = index.nonzero().reshape(-1)
                return rows
            if dtype.kind not in "iu" or index.numel() == 0:
                return None
            return self._check(index.contiguous(), dtype, capacity)

    def _check(self, index: torch.Tensor, dtype: np.dtype[Any], capacity: int) -> Rows:
        rows: Any = torch.empty(index.shape, dtype=torch.int64, device=self._device)
        outside = torch.zeros(2, dtype=torch.int64, device=self._device)
        places = rows.data_ptr(), outside.data_ptr()
        kernels.check(index.data_ptr(), dtype, index.numel(), capacity, *places, self._stream())
        past, before = (number % 2**64 for number in outside.tolist())  # the one synchronisation
        if past or before:
            raise out_of_range(past or -before, capacity)
        checked: Rows = rows
        return checked

    def to_host(self, array: torch.Tensor) -> NDArray[Any]:
        """Through pinned memory, from torch's pool of it."""
        pinned = torch.empty(array.shape, dtype=array.dtype, pin_memory=self._device.type == "cuda")
        return to_numpy(pinned.copy_(array))

    def as_rows(self, array: torch.Tensor) -> Any:
        return array.to(torch.int64).contiguous()

    def _order(self, rows: Rows) -> Any:
        """For each row the last of its values, where the rows are; None where each is there once."""
        if isinstance(rows, np.ndarray):
            return last_writes(rows)
        if isinstance(rows, (int, range)) or rows.numel() < 2:
            return None
        count = rows.numel()
        slots = torch.full((kernels.slots_nbytes(count),), 0xFF, dtype=torch.uint8, device=self._device)
        order = torch.empty(count, dtype=torch.int64, device=self._device)
        kernels.note_last_writes(rows.data_ptr(), count, slots.data_ptr(), order.data_ptr(), self._stream())
        return order

    def _send(self, arrays: Sequence[NDArray[Any]]) -> tuple[torch.Tensor | None, list[int]]:
        """C-contiguous arrays, sent in one copy: the memory to hold until the launch, and where each of them is."""
        nbytes, offsets = pack([array.nbytes for array in arrays])
        if nbytes == 0:
            return None, [0] * len(arrays)
        # torch does not give pinned memory to anybody else before what was sent from it has arrived.
        pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        host = pinned.numpy()
        for array, offset in zip(arrays, offsets):
            host[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
        block = pinned.to(self._device, non_blocking=True)
        return block, [block.data_ptr() + offset for offset in offsets]

    def bring(self, value: Array, dtype: np.dtype[Any]) -> Array:
        if on_gpu(value):
            return self.move(self._own(value), self.native_dtype(dtype))
        return to_numpy(value).astype(dtype, copy=False)

    def _own(self, array: Any) -> torch.Tensor:
        """An array on a GPU, of whatever library, as a tensor on this device."""
        tensor = array if isinstance(array, torch.Tensor) else torch.from_dlpack(array)  # type: ignore[attr-defined]
        return tensor.detach().resolve_conj().resolve_neg().to(self._device)

    @contextlib.contextmanager
    def _here(self) -> Iterator[None]:
        """In which torch's current device and CuPy's are that of the storage."""
        with torch.cuda.device(self._device), kernels.on_device(self._device.index):
            yield

    def _stream(self) -> kernels.Stream:
        return kernels.Stream(torch.cuda.current_stream(self._device).cuda_stream)


def _of_launch(rows: Any, order: Any, sent: int = 0) -> RowsOfLaunch:
    """What a launch is told of the rows; `sent` is the address of those that were sent ahead."""
    if isinstance(rows, torch.Tensor):
        return RowsOfLaunch(rows.numel(), rows.data_ptr(), 0 if order is None else order.data_ptr())
    return RowsOfLaunch.of(rows, order, sent)

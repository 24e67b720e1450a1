"""torch, on an NVIDIA GPU: the rows of all leaves are moved by one launch, which CuPy compiles and launches."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from anystore import kernels
from anystore.backends.base import Array
from anystore.backends.cuda import Borrowed, Buffers, CudaBackend
from anystore.backends.torch import TorchBackend, is_its_memory
from anystore.convert import on_gpu, to_numpy
from anystore.leaf_table import pack
from anystore.moves import leading_shape
from anystore.rows import Rows
from anystore.staging import Sent, fill

_ALREADY_HERE = contextlib.nullcontext()


def _stream_by_its_object(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


# Undocumented, but a twentieth of the time: what torch's own compiled programs ask before each launch.
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
_stream_of: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", _stream_by_its_object)


class TorchCudaBackend(CudaBackend, TorchBackend):
    """torch tensors on an NVIDIA GPU, where CuPy is installed.

    Notes
    -----
    Everything runs on torch's current stream of the store's own device; what is owed to streams and threads is what
    the CuPy backend asks for. Memory is torch's own throughout.

    This code has run on tensors in main memory, but not on a GPU yet.
    """

    _address = operator.methodcaller("data_ptr")

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self._borrowed = Borrowed()

    def here(self) -> AbstractContextManager[object]:
        number = self._device.index
        if _current_device() == number == kernels.current_device():  # which is asked faster than it is set
            return _ALREADY_HERE
        return self._switched()

    @contextlib.contextmanager
    def _switched(self) -> Iterator[None]:
        with torch.cuda.device(self._device), kernels.on_device(self._device.index):
            yield

    def _stream(self) -> kernels.Stream:
        return kernels.Stream(_stream_of(self._device.index))

    def _launched(self) -> Callable[[], bool]:
        event: Any = torch.cuda.current_stream(self._device).record_event()
        return event.query  # type: ignore[no-any-return]

    def _is_contiguous(self, array: torch.Tensor) -> bool:
        return is_its_memory(array)

    def _is_plain(self, leaf: Any, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        if type(leaf) is not torch.Tensor or leaf.dtype is not dtype or leaf.shape != shape:
            return False
        return leaf.device == self._device and leaf.layout is torch.strided and is_its_memory(leaf)

    def _copy(self, array: torch.Tensor) -> torch.Tensor:
        return array.clone(memory_format=torch.contiguous_format)

    def _on_this_device(self, array: Any) -> torch.Tensor:
        if not isinstance(array, torch.Tensor):
            self._borrowed.note(array)
            array = torch.from_dlpack(array)  # type: ignore[attr-defined]
        tensor: torch.Tensor = array
        return tensor.detach().resolve_conj().resolve_neg().to(self._device)

    def _send(self, arrays: Sequence[NDArray[Any]]) -> Sent:
        nbytes, offsets = pack([array.nbytes for array in arrays])
        if nbytes == 0:
            return Sent(None, [0] * len(arrays))
        # torch does not give pinned memory to anybody else before what was sent from it has arrived.
        pinned = self._pinned(nbytes, torch.uint8)
        fill(pinned.numpy(), arrays, offsets)
        block = pinned.to(self._device, non_blocking=True)
        return Sent(block, [block.data_ptr() + offset for offset in offsets])

    def gather(self, buffers: Sequence[torch.Tensor], rows: Rows, copy: bool | None) -> list[Array]:
        if not copy and self.views(rows):
            return super().gather(buffers, rows, copy)
        buffers, lead = self.together(buffers), leading_shape(rows)
        models = buffers.lately(lead, lambda: self._models(buffers, lead))
        with self.here():
            leaves: list[Array] = [torch.empty_like(model, memory_format=torch.contiguous_format) for model in models]
            self._fill(buffers.record, rows, leaves)
        return leaves

    def _models(self, buffers: Buffers, lead: tuple[int, ...]) -> list[torch.Tensor]:
        """What the leaves of a batch are made like, in half the time that torch needs to make them by dtype and shape.

        They are no views of one block: whoever writes to one leaf would, to autograd, have written to all of them.
        """
        return [buffer[0].expand(lead + shape) for buffer, (shape, _) in zip(buffers, buffers.specs)]

    def gather_into(self, buffers: Sequence[torch.Tensor], rows: Rows, out: Sequence[Array]) -> None:
        super().gather_into(buffers, rows, out)
        torch.autograd.graph.increment_version(list(out))

    def bring(self, value: Array, dtype: np.dtype[Any]) -> Array:
        if on_gpu(value):
            return self.move(self._on_this_device(value), self.native_dtype(dtype))
        return to_numpy(value).astype(dtype, copy=False)

    def to_host(self, buffer: torch.Tensor, rows: Rows) -> NDArray[Any]:
        """Through pinned memory, from torch's pool of it."""
        (array,) = self.gather([buffer], rows, None)
        return to_numpy(self._pinned(array.shape, array.dtype).copy_(array))

    def _pinned(self, shape: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=self._device.type == "cuda")

    def flatnonzero(self, mask: torch.Tensor) -> torch.Tensor:
        return mask.nonzero().reshape(-1)

    def as_rows(self, array: torch.Tensor) -> Any:
        return array.to(torch.int64).contiguous()

"""torch, on the CPU, a GPU or whatever it supports."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import array_api_compat.torch
import numpy as np
import torch
from numpy.typing import NDArray

from anystore import moves
from anystore.backends.base import Array, Backend, host_memory, no_dtype, parse_device, resolve_device, spell_device
from anystore.backends.numpy import zeros
from anystore.backends.random import Random, seed_sequence
from anystore.convert import to_numpy
from anystore.moves import basic_index, last_writes
from anystore.rows import Rows
from anystore.specs import is_extension

_READ_BY_NUMPY = {
    torch.bool,
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128),
}
_READ_BY_TORCH = {np.dtype(str(dtype).removeprefix("torch.")) for dtype in _READ_BY_NUMPY}
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class TorchBackend(Backend):
    """torch tensors; buffers never require gradients.

    Notes
    -----
    A write goes past autograd: that a live view or a buffer which a graph has kept is another now is not seen there.

    On a GPU everything runs on torch's current stream.
    """

    name = library = "torch"

    @classmethod
    def open(cls, device: Any = None) -> TorchBackend:
        device = resolve_device(str(torch.get_default_device() if device is None else device), cls.devices(), "torch")
        if device == "cpu":
            return TorchHostBackend(device)
        if torch.version.cuda:
            with contextlib.suppress(ImportError):  # of CuPy
                return importlib.import_module("anystore.backends.torch_cuda").TorchCudaBackend(device)  # type: ignore[no-any-return]
        return TorchBackend(device)

    def __init__(self, device: str) -> None:
        self.device = device
        self._device = torch.device(device)

    @property
    def xp(self) -> ModuleType:
        return array_api_compat.torch

    @classmethod
    def devices(cls) -> list[str]:
        found = ["cpu"]
        if torch.accelerator.is_available():
            kind = torch.accelerator.current_accelerator().type  # type: ignore[union-attr]
            found += [spell_device(kind, number) for number in range(torch.accelerator.device_count())]
        return found

    def native_dtype(self, dtype: np.dtype[Any]) -> torch.dtype:
        native = getattr(torch, dtype.name, None) if dtype.isnative else None
        if not isinstance(native, torch.dtype):
            raise no_dtype("torch", dtype)
        if self._device.type == "mps" and native in (torch.float64, torch.complex128):
            raise no_dtype("torch on mps", dtype)
        return native

    @torch.inference_mode(False)  # or nothing could be written later, outside of that mode
    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> torch.Tensor:
        buffer = torch.zeros(shape, dtype=self.native_dtype(dtype), device=self._device)
        if self._device.type == "cuda":  # for whichever stream comes to it first
            torch.cuda.current_stream(self._device).synchronize()
        return buffer

    def gather(self, buffers: Sequence[torch.Tensor], rows: Rows, copy: bool | None) -> list[Array]:
        if self.views(rows):
            views = _views(buffers, rows)
            return [view.clone() for view in views] if copy else views
        flat, shape = self._index(rows)
        return [_selected(buffer, flat).view(shape + buffer.shape[1:]) for buffer in buffers]

    def gather_into(self, buffers: Sequence[torch.Tensor], rows: Rows, out: Sequence[Array]) -> None:
        if self.views(rows):
            for view, tensor in zip(_views(buffers, rows), out):
                tensor.copy_(view)
            return
        index, shape = self._index(rows)
        for buffer, tensor in zip(buffers, out):
            if is_its_memory(tensor):
                flat = _bits(tensor.view((math.prod(shape), *buffer.shape[1:])))
                torch.index_select(_bits(buffer), 0, index, out=flat)
            else:
                tensor.copy_(_selected(buffer, index).view(tensor.shape))

    @torch.no_grad()
    def scatter(self, buffers: Sequence[torch.Tensor], rows: Rows, leaves: Sequence[Array]) -> None:
        own = {buffer.untyped_storage().data_ptr() for buffer in buffers}
        leaves = [leaf.clone() if leaf.untyped_storage().data_ptr() in own else leaf for leaf in leaves]
        if self.views(rows):
            for view, leaf in zip(_views(buffers, rows), leaves):
                view.copy_(leaf)
            return
        index, shape = self._index(rows)
        last = last_writes(np.asarray(rows, np.intp))
        newest = None if last is None else torch.from_numpy(last).to(self._device)
        ready = []  # all of them before one is written, for memory may run out
        for buffer, leaf in zip(buffers, leaves):
            if leaf.ndim < buffer.ndim - 1 + len(shape):
                leaf = leaf.expand((len(index), *buffer.shape[1:]))
            else:
                leaf = leaf.reshape((len(index), *buffer.shape[1:]))
                if newest is not None:
                    leaf = _bits(leaf).index_select(0, newest)
            ready.append(_bits(leaf.contiguous()))
        for buffer, leaf in zip(buffers, ready):
            if leaf.numel():
                _bits(buffer).index_copy_(0, index, leaf)

    def from_numpy(self, array: NDArray[Any]) -> torch.Tensor:
        if not (_is_plain(array) and array.dtype.isnative):
            array = array.astype(array.dtype.newbyteorder("="), order="C")
        dtype = self.native_dtype(array.dtype)
        if is_extension(array.dtype):  # which torch.from_numpy does not know (pytorch #101781)
            array = array.view(f"i{array.dtype.itemsize}")
            return torch.from_numpy(array).to(self._device).view(dtype)
        return torch.from_numpy(array).to(self._device)

    def array(self, buffer: torch.Tensor) -> torch.Tensor:
        # A tensor of its own, since users may have one require gradients.
        return buffer.detach()

    def move(self, array: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if array.layout is not torch.strided:
            raise TypeError(f"expected a dense tensor, found one of layout {array.layout}; to_dense() makes one")
        # What is conjugated or negated lazily is so in no memory that the moves would read.
        return array.detach().resolve_conj().resolve_neg().to(self._device, dtype)

    def random(self, seed: int | None = None) -> Random:
        return TorchRandom(self._device, self.native_dtype(self.float_dtype), seed)

    def views(self, rows: Rows) -> bool:
        # torch has no negative strides.
        return type(rows) is int or (type(rows) is range and rows.step > 0)

    def writable(self, array: Any) -> bool:
        if not isinstance(array, torch.Tensor) or array.layout is not torch.strided:
            return False
        if array.is_inference() and not torch.is_inference_mode_enabled():
            return False
        if array.device != self._device or array.requires_grad:
            return False
        strides = array.stride()  # with which numbers of an expanded tensor are one in memory
        return 0 not in strides or 0 in array.shape or all(step or size < 2 for step, size in zip(strides, array.shape))

    def here(self) -> AbstractContextManager[object]:
        if self._device.type != "cuda":
            return super().here()
        device: Any = torch.cuda.device(self._device)
        return device  # type: ignore[no-any-return]

    def stream(self) -> AbstractContextManager[object]:
        if self._device.type != "cuda":
            return super().stream()
        stream: Any = torch.cuda.stream(torch.cuda.current_stream(self._device))
        return stream  # type: ignore[no-any-return]

    def free_memory(self) -> int | None:
        kind, _ = parse_device(self.device)
        if kind == "cuda":
            return torch.cuda.mem_get_info(self._device)[0]
        return host_memory() if kind == "cpu" else None

    def _index(self, rows: Rows) -> tuple[torch.Tensor, tuple[int, ...]]:
        """The rows as a flat tensor on the device, and the shape that they had."""
        array = np.asarray(rows, np.intp)
        return torch.from_numpy(array.reshape(-1)).to(self._device), array.shape


def is_its_memory(tensor: torch.Tensor) -> bool:
    """Whether the memory of a tensor holds its very numbers, in C order and with nothing in between."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers: indexing knows neither the wider unsigned ones nor float8."""
    return tensor.view(_BITS.get(tensor.itemsize, tensor.dtype))


def _selected(buffer: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The rows of a buffer at a flat index, of whatever dtype."""
    return _bits(buffer).index_select(0, index).view(buffer.dtype)


def _is_plain(array: NDArray[Any]) -> bool:
    """Whether torch takes the memory as it is; an axis of one may have a negative stride, which it refuses."""
    return array.flags.carray and min(array.strides, default=0) >= 0


class TorchRandom(Random):
    """A torch.Generator on a device."""

    def __init__(self, device: torch.device, float_dtype: torch.dtype, seed: int | None) -> None:
        self.kind = f"torch on {device.type}"
        self._device = device
        self._float_dtype = float_dtype
        self._generator = torch.Generator(device)
        self._generator.manual_seed(int(seed_sequence(seed).generate_state(1, np.uint64)[0]))

    def _integers(self, high: int, count: int) -> torch.Tensor:
        return torch.randint(high, (count,), generator=self._generator, dtype=torch.int64, device=self._device)

    def _uniform(self, count: int) -> torch.Tensor:
        return torch.rand(count, generator=self._generator, dtype=self._float_dtype, device=self._device)

    def _permutation(self, high: int) -> torch.Tensor:
        return torch.randperm(high, generator=self._generator, dtype=torch.int64, device=self._device)

    def _state(self) -> dict[str, Any]:
        return {"state": bytes(self._generator.get_state().tolist()).hex()}

    def _restore(self, state: dict[str, Any]) -> None:
        self._generator.set_state(torch.tensor(list(bytes.fromhex(state["state"])), dtype=torch.uint8, device="cpu"))


class TorchHostBackend(TorchBackend):
    """torch tensors in main memory, whose rows are moved as those of NumPy arrays on the same memory.

    torch would take its time for each leaf, several times that of the compiled moves for all of them.
    """

    here, stream = Backend.here, Backend.stream  # there is none but the one

    @property
    def books_elsewhere(self) -> bool:
        return True

    def from_numpy(self, array: NDArray[Any]) -> torch.Tensor:
        if array.dtype in _READ_BY_TORCH and _is_plain(array):
            return torch.from_numpy(array)
        return super().from_numpy(array)

    def to_bookkeeping(self, array: torch.Tensor) -> NDArray[Any]:
        return array.numpy() if array.dtype in _READ_BY_NUMPY else to_numpy(array)

    @torch.inference_mode(False)
    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> torch.Tensor:
        # torch.zeros writes to every page.
        return _as_tensor(zeros(shape, dtype), self.native_dtype(dtype))

    def together(self, buffers: list[torch.Tensor]) -> list[torch.Tensor]:
        return _HostTensors(buffers)

    def gather(self, buffers: Sequence[torch.Tensor], rows: Rows, copy: bool | None) -> list[Array]:
        if not copy and self.views(rows):
            return _views(buffers, rows)
        leaves = moves.gather(_arrays(buffers), rows)
        return [_as_tensor(leaf, buffer.dtype) for leaf, buffer in zip(leaves, buffers)]

    def gather_into(self, buffers: Sequence[torch.Tensor], rows: Rows, out: Sequence[Array]) -> None:
        if all(map(is_its_memory, out)):
            moves.gather_into(_arrays(buffers), rows, [_as_array(tensor) for tensor in out])
            torch.autograd.graph.increment_version(list(out))  # so that autograd, if it kept one, sees the change
            return
        for tensor, leaf in zip(out, self.gather(buffers, rows, copy=True)):
            tensor.copy_(leaf)

    def scatter(self, buffers: Sequence[torch.Tensor], rows: Rows, leaves: Sequence[Array]) -> None:
        written = moves.scatter(_arrays(buffers), rows, [_as_array(leaf) for leaf in leaves])
        assert written, "the leaves were checked against their specs"

    def scatter_as_is(self, buffers: Sequence[torch.Tensor], rows: Rows, leaves: Sequence[Any]) -> bool:
        arrays = []
        for leaf, buffer in zip(leaves, buffers):
            if type(leaf) is torch.Tensor:
                if leaf.dtype is not buffer.dtype:
                    return False
                try:
                    leaf = _as_array(leaf)
                except (RuntimeError, TypeError):  # which another path takes, or refuses
                    return False
            elif buffer.dtype not in _READ_BY_NUMPY:
                return False
            arrays.append(leaf)
        return moves.scatter(_arrays(buffers), rows, arrays)


def _views(buffers: Sequence[torch.Tensor], rows: Any) -> list[torch.Tensor]:
    # torch gives an array of a single number as it is, and takes longer where an Ellipsis asks for it.
    index = rows if type(rows) is int else basic_index(rows)
    return [buffer[index] for buffer in buffers]


class _HostTensors(list[torch.Tensor]):
    """The buffers of a storage, and NumPy arrays on their memory."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__(tensors)
        self._found = self._find()

    def _find(self) -> tuple[list[int], list[NDArray[Any]]]:
        return [tensor.data_ptr() for tensor in self], [_as_array(tensor) for tensor in self]

    def arrays(self) -> list[NDArray[Any]]:
        addresses, arrays = self._found
        # torch moves the memory of a tensor and of all its views when one of them is sent to another process.
        if [tensor.data_ptr() for tensor in self] != addresses:
            self._found = self._find()
            _, arrays = self._found
        return arrays


def _arrays(buffers: Sequence[torch.Tensor]) -> list[NDArray[Any]]:
    return buffers.arrays() if type(buffers) is _HostTensors else [_as_array(buffer) for buffer in buffers]


def _as_array(tensor: torch.Tensor) -> NDArray[Any]:
    """A NumPy array on the memory of the tensor: of its dtype, or of integers if NumPy lacks that.

    Raises
    ------
    RuntimeError, TypeError
        If the tensor is lazily negated or conjugated, sparse, on another device, or requires gradients.
    """
    array: NDArray[Any] = (tensor if tensor.dtype in _READ_BY_NUMPY else tensor.view(_BITS[tensor.itemsize])).numpy()
    return array


def _as_tensor(array: NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of this dtype on the memory of the array, which has the dtype or integers in its place."""
    if dtype in _READ_BY_NUMPY:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(f"i{array.itemsize}")).view(dtype)

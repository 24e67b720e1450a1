"""CuPy, on an NVIDIA GPU: the rows of all leaves are moved by one launch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import array_api_compat.cupy
import cupy
import numpy as np
from numpy.typing import NDArray

from anystore import kernels, moves
from anystore.backends.base import Array, Backend, no_dtype, parse_device, resolve_device
from anystore.backends.random import Random, seed_sequence
from anystore.convert import library_of, on_gpu, to_numpy
from anystore.leaf_table import LeafTable, Record, RowsOfLaunch, first_of_run, sent_ahead
from anystore.moves import basic_index, last_writes, leading_shape
from anystore.rows import Rows, out_of_range
from anystore.specs import as_dtype, is_extension
from anystore.staging import Staging, copy_async

_COPIES = 8
"""Up to so many leaves, rows that lie side by side are written by a plain copy of each; more leaves by one launch.

Chosen, not measured: benchmarks/gpu.py measures where one overtakes the other.
"""
_STAGED = 1 << 28
"""The most bytes that are packed into pinned memory at once."""
_DRAWS = 256
"""After so many draws a generator starts anew, so that it takes no longer than these to restore one."""
_NUMBERS = (bool, int, float, np.generic)


class _Together(list[Array]):
    """The buffers of one storage, with what every call needs to know of them."""

    def __init__(self, buffers: Sequence[Array]) -> None:
        super().__init__(buffers)
        self.specs = [(buffer.shape[1:], buffer.dtype) for buffer in buffers]
        widths = [math.prod(shape) * dtype.itemsize for shape, dtype in self.specs]
        self.record = Record([buffer.data.ptr for buffer in buffers], widths)
        self._spans = [(buffer.data.ptr, buffer.data.ptr + buffer.nbytes) for buffer in buffers]

    def overlaps(self, leaf: Array) -> bool:
        """Whether a C-contiguous leaf shares memory with a buffer."""
        start, end = leaf.data.ptr, leaf.data.ptr + leaf.nbytes
        return any(start < last and first < end for first, last in self._spans)


class CupyBackend(Backend):
    """CuPy arrays on one GPU.

    Notes
    -----
    Everything runs on CuPy's current stream of the store's own device, whatever device is the current one, and `get`
    and `set` return before it is done. They wait for one thing only: rows that live on a GPU are checked there, which
    takes a synchronisation.

    The leaves that `get` returns lie in one allocation, which is given back when the last of them is gone.

    Host values have been copied when `set` returns. Values on a GPU are read in place, later: whoever changes one on
    another stream than that on which it was stored lets that stream wait for the other first. The same is owed by
    those who use one storage on several streams, from one thread or several: each stream waits for the last that
    wrote. What comes from another device, or by DLPack, is ordered by events here.

    This code has run on a stand-in for CuPy and the kernels on a CPU, but nothing of it on a GPU yet.
    """

    name = library = "cupy"

    def __init__(self, device: Any = None) -> None:
        devices = self.devices()
        if not devices:
            raise ValueError("no CUDA device can be used here; CuPy runs on NVIDIA GPUs only")
        if device is None:
            device = cupy.cuda.Device()
        if isinstance(device, cupy.cuda.Device):
            device = f"cuda:{device.id}"
        self.device = resolve_device(str(device), devices, "CuPy")
        # array-api-compat lets CuPy's creation functions ignore device= (array-api-compat #337).
        self._device = cupy.cuda.Device(parse_device(self.device)[1])
        self._staging = Staging()

    @property
    def xp(self) -> ModuleType:
        return array_api_compat.cupy

    @classmethod
    def devices(cls) -> list[str]:
        if not cupy.cuda.is_available():
            return []
        return [f"cuda:{number}" for number in range(cupy.cuda.runtime.getDeviceCount())]

    def native_dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        known = dtype.name == "bfloat16" if is_extension(dtype) else dtype.kind in "biufc" and dtype.itemsize <= 16
        if not known or not dtype.isnative:
            raise no_dtype("CuPy", dtype)
        return dtype

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        with self._device:
            return cupy.zeros(shape, dtype)

    def together(self, buffers: Sequence[Array]) -> _Together:
        return buffers if isinstance(buffers, _Together) else _Together(buffers)

    def gather(self, buffers: Sequence[Array], rows: Rows, copy: bool | None) -> list[Array]:
        if not copy and isinstance(rows, (int, range)):
            index = basic_index(rows)
            return [buffer[index] for buffer in buffers]
        together, lead = self.together(buffers), leading_shape(rows)
        packed = together.record.packed(math.prod(lead))
        with self._device:
            memory = cupy.cuda.alloc(max(packed.nbytes, 1))
            self._gather(together.record, packed.table, memory.ptr, rows)
            return [
                cupy.ndarray(lead + shape, dtype, memory + offset)
                for (shape, dtype), offset in zip(together.specs, packed.offsets)
            ]

    def gather_into(self, buffers: Sequence[Array], rows: Rows, out: Sequence[Array]) -> None:
        record, count = self.together(buffers).record, math.prod(leading_shape(rows))
        with self._device:
            filled = [array if array.flags.c_contiguous else cupy.empty(array.shape, array.dtype) for array in out]
            table = record.table([array.data.ptr for array in filled], record.widths, count)
            self._gather(record, table, 0, rows)
            for source, array in zip(filled, out):
                if source is not array:
                    array[...] = source

    def _gather(self, record: Record, table: LeafTable, base: int, rows: Rows) -> None:
        sent = self._staging.send(sent_ahead(record, rows, None))
        kernels.gather(table, base, _of_launch(rows, None, *sent.addresses))

    def check_rows(self, index: Any, capacity: int) -> Rows | None:
        if index.ndim == 0 or not (isinstance(index, cupy.ndarray) or on_gpu(index)):
            return None
        with self._device:
            index = self._own(index)
            if index.dtype == np.bool_ and index.shape == (capacity,):
                rows: Rows = cupy.flatnonzero(index).astype(np.int64, copy=False)
                return rows
            if index.dtype.kind not in "iu" or index.size == 0:
                return None
            return self._check(cupy.ascontiguousarray(index), capacity)

    def _check(self, index: Array, capacity: int) -> Rows:
        rows, outside = cupy.empty(index.shape, np.int64), cupy.zeros(2, np.uint64)
        kernels.check(index.data.ptr, index.dtype, index.size, capacity, rows.data.ptr, outside.data.ptr)
        past, before = outside.get().tolist()  # the one synchronisation
        if past or before:
            raise out_of_range(past or -before, capacity)
        checked: Rows = rows
        return checked

    def scatter_as_is(self, buffers: Sequence[Array], rows: Rows, leaves: Sequence[Any]) -> bool:
        """Write a whole batch that is on the host: checked and packed in one go, sent in one copy."""
        together, lead = self.together(buffers), leading_shape(rows)
        record, count = together.record, math.prod(lead)
        packed = record.packed(count)
        if packed.nbytes > _STAGED or not all(
            _is_batch(leaf, spec, lead) for leaf, spec in zip(leaves, together.specs)
        ):
            return False
        with self._device:
            order = self._order(rows)
            ahead = sent_ahead(record, rows, order)
            nbytes = packed.nbytes + sum(array.nbytes for array in ahead)
            with self._staging.block(nbytes) as block:
                if not moves.scatter(block.views(packed, count, together.specs), _places(lead), list(leaves)):
                    return False
                if packed.nbytes == 0:
                    return True
                first = first_of_run(rows)
                if first is not None and len(leaves) <= _COPIES:
                    for address, width, offset in zip(record.addresses, record.widths, packed.offsets):
                        block.send_to(address + first * width, offset, count * width)
                    return True
                for array in ahead:
                    block.host[packed.nbytes : nbytes] = array.view(np.uint8)
                memory = block.send(nbytes)
            kernels.scatter(
                packed.table, memory.ptr, _of_launch(rows, order, *(memory.ptr + packed.nbytes for _ in ahead))
            )
        return True

    def scatter(self, buffers: Sequence[Array], rows: Rows, leaves: Sequence[Array]) -> None:
        """Write a leaf to the rows of each buffer; those that are NumPy arrays are sent in one copy."""
        together, lead = self.together(buffers), leading_shape(rows)
        record, count = together.record, math.prod(lead)
        if count == 0:
            return
        with self._device:
            order = self._order(rows)
            here = [None if isinstance(leaf, np.ndarray) else self._apart(leaf, together) for leaf in leaves]
            host = [np.ascontiguousarray(leaf) for leaf in leaves if isinstance(leaf, np.ndarray)]
            sent = self._staging.send([*host, *sent_ahead(record, rows, order)])
            places = iter(sent.addresses)
            batches = [next(places) if leaf is None else leaf.data.ptr for leaf in here]
            full = [leaf.ndim == len(lead) + len(shape) for leaf, (shape, _) in zip(leaves, together.specs)]
            first = first_of_run(rows)
            if first is not None and len(leaves) <= _COPIES and (count == 1 or all(full)):
                for address, width, batch in zip(record.addresses, record.widths, batches):
                    copy_async(address + first * width, batch, count * width)
                return
            steps = [width if whole else 0 for width, whole in zip(record.widths, full)]
            kernels.scatter(record.table(batches, steps, count), 0, _of_launch(rows, order, *places))

    def _apart(self, leaf: Array, together: _Together) -> Array:
        """A leaf that can be read while the buffers are written to."""
        leaf = cupy.ascontiguousarray(leaf)
        return leaf.copy() if together.overlaps(leaf) else leaf

    def _order(self, rows: Rows) -> Array | None:
        """For each row the last of its values, where the rows are; None where each is there once."""
        if isinstance(rows, np.ndarray):
            return last_writes(rows)
        if isinstance(rows, (int, range)) or rows.size < 2:
            return None
        slots, order = cupy.cuda.alloc(kernels.slots_nbytes(rows.size)), cupy.empty(rows.size, np.int64)
        slots.memset_async(0xFF, kernels.slots_nbytes(rows.size))
        kernels.note_last_writes(rows.data.ptr, rows.size, slots.ptr, order.data.ptr)
        return order

    def bring(self, value: Array, dtype: np.dtype[Any]) -> Array:
        if isinstance(value, cupy.ndarray) or on_gpu(value):
            return self.move(value, dtype)
        array = to_numpy(value).astype(dtype, copy=False)
        return array if array.nbytes <= _STAGED else self.from_numpy(array)

    def from_numpy(self, array: NDArray[Any]) -> Array:
        with self._device:
            return cupy.asarray(array)

    def move(self, array: Array, dtype: np.dtype[Any]) -> Array:
        with self._device:
            return self._own(array).astype(dtype, copy=False)

    def _own(self, array: Any) -> Array:
        """An array on a GPU, of whatever library, as one of CuPy on this device; it is the current one."""
        if not isinstance(array, cupy.ndarray):
            array = _taken_over(array)
        if array.device == self._device:
            return array
        here, there = cupy.cuda.get_current_stream(), array.device
        with there:
            array = array if array.flags.c_contiguous else cupy.ascontiguousarray(array)
            here.wait_event(cupy.cuda.get_current_stream().record())
        copy = array.copy()  # made on the current device, whatever that of the array
        copied = here.record()
        with there:  # whose memory may be written to, or given back, only then
            cupy.cuda.get_current_stream().wait_event(copied)
        return copy

    def random(self, seed: int | None = None) -> Random:
        return CupyRandom(self._device, seed)

    def to_host(self, array: Array) -> NDArray[Any]:
        """Through pinned memory, from CuPy's pool of it, where it goes back to when nobody needs the array any more."""
        if array.nbytes == 0:
            return np.empty(array.shape, array.dtype)
        memory = cupy.cuda.alloc_pinned_memory(array.nbytes)
        host: NDArray[Any] = np.frombuffer(memory, array.dtype, array.size).reshape(array.shape)
        with self._device:
            array.get(out=host)
        return host

    def as_rows(self, array: Array) -> Rows:
        rows: Rows = cupy.ascontiguousarray(array, np.int64)
        return rows

    def writable(self, array: Any) -> bool:
        return isinstance(array, cupy.ndarray) and array.device.id == self._device.id

    @contextlib.contextmanager
    def _on(self, stream: Any) -> Iterator[None]:
        with self._device, stream:
            yield

    def stream(self) -> AbstractContextManager[object]:
        with self._device:
            return self._on(cupy.cuda.get_current_stream())

    def free_memory(self) -> int | None:
        with self._device:
            return int(self._device.mem_info[0] + cupy.get_default_memory_pool().free_bytes())


class CupyRandom(Random):
    """CuPy's Generator on Philox4x3210, which starts anew after every so many draws.

    CuPy has no public way to read the state of a generator. A state is therefore the draws that were made since the
    last start, and to restore it they are made again, a fixed number of them at the most.
    """

    kind = "cupy"

    def __init__(self, device: Any, seed: int | None) -> None:
        self._device = device
        self._entropy = int(seed_sequence(seed).entropy)  # type: ignore[arg-type]  # a single integer, as it was made
        self._start(0)

    def _start(self, starts: int) -> None:
        sequence = np.random.SeedSequence(self._entropy, spawn_key=(starts,))
        with self._device:
            self._generator = cupy.random.Generator(cupy.random.Philox4x3210(sequence))
        self._starts = starts
        self._drawn: list[list[int]] = []
        """For each draw since the start its `high`, 0 for one of floats, and its count."""

    def _draw(self, high: int, count: int) -> Array:
        if len(self._drawn) == _DRAWS:
            self._start(self._starts + 1)
        self._drawn.append([high, count])
        with self._device:
            return self._generator.integers(high, size=count) if high else self._generator.random(count)

    def _integers(self, high: int, count: int) -> Array:
        return self._draw(high, count)

    def _uniform(self, count: int) -> Array:
        return self._draw(0, count)

    def _permutation(self, high: int) -> Array:
        with self._device:
            return cupy.argsort(self._draw(0, high))

    def _state(self) -> dict[str, Any]:
        return {"entropy": self._entropy, "starts": self._starts, "drawn": [list(draw) for draw in self._drawn]}

    def _restore(self, state: dict[str, Any]) -> None:
        restored = CupyRandom(self._device, state["entropy"])
        restored._start(state["starts"])
        for high, count in state["drawn"]:
            restored._draw(high, count)
        vars(self).update(vars(restored))


def _taken_over(array: Any) -> Array:
    """An array of another library, in place."""
    if library_of(array) == "torch":
        array = array.detach().resolve_conj().resolve_neg()
    dtype = as_dtype(array.dtype)
    taken = cupy.from_dlpack(array) if hasattr(array, "__dlpack__") else cupy.asarray(array)
    return taken if taken.dtype == dtype else taken.view(dtype)  # some export bool as uint8


def _is_batch(leaf: Any, spec: tuple[tuple[int, ...], Any], lead: tuple[int, ...]) -> bool:
    """Whether a leaf may be a whole batch on the host: an array of the right shape, or a number for a single row."""
    if type(leaf) is np.ndarray:
        return bool(leaf.shape == lead + spec[0])
    return not lead and isinstance(leaf, _NUMBERS)


def _places(lead: tuple[int, ...]) -> Any:
    """All rows of a batch with these axes in front, one after the other."""
    count = math.prod(lead)
    return 0 if not lead else range(count) if len(lead) == 1 else np.arange(count, dtype=np.intp).reshape(lead)


def _of_launch(rows: Rows, order: Any, sent: int = 0) -> RowsOfLaunch:
    """What a launch is told of the rows; `sent` is the address of those that were sent ahead."""
    if isinstance(rows, cupy.ndarray):
        return RowsOfLaunch(rows.size, rows.data.ptr, 0 if order is None else order.data.ptr)
    return RowsOfLaunch.of(rows, order, sent)

"""CuPy, on an NVIDIA GPU: the rows of all leaves are moved by one launch."""

from __future__ import annotations

import contextlib
import math
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import array_api_compat.cupy
import cupy
import numpy as np
from numpy.typing import NDArray

from anystore import kernels
from anystore.backends.base import Array, no_dtype, parse_device, resolve_device
from anystore.backends.cuda import Borrowed, Buffers, CudaBackend
from anystore.backends.random import Random, seed_sequence
from anystore.backends.spares import LARGEST, Spare, Spares
from anystore.convert import library_of, on_gpu, to_numpy
from anystore.leaf_table import Packed, Record, first_of_run, sent_ahead
from anystore.moves import basic_index, leading_shape
from anystore.rows import Rows
from anystore.specs import as_dtype, is_extension
from anystore.staging import Sent, Specs, Staging, copy_async, fill

_COPIES = 8
"""Up to so many leaves, rows that lie side by side are written by a plain copy of each; more leaves by one launch.

Chosen, not measured: benchmarks/gpu.py measures where one overtakes the other.
"""
_STAGED = 1 << 28
"""The most bytes that are packed into pinned memory at once."""
_DRAWS = 256
"""After so many draws a generator starts anew, so that it takes no longer than these to restore one."""
_DTYPES = {
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
}
_STATES = 1 << 14
"""The generators that draw side by side: a number of its own, or the draws would depend on which GPU it is."""
_NUMBERS = (bool, int, float, np.generic)


class CupyBackend(CudaBackend):
    """CuPy arrays on one GPU.

    Notes
    -----
    Everything runs on CuPy's current stream of the store's own device, whatever device is the current one, and `get`
    and `set` return before it is done. They wait for one thing only: rows that live on a GPU are checked there, which
    takes a synchronisation.

    The leaves that `get` returns lie in one allocation. It is given back when the last of them is gone, or, of up to
    256 KiB, given out again by a later `get` of the same shape on the same stream, as long as nobody has even a weak
    reference to a leaf. The last four batches of a shape are kept for that, of the sixteen shapes (and streams) that
    were read last: CuPy's pool cannot give away these few MiB.

    Host values have been copied when `set` returns. Values on a GPU are read in place, later: whoever changes one on
    another stream than that on which it was stored lets that stream wait for the other first. The same is owed by
    those who use one storage on several streams, from one thread or several: each stream waits for the last that
    wrote. What comes from another device, or by DLPack, is ordered by events here.

    This code has run on a stand-in for CuPy and the kernels on a CPU, but nothing of it on a GPU yet.
    """

    name = library = "cupy"
    _address = operator.attrgetter("data.ptr")

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
        self._borrowed = Borrowed()

    @property
    def xp(self) -> ModuleType:
        return array_api_compat.cupy

    @classmethod
    def devices(cls) -> list[str]:
        if not cupy.cuda.is_available():
            return []
        return [f"cuda:{number}" for number in range(cupy.cuda.runtime.getDeviceCount())]

    def native_dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        known = dtype.name == "bfloat16" if is_extension(dtype) else dtype.name in _DTYPES
        if not known or not dtype.isnative:
            raise no_dtype("CuPy", dtype)
        return dtype

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        with self._device:
            buffer = cupy.zeros(shape, dtype)
            cupy.cuda.get_current_stream().synchronize()  # for whichever stream comes to it first
        return buffer

    def here(self) -> Any:
        return self._device

    def _launched(self) -> Callable[[], bool]:
        event = cupy.cuda.get_current_stream().record()
        return lambda: bool(event.done)

    def _is_contiguous(self, array: Array) -> bool:
        return bool(array.flags.c_contiguous)

    def _is_plain(self, leaf: Any, shape: tuple[int, ...], dtype: Any) -> bool:
        if type(leaf) is not cupy.ndarray or leaf.dtype != dtype or leaf.shape != shape:
            return False
        return leaf.device == self._device and self._is_contiguous(leaf)

    def _copy(self, array: Array) -> Array:
        return array.copy()

    def _send(self, arrays: Sequence[NDArray[Any]]) -> Sent:
        return self._staging.send(arrays)

    def gather(self, buffers: Sequence[Array], rows: Rows, copy: bool | None) -> list[Array]:
        if not copy and isinstance(rows, (int, range)):
            index = basic_index(rows)
            return [buffer[index] for buffer in buffers]
        buffers, lead = self.together(buffers), leading_shape(rows)
        packed = buffers.record.packed(math.prod(lead))
        with self.here():
            if packed.nbytes > LARGEST:
                memory, leaves = _new_batch(packed, buffers.specs, lead)
                self._gather(buffers.record, packed.table, memory.ptr, rows)
                return leaves
            spares = self._spares(buffers, lead)
            batch = spares.take() or Spare(*_new_batch(packed, buffers.specs, lead))
            self._gather(buffers.record, packed.table, batch.address, rows)
            return spares.lend(batch)

    def _spares(self, buffers: Buffers, lead: tuple[int, ...]) -> Spares:
        # As in CuPy's own pool of memory: of each stream, and of each thread where each has one at the same address
        # (cupy #5069).
        stream = cupy.cuda.get_current_stream().ptr
        thread = threading.get_ident() if stream == cupy.cuda.runtime.streamPerThread else 0
        return buffers.lately((lead, stream, thread, cupy.cuda.get_allocator()), Spares)

    def scatter_as_is(self, buffers: Sequence[Array], rows: Rows, leaves: Sequence[Any]) -> bool:
        """Write a whole batch; one that is on the host is checked and packed in one go, and sent in one copy."""
        if super().scatter_as_is(buffers, rows, leaves):
            return True
        buffers, lead = self.together(buffers), leading_shape(rows)
        record, count = buffers.record, math.prod(lead)
        packed = record.packed(count)
        if packed.nbytes > _STAGED or not _are_batch(leaves, buffers.specs, lead):
            return False
        with self.here():
            order = self._order(rows, count)
            ahead = sent_ahead(record, rows, order)
            nbytes = packed.nbytes + (0 if ahead is None else ahead.nbytes)
            with self._staging.block(nbytes) as block:
                if not block.take(leaves, packed, buffers.specs, lead):
                    return False
                if packed.nbytes == 0 or self._copied(record, rows, count, block.ptr, packed.offsets):
                    return True
                if ahead is not None:
                    fill(block.host, [ahead], [packed.nbytes])
                memory = block.send(nbytes)
            at = 0 if ahead is None else memory.ptr + packed.nbytes
            kernels.scatter(packed.table, memory.ptr, self._of_launch(rows, order, at))
        return True

    def _copied(self, record: Record, rows: Rows, count: int, base: int, batches: Sequence[int]) -> bool:
        first = first_of_run(rows)
        if first is None or len(batches) > _COPIES:
            return False
        for address, width, batch in zip(record.addresses, record.widths, batches):
            copy_async(address + first * width, base + batch, count * width)
        return True

    def bring(self, value: Array, dtype: np.dtype[Any]) -> Array:
        if isinstance(value, cupy.ndarray) or on_gpu(value):
            return self.move(value, dtype)
        array = to_numpy(value).astype(dtype, copy=False)
        if array.nbytes <= _STAGED:
            return array
        with self._device:  # and wait: what lies in pinned memory would else be read after `set` has returned
            return cupy.asarray(array, blocking=True)

    def from_numpy(self, array: NDArray[Any]) -> Array:
        with self._device:
            return cupy.asarray(array)

    def move(self, array: Array, dtype: np.dtype[Any]) -> Array:
        with self._device:
            return self._on_this_device(array).astype(dtype, copy=False)

    def _on_this_device(self, array: Any) -> Array:
        if not isinstance(array, cupy.ndarray):
            self._borrowed.note(array)
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

    def to_host(self, buffer: Array, rows: Rows) -> NDArray[Any]:
        """Through pinned memory, from CuPy's pool of it, where it goes back to when nobody needs the array any more."""
        (array,) = self.gather([buffer], rows, None)
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
            self._generator = cupy.random.Generator(cupy.random.Philox4x3210(sequence, size=_STATES))
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


def _new_batch(packed: Packed, specs: Specs, lead: tuple[int, ...]) -> tuple[Any, list[Array]]:
    """Memory for a batch, and its leaves there."""
    memory = cupy.cuda.alloc(max(packed.nbytes, 1))
    places = zip(specs, packed.offsets)
    return memory, [_array_at(lead + shape, dtype, memory + offset) for (shape, dtype), offset in places]


def _array_at(shape: tuple[int, ...], dtype: Any, memory: Any) -> Array:
    """What ``cupy.ndarray(shape, dtype, memory)`` is, without the layer in Python that takes as long as the rest."""
    array = _BASE.__new__(cupy.ndarray)
    array._init(shape, dtype, memory)
    return array


_BASE: Any = cupy.ndarray.__mro__[1]
if not hasattr(_BASE, "_init"):  # which is undocumented
    _array_at = cupy.ndarray


def _taken_over(array: Any) -> Array:
    """An array of another library, in place."""
    if library_of(array) == "torch":
        array = array.detach().resolve_conj().resolve_neg()
    dtype = as_dtype(array.dtype)
    taken = cupy.from_dlpack(array) if hasattr(array, "__dlpack__") else cupy.asarray(array)
    return taken if taken.dtype == dtype else taken.view(dtype)  # some export bool as uint8


def _are_batch(leaves: Sequence[Any], specs: Specs, lead: tuple[int, ...]) -> bool:
    """Whether leaves may be a whole batch on the host: arrays of the right shape, and numbers for a single row."""
    return all(
        leaf.shape == lead + shape if type(leaf) is np.ndarray else not lead and isinstance(leaf, _NUMBERS)
        for leaf, (shape, _) in zip(leaves, specs)
    )

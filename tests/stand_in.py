"""A stand-in for CuPy on NumPy memory: as much of it as anystore calls, with CuPy's own strictness.

It lets the contract run the backend's Python where there is no GPU. What is put on a stream runs late, when somebody
waits for it, so that memory that is used again too early shows; kernels run as `tests.reference` on the very arguments
of their launch, or as kernels.cu itself, by `tests.emulator`. What all this cannot show is that CuPy and CUDA do what
is expected of them here; for that the same contract runs on a GPU.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import importlib
import importlib.machinery
import math
import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import array_api_compat
import array_api_compat.numpy
import numpy as np

import anystore.backends
from anystore.leaf_table import HEADER, LAUNCH_BYTES, THREADS
from tests import reference

MODULES = (
    *("anystore.backends.cuda", "anystore.backends.cupy", "anystore.backends.torch_cuda"),
    *("anystore.kernels", "anystore.staging"),
)
"""Those that import CuPy."""


class _Here(threading.local):
    """What is current: of each thread its own, as with CUDA."""

    def __init__(self) -> None:
        self.device = 0
        self.outer: list[int] = []
        self.streams: list[list[Stream]] = [[], []]


_here = _Here()
_one_at_a_time = threading.RLock()
"""For all that threads share."""


class Device:
    """One of two devices."""

    mem_info = (2**34, 2**35)
    __hash__ = None  # type: ignore[assignment]  # as CuPy's

    def __init__(self, number: int | None = None) -> None:
        self.id = _here.device if number is None else number

    def __enter__(self) -> Device:
        _here.outer.append(_here.device)
        _here.device = self.id
        return self

    def __exit__(self, *error: object) -> None:
        _here.device = _here.outer.pop()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and other.id == self.id


# Streams: what is put on one runs when it is waited for. ------------------------------------------------------------


class Stream:
    """A queue of work of one device."""

    streams: list[Stream] = []  # noqa: RUF012
    held: list[Any] = []  # noqa: RUF012
    """Pinned memory that work still to be done may use."""

    def __init__(self, device: int | None = None) -> None:
        self.device_id = _here.device if device is None else device
        self.ptr = len(Stream.streams)
        self.work: list[Any] = []
        """What is to be done, with the memory that it may use: a pool gives that to nobody else as long."""
        self.done = 0
        Stream.streams.append(self)

    def put(self, work: Callable[[], object]) -> None:
        self.work.append((work, [memory() for *_, memory in MemoryPointer.known]))

    def run(self, until: int | None = None) -> None:
        """Do the work up to a point."""
        with _one_at_a_time:
            until = len(self.work) if until is None else until
            while self.done < until:
                work, _ = self.work[self.done]
                self.work[self.done] = None
                self.done += 1
                work()
            if all(stream.done == len(stream.work) for stream in Stream.streams):
                Stream.held.clear()

    synchronize = run

    def record(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        at = event.at
        assert at is not None
        self.put(lambda: at[0].run(at[1]))

    def __enter__(self) -> Stream:
        assert self.device_id == _here.device
        _here.streams[self.device_id].append(self)
        return self

    def __exit__(self, *error: object) -> None:
        _here.streams[self.device_id].pop()


class Event:
    """A point of a stream."""

    def __init__(self, block: bool = False, disable_timing: bool = False) -> None:
        self.at: tuple[Stream, int] | None = None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or get_current_stream()
        self.at = stream, len(stream.work)

    @property
    def done(self) -> bool:
        return self.at is None or self.at[0].done >= self.at[1]

    def synchronize(self) -> None:
        if self.at is not None:
            self.at[0].run(self.at[1])


_null: list[Stream] = [Stream(0), Stream(1)]
"""The stream of each device that is current where no other is."""


def get_current_stream(device: int | None = None) -> Stream:
    device = _here.device if device is None else device
    return _here.streams[device][-1] if _here.streams[device] else _null[device]


# Memory -------------------------------------------------------------------------------------------------------------


class MemoryPointer:
    """A place in memory of the device that was current when it was allocated."""

    known: list[tuple[int, int, int, weakref.ref[Any]]] = []  # noqa: RUF012
    """Start, end and device of all there is."""

    def __init__(self, nbytes: int) -> None:
        assert nbytes > 0
        self.memory = np.full(nbytes + 512, 0xA5, np.uint8)
        self.offset = -self.memory.ctypes.data % 512
        self.ptr = self.memory.ctypes.data + self.offset
        self.mem = types.SimpleNamespace(memory=self.memory, ptr=self.ptr)
        self.device_id = _here.device
        entry = self.ptr, self.ptr + nbytes, self.device_id, weakref.ref(self.memory)
        with _one_at_a_time:
            known = [entry for entry in MemoryPointer.known if entry[3]() is not None]
            bisect.insort(known, entry, key=lambda entry: entry[0])
            MemoryPointer.known = known
            Stream.held.append(self.memory)

    def __add__(self, offset: int) -> MemoryPointer:
        other = MemoryPointer.__new__(MemoryPointer)
        other.memory, other.mem, other.device_id = self.memory, self.mem, self.device_id
        other.offset, other.ptr = self.offset + offset, self.ptr + offset
        return other


def device_of(address: int, nbytes: int) -> int | None:
    """The device whose memory these bytes are, all of them; None for main memory."""
    known = MemoryPointer.known
    place = bisect.bisect_right(known, address, key=lambda entry: entry[0]) - 1
    if place < 0:
        return None
    start, end, device, memory = known[place]
    if memory() is None or address >= end:
        return None
    assert start <= address <= address + nbytes <= end, "past the end of an allocation"
    return device


class Pinned(np.ndarray):  # type: ignore[type-arg]
    """Pinned memory: something with an address that NumPy can use the memory of."""

    @property
    def ptr(self) -> int:
        return self.ctypes.data


def alloc_pinned_memory(nbytes: int) -> Pinned:
    memory = np.full(nbytes, 0x5A, np.uint8)
    Stream.held.append(memory)
    return memory.view(Pinned)


class Log:
    """What was put on streams since it was cleared: the names of kernels, and "copy"."""

    entries: list[str] = []  # noqa: RUF012


def memcpy_async(target: int, source: int, nbytes: int, kind: int, stream: int) -> None:
    assert kind == 4, "cudaMemcpyDefault"
    assert stream == get_current_stream().ptr, "not the current stream"
    for address in (target, source):
        assert device_of(address, nbytes) in (None, _here.device)
    Log.entries.append("copy")
    get_current_stream().put(lambda: ctypes.memmove(target, source, nbytes))


def memset_async(address: int, value: int, nbytes: int, stream: int) -> None:
    on = Stream.streams[stream]
    assert on.device_id == _here.device
    assert RawKernel.on_host_memory or device_of(address, nbytes) == _here.device
    on.put(lambda: ctypes.memset(address, value, nbytes))


# Kernels ------------------------------------------------------------------------------------------------------------


def by_reference(name: str, blocks: int, *arguments: Any) -> None:
    reference.KERNELS[name](blocks, *arguments)


class CPointer:
    """The address of a launch that is passed by value."""

    def __init__(self, address: int) -> None:
        self.address = address


def _by_value(argument: Any) -> Any:
    if isinstance(argument, CPointer):
        return np.frombuffer(ctypes.string_at(argument.address, LAUNCH_BYTES), (np.void, LAUNCH_BYTES))
    return argument.copy()


class RawKernel:
    """A kernel by name; `run` does its work."""

    run = staticmethod(by_reference)
    on_host_memory = False
    """Whether main memory passes for that of a device; then nothing runs late, since nobody holds that memory."""
    compiled: list[str] = []  # noqa: RUF012

    def __init__(self, code: str, name: str, options: tuple[str, ...] = ()) -> None:
        assert f"\n{name}(" in code.replace("void __launch_bounds__(THREADS) ", "\n")
        assert isinstance(options, tuple)
        self.name = name
        RawKernel.compiled.append(name)

    def __call__(self, grid: Any, block: Any, arguments: Any, *, stream: Any = None) -> None:
        assert block == (THREADS,)
        (blocks,) = grid
        assert type(blocks) is int
        assert 0 < blocks < 2**31
        # By value: what becomes of the caller's own afterwards does not matter.
        taken = [argument if isinstance(argument, int) else _by_value(argument) for argument in arguments]
        for argument in taken:
            if isinstance(argument, np.ndarray):
                assert argument.size == 1
                if not RawKernel.on_host_memory:
                    _check_addresses(argument)
            else:
                assert type(argument) is int
        Log.entries.append(self.name)
        on = get_current_stream() if stream is None else Stream.streams[stream.ptr]
        assert on.device_id == _here.device
        on.put(lambda: RawKernel.run(self.name, blocks, *taken))
        if RawKernel.on_host_memory:
            on.run()


def _check_addresses(launch: Any) -> None:
    """All that a launch reads and writes is memory of the current device."""
    count, base, rows, order, *_ = HEADER.unpack_from(launch.tobytes())
    for leaf in reference.leaves_of(launch).tolist():
        buffer, batch, width, step = leaf[:4]
        assert device_of(buffer, width) == _here.device
        assert device_of(base + batch, step * (count - 1) + width) == _here.device
    for address in (rows, order):
        assert not address or device_of(address, 8 * count) == _here.device


# Arrays -------------------------------------------------------------------------------------------------------------


class ndarray:  # noqa: N801  # CuPy's name
    """An array that is not NumPy's: it is neither read as one nor mixed with one in silence."""

    def __init__(self, shape: Any, dtype: Any = float, memptr: MemoryPointer | None = None) -> None:
        shape, dtype = (shape,) if isinstance(shape, int) else tuple(shape), np.dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        self._data = MemoryPointer(max(nbytes, 1)) if memptr is None else memptr
        self._array = np.ndarray(shape, dtype, self._data.memory, self._data.offset)

    @classmethod
    def _view(cls, array: Any, data: MemoryPointer) -> ndarray:
        view = cls.__new__(cls)
        view._array, view._data = array, data
        return view

    @property
    def _host(self) -> Any:
        """The memory, when the current stream of its device has done its work."""
        get_current_stream(self._data.device_id).run()
        return self._array

    @property
    def data(self) -> MemoryPointer:
        offset = self._array.ctypes.data - self._data.ptr if self._array.size else 0
        return self._data + offset if offset else self._data

    def _check_device(self) -> None:
        assert self._data.device_id == _here.device, "the current device is not the array's own"

    device = property(lambda self: Device(self._data.device_id))
    shape = property(lambda self: self._array.shape)
    dtype = property(lambda self: self._array.dtype)
    ndim = property(lambda self: self._array.ndim)
    size = property(lambda self: self._array.size)
    nbytes = property(lambda self: self._array.nbytes)
    T = property(lambda self: ndarray._view(self._array.T, self._data))
    flags = property(lambda self: self._array.flags)

    def get(self, out: Any = None) -> Any:
        if out is None:
            return self._host.copy()
        assert out.flags.c_contiguous
        assert (out.shape, out.dtype) == (self.shape, self.dtype)
        out[...] = self._host
        return out

    def tolist(self) -> Any:
        return self._host.tolist()

    def copy(self) -> ndarray:
        """A copy on the current device, on its current stream."""
        if self._data.device_id != _here.device:
            assert self._array.flags.c_contiguous, "CuPy makes it so on a stream of the other device"
            get_current_stream().run()
            return _filled(self._array)
        return _filled(self._host)

    def view(self, dtype: Any) -> ndarray:
        return ndarray._view(self._array.view(dtype), self._data)

    def reshape(self, shape: Any) -> ndarray:
        if not self._array.flags.c_contiguous:
            self._check_device()
            return _filled(self._host.reshape(shape))
        return ndarray._view(self._array.reshape(shape), self._data)

    def astype(self, dtype: Any, copy: bool = True) -> ndarray:
        self._check_device()
        return self if not copy and self.dtype == dtype else _filled(self._host.astype(dtype))

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self._data.device_id

    def __getitem__(self, index: Any) -> ndarray:
        parts = index if isinstance(index, tuple) else (index,)
        assert all(part is None or isinstance(part, (int, slice, type(...))) for part in parts)
        return ndarray._view(self._array[(*parts, ...)] if ... not in parts else self._array[parts], self._data)

    def __setitem__(self, index: Any, value: Any) -> None:
        self._check_device()
        assert isinstance(value, ndarray), "CuPy takes no NumPy array here"
        assert index is ...
        self._host[...] = value._host

    def __len__(self) -> int:
        return len(self._array)

    def __bool__(self) -> bool:
        return bool(self._host)

    def __int__(self) -> int:
        return int(self._host)

    def __float__(self) -> float:
        return float(self._host)


def _filled(array: Any) -> ndarray:
    new = ndarray(array.shape, array.dtype)
    new._array[...] = array
    return new


def asarray(value: Any, dtype: Any = None, *, blocking: bool = False) -> ndarray:
    if isinstance(value, ndarray):
        return value.astype(dtype or value.dtype, copy=False) if value.device == Device() else value.copy()
    return _filled(np.array(value, dtype))


def ascontiguousarray(array: ndarray, dtype: Any = None) -> ndarray:
    array = array if dtype is None else array.astype(dtype, copy=False)
    return array if array.flags.c_contiguous else array.copy()


def from_dlpack(array: Any) -> ndarray:
    """The stand-in's own array behind one that says it is on a GPU."""
    kind, device = array.__dlpack_device__()
    assert kind == 2
    with Device(device):
        taken: ndarray = array.__dlpack__(stream=get_current_stream().ptr)
    return taken


# Arithmetic ---------------------------------------------------------------------------------------------------------

OPERATORS = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"),
    *("radd", "rsub", "rmul", "rtruediv", "rfloordiv", "rmod", "rpow", "rand", "ror", "rxor"),
    *("lt", "le", "gt", "ge", "eq", "ne", "neg", "invert", "abs"),
)
FUNCTIONS = (
    *("all", "any", "argsort", "astype", "broadcast_to", "concat", "count_nonzero", "cumulative_sum", "exp"),
    *("full_like", "isdtype", "isfinite", "log", "max", "maximum", "min", "minimum", "moveaxis", "nonzero"),
    *("ones_like", "reshape", "searchsorted", "stack", "sum", "take", "where", "zeros_like"),
)
"""What the arrays and the namespace of array-api-compat offer to those who know no library by name."""


def _operator(name: str) -> Any:
    def operate(*operands: Any) -> Any:
        return _computed(getattr(np.ndarray, name), operands, {})

    return operate


for _name in OPERATORS:
    setattr(ndarray, f"__{_name}__", _operator(f"__{_name}__"))


def _function(name: str) -> Any:
    def compute(*arguments: Any, **options: Any) -> Any:
        return _computed(getattr(array_api_compat.numpy, name), arguments, options)

    return compute


def _computed(function: Callable[..., Any], arguments: Any, options: Any) -> Any:
    """What NumPy makes of the arguments, on the current device, which has to be that of all of them."""

    def read(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(read, value))
        if isinstance(value, ndarray):
            value._check_device()
            return value._host
        assert not isinstance(value, np.ndarray), "CuPy mixes its arrays with none of NumPy"
        return value

    def written(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(written, value))
        return _filled(np.asarray(value)) if isinstance(value, (np.ndarray, np.generic)) else value

    return written(function(*read(arguments), **{name: read(value) for name, value in options.items()}))


# Random draws ---------------------------------------------------------------------------------------------------------


class Philox4x3210:
    """A bit generator of the device that is current when it is made, seeded as CuPy seeds it: by 32 bits."""

    def __init__(self, seed: np.random.SeedSequence, *, size: int) -> None:
        assert size % 256 == 0
        self.bits = np.random.Philox(int(seed.generate_state(1, np.uint32)[0]))
        self.device_id = _here.device


class Generator:
    """As little of a generator as there is in CuPy: among what is missing are its state and permutations."""

    def __init__(self, bit_generator: Philox4x3210) -> None:
        self._device_id = bit_generator.device_id
        self._generator = np.random.Generator(bit_generator.bits)

    def integers(self, low: int, high: int | None = None, size: int | None = None) -> ndarray:
        assert _here.device == self._device_id, "This Generator state is allocated in a different device"
        return _filled(self._generator.integers(low, high, size))

    def random(self, size: int | None = None, dtype: Any = np.float64) -> ndarray:
        assert _here.device == self._device_id, "This Generator state is allocated in a different device"
        return _filled(self._generator.random(size, dtype))


def argsort(array: ndarray) -> ndarray:
    array._check_device()
    return _filled(np.argsort(array._host))


def module() -> types.ModuleType:
    """What ``import cupy`` finds."""
    cupy = types.ModuleType("cupy")
    cupy.__dict__.update(
        ndarray=ndarray,
        asarray=asarray,
        ascontiguousarray=ascontiguousarray,
        empty=ndarray,
        zeros=lambda shape, dtype: _filled(np.zeros(shape, dtype)),
        zeros_like=lambda array: _filled(np.zeros(array.shape, array.dtype)),
        from_dlpack=from_dlpack,
        argsort=argsort,
        random=types.SimpleNamespace(Generator=Generator, Philox4x3210=Philox4x3210),
        RawKernel=RawKernel,
        get_default_memory_pool=lambda: types.SimpleNamespace(free_bytes=lambda: 0),
        cuda=types.SimpleNamespace(
            Device=Device,
            Stream=Stream,
            Event=Event,
            get_current_stream=get_current_stream,
            alloc=MemoryPointer,
            get_allocator=lambda: MemoryPointer,
            alloc_pinned_memory=alloc_pinned_memory,
            is_available=lambda: True,
            function=types.SimpleNamespace(CPointer=CPointer),
            runtime=types.SimpleNamespace(
                streamPerThread=2,
                getDevice=lambda: _here.device,
                getDeviceCount=lambda: 2,
                memcpyAsync=memcpy_async,
                memcpyDefault=4,
                memsetAsync=memset_async,
            ),
        ),
        __version__="stand-in",
        __spec__=importlib.machinery.ModuleSpec("cupy", None),
    )
    ndarray.__module__ = "cupy"
    return cupy


@contextlib.contextmanager
def installed(monkeypatch: Any, run: Any = by_reference) -> Any:
    """Within, "cupy" names a backend on the stand-in, whose kernels `run` runs."""
    cupy = module()
    compat = types.ModuleType("array_api_compat.cupy")
    compat.__dict__.update({name: value for name, value in vars(cupy).items() if not name.startswith("__")})
    compat.__dict__.update({name: _function(name) for name in FUNCTIONS})
    compat.__dict__["empty"] = lambda shape, dtype, device: ndarray(shape, dtype)  # the device is ignored (compat #337)
    compat.__dict__.update(
        {name: getattr(np, name) for name in ("int32", "int64", "float32", "float64")}, bool=np.bool_
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "array_api_compat.cupy", compat)
    monkeypatch.setattr(array_api_compat, "cupy", compat, raising=False)
    monkeypatch.setattr(RawKernel, "run", staticmethod(run))
    monkeypatch.setattr(anystore.backends, "_shared", {})
    # What a test before this one left undone is nobody's any more.
    Stream.streams.clear()
    Stream.held.clear()
    MemoryPointer.known.clear()
    _null[:] = Stream(0), Stream(1)
    before = {name: sys.modules.get(name) for name in MODULES}
    _put(dict.fromkeys(MODULES))
    Log.entries.clear()
    importlib.import_module("anystore.backends.cupy")
    yield cupy
    _put(before)


def _put(modules: dict[str, types.ModuleType | None]) -> None:
    """Have these modules imported, or not, as far as Python can tell."""
    for name, module in modules.items():
        package, _, child = name.rpartition(".")
        if module is None:
            sys.modules.pop(name, None)
            vars(sys.modules[package]).pop(child, None)
        else:
            sys.modules[name] = module
            setattr(sys.modules[package], child, module)

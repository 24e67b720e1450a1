"""JAX, on the CPU, a GPU or a TPU: immutable arrays, updated in place where nobody can tell, or by giving them away."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import NDArray

from anystore import moves
from anystore.backends.base import Array, Backend, host_memory, no_dtype, parse_device, resolve_device, spell_device
from anystore.backends.random import Random, seed_sequence
from anystore.convert import library_of, to_numpy
from anystore.moves import last_writes, leading_shape
from anystore.rows import Rows
from anystore.specs import is_extension

try:
    from jax.extend.core import get_opaque_trace_state
except ImportError:  # before JAX 0.10
    from jax.core import get_opaque_trace_state

try:
    from jax import enable_x64
except ImportError:  # before JAX 0.8
    from jax.experimental import enable_x64  # type: ignore[attr-defined, no-redef]

_SMALL = 1 << 18
"""Batches of so many bytes and less are read from main memory by the compiled moves."""


class _Held:
    """The arrays of a storage, which every write replaces by their successors."""

    __slots__ = ("arrays", "lent", "read")

    def __init__(self, arrays: list[jax.Array]) -> None:
        self.arrays = arrays
        self.lent = False
        """Whether one may have been handed out since all were replaced."""
        self.read = False
        """Whether XLA may still be reading from one, for it reads when it likes: not so once all were replaced."""


class _Cell:
    """The place of an array among those of a storage, which selections share."""

    __slots__ = ("held", "lent", "position")

    def __init__(self, held: _Held, position: int) -> None:
        self.held = held
        self.position = position
        self.lent = False
        """Whether the array was handed out, so that it, or another on its memory, can come back as a value."""

    @property
    def array(self) -> jax.Array:
        return self.held.arrays[self.position]


class _Cells(list[_Cell]):
    """The places of a storage, or of a selection: of the same arrays, all of them or a part."""

    def __init__(self, cells: Sequence[_Cell]) -> None:
        super().__init__(cells)
        self.held = cells[0].held
        self._positions = [cell.position for cell in cells]
        self._is_whole = self._positions == list(range(len(self.held.arrays)))
        arrays = self.arrays()
        self.classes = [type(array) for array in arrays]
        self.is_wide = any(array.dtype in _WIDE for array in arrays)
        self.row_nbytes = sum(math.prod(array.shape[1:]) * array.dtype.itemsize for array in arrays)
        self.is_plain = not any(_is_packed(array.dtype) for array in arrays)
        """Whether NumPy has the same bytes for these dtypes."""
        self._found: tuple[list[int], list[NDArray[Any]]] = [], []
        self.taken: Any = None
        """What was last seen to fit: the leading shape and the avals of the leaves."""

    def arrays(self) -> list[jax.Array]:
        return self.held.arrays if self._is_whole else [cell.array for cell in self]

    def in_memory(self) -> list[NDArray[Any]] | None:
        """NumPy arrays on the memory of these, which is main memory, until XLA writes to them; None while it does.

        They hold on to nothing. To XLA the memory were shared otherwise, and the next write would copy all of it.
        """
        arrays = self.arrays()
        if not (self.is_plain and _are_ready(arrays)):
            return None
        addresses = [array.unsafe_buffer_pointer() for array in arrays]
        if addresses != self._found[0]:
            self._found = addresses, list(map(_on_memory, addresses, arrays))
        return self._found[1]

    def lent(self) -> bool:
        return self.held.lent if self._is_whole else any(cell.lent for cell in self)

    def at_rest(self) -> bool:
        """Whether nobody else has one of these or may still be reading from one."""
        return not (self.held.lent or self.held.read)

    def take_back(self) -> None:
        """Now that there are others: what was handed out, and what is read from, is none of these."""
        for cell in self:
            cell.lent = False
        if self._is_whole:
            self.held.lent = self.held.read = False

    def replace(self, written: Iterator[list[jax.Array]]) -> None:
        """Have the arrays that the one item of `written` is, once it is made, in place of those that it gives away.

        No signal is handled between the two, as it would be after a call: an interrupt comes before the old arrays are
        gone or when the new ones are there.
        """
        if self._is_whole:
            (self.held.arrays,) = written
        else:
            there, made = itertools.repeat(self.held.arrays), itertools.chain.from_iterable(written)
            _exhaust(map(operator.setitem, there, self._positions, made))


def _with_64_bits(method: Any) -> Any:
    """Have a method that works on the arrays of a storage do so with 64 bits where these have as many.

    The setting may be that of another thread (``jax.enable_x64`` as a context is), and JAX narrows without a word.
    """

    @functools.wraps(method)
    def call(self: JaxBackend, buffers: Sequence[_Cell], *arguments: Any) -> Any:
        cells = self.together(buffers)
        if not cells.is_wide or _config.jax_enable_x64:
            return method(self, cells, *arguments)
        with enable_x64(True):
            return method(self, cells, *arguments)

    return call


class JaxBackend(Backend):
    """JAX arrays.

    Notes
    -----
    A write hands its buffers over to a compiled update (``donate_argnums``), which reuses their memory: on the CPU an
    array that was taken from ``Storage.buffers`` before the write is deleted by it. While a zero-copy view of it lives
    outside of JAX (``numpy.asarray(array)``), XLA copies the whole buffer instead, at the price of time and not of
    right results. On other devices, where XLA refuses that, the first write after ``Storage.buffers`` copies them all,
    and what was taken stays as it was. In main memory a write goes to the arrays' own memory instead, without XLA, as
    long as that cannot be told from outside: nobody has one of the arrays, and XLA has nothing left to do with them.

    Every function is compiled once per shape of the rows: batches of one size are fast, batches of ever new sizes are
    not. Rows travel as NumPy arrays, which ``jax.transfer_guard("disallow")`` refuses.
    """

    name = library = "jax"
    has_views = mutable = False

    def __init__(self, device: Any = None) -> None:
        if isinstance(device, jax.Device):
            device = spell_device(device.platform, device.id)
        devices = self.devices()
        if device is None and _config.jax_default_device is not None:
            device = _config.jax_default_device
            device = device if isinstance(device, str) else spell_device(device.platform, device.id)
        self.device = devices[0] if device is None else resolve_device(str(device), devices, "JAX")
        self._device = _existing()[self.device]
        self._is_host = bool(self._device.platform == "cpu")
        self._is_alone = len(devices) == 1
        self._copied = _copies_on(self._device)

    @property
    def xp(self) -> ModuleType:
        return jnp

    @property
    def books_elsewhere(self) -> bool:
        return self._is_host

    @classmethod
    def devices(cls) -> list[str]:
        return list(_existing())

    def native_dtype(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        try:
            native = np.dtype(jax.dtypes.canonicalize_dtype(dtype)) if dtype.isnative else None
        except TypeError:
            native = None
        if native is None or not _is_supported(dtype):
            raise no_dtype("JAX", dtype)
        if native != dtype:
            raise no_dtype(
                "JAX", dtype, f'call jax.config.update("jax_enable_x64", True) first, or give the leaf {native}'
            )
        return native

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> _Cell:
        if shape[0] > _largest_integer():
            raise ValueError(f"JAX counts rows in 32 bits, up to {_largest_integer()}, unless jax_enable_x64 is set")
        with jax.default_device(self._device), _wide_enough(dtype):
            return _Cell(_Held([jax.device_put(jnp.zeros(shape, dtype), self._device)]), 0)

    def together(self, buffers: Sequence[_Cell]) -> _Cells:
        if isinstance(buffers, _Cells):
            return buffers
        if any(cell.held is not buffers[0].held for cell in buffers):
            held = _Held([cell.array for cell in buffers])
            for position, cell in enumerate(buffers):
                held.lent |= cell.lent
                held.read |= cell.held.read
                cell.held, cell.position = held, position
        return _Cells(buffers)

    @_with_64_bits
    def gather(self, cells: _Cells, rows: Rows, copy: bool | None) -> list[Array]:
        read: list[Array]
        # XLA takes its time for each row, so that a batch of many small ones is copied from NumPy's in less.
        is_small = type(rows) is np.ndarray and rows.size * cells.row_nbytes <= _SMALL
        in_memory = cells.in_memory() if is_small and self._is_host else None
        if in_memory is not None:
            read = self._handed_out(moves.gather(in_memory, rows))
        else:
            cells.held.read = True
            with _whatever_it_holds():
                read = _read(cells.arrays(), rows)
        if isinstance(read[0], jax.core.Tracer):
            raise _traced("read")
        return read

    def to_host(self, buffer: _Cell, rows: Rows) -> NDArray[Any]:
        in_memory = self.together([buffer]).in_memory() if self._is_host else None
        if in_memory is not None:
            return moves.gather(in_memory, rows)[0]
        if isinstance(rows, int):
            return super().to_host(buffer, rows)
        # The head of a ring moves, and JAX compiles for every length: these are but a few.
        if type(rows) is range and rows.step == 1:
            capacity = buffer.array.shape[0]
            length = min(_few(len(rows)), capacity)
            start = min(rows.start, capacity - length)
            return super().to_host(buffer, range(start, start + length))[rows.start - start :][: len(rows)]
        index = np.asarray(rows, np.intp)
        found = super().to_host(buffer, np.resize(index, _few(index.size)))[: index.size]
        return found.reshape(index.shape + found.shape[1:])

    @_with_64_bits
    def scatter(self, cells: _Cells, rows: Rows, leaves: Sequence[Array]) -> None:
        if not self._write_in_place(cells, rows, leaves):
            self._replace(cells, rows, leaves)

    @_with_64_bits
    def scatter_as_is(self, cells: _Cells, rows: Rows, leaves: Sequence[Any]) -> bool:
        lead = leading_shape(rows)
        if self._write_in_place(cells, rows, leaves):
            return True
        if list(map(type, leaves)) != cells.classes:  # such as tracers, whose avals are those of arrays
            return False
        taken = lead, [leaf.aval for leaf in leaves]
        if taken != cells.taken:
            if not all(_fits(leaf, array, lead) for leaf, array in zip(leaves, cells.arrays())):
                return False
            cells.taken = taken
        if any(map(_is_deleted, leaves)):  # which `bring` refuses
            return False
        if not self._is_alone and any(leaf.devices() != {self._device} for leaf in leaves):
            return False
        self._replace(cells, rows, leaves)
        return True

    def _write_in_place(self, cells: _Cells, rows: Rows, leaves: Sequence[Any]) -> bool:
        """Write to the arrays' own memory where nobody can tell that from new arrays in their place.

        Whether the leaves fit need not be known; nobody waits for what is still computed.
        """
        if not (self._is_host and cells.at_rest() and _is_untraced()):
            return False
        in_memory = cells.in_memory()
        values = [leaf for leaf, own in zip(leaves, cells.classes) if type(leaf) is own]
        if in_memory is None or not _are_ready(values):
            return False
        found = [np.asarray(leaf) if type(leaf) is own else leaf for leaf, own in zip(leaves, cells.classes)]
        return moves.scatter(in_memory, rows, found)

    def _replace(self, cells: _Cells, rows: Rows, leaves: Sequence[Array]) -> None:
        """Have XLA make the arrays anew, in the memory of those that there are."""
        arrays, lent = cells.arrays(), cells.lent()
        # On other devices XLA takes no array that somebody has a view of outside of JAX.
        gives = self._is_host or not lent
        leaves = [_kept(leaf, lent and gives) for leaf in leaves]
        written: Iterator[list[jax.Array]]
        of_slice, of_rows = (_given_slice, _given_rows) if gives else (_new_slice, _new_rows)
        if type(rows) is int:
            written = map(of_slice, (arrays,), (rows,), (leaves,), (1,))
        elif type(rows) is range and rows.step == 1:
            written = map(of_slice, (arrays,), (rows.start,), (leaves,), (len(rows),))
        else:
            index = np.array(rows, np.intp)  # a copy, as of what is NumPy's among the leaves
            written = map(of_rows, (arrays,), (index,), (leaves,), (last_writes(index),))
        with _whatever_it_holds():
            cells.replace(written)
        if isinstance(cells.arrays()[0], jax.core.Tracer):
            cells.replace(iter([arrays]))
            raise _traced("written to")
        # They are the same where jit is disabled and nothing is to be written.
        if not cells.at_rest() and not any(map(operator.is_, cells.arrays(), arrays)):
            cells.take_back()

    def from_numpy(self, array: NDArray[Any]) -> jax.Array:
        # A copy, since the device may share the memory and read it later, when its owner has changed it.
        own: jax.Array = jax.device_put(np.array(array), self._device)
        return own

    def from_bookkeeping(self, arrays: Sequence[Array]) -> list[Array]:
        if not self.books_elsewhere:
            return list(arrays)
        # A compiled copy takes a small part of the time of device_put, and batches are of few shapes.
        return self._handed_out(list(map(np.array, arrays)))

    def gather_for_bookkeeping(self, buffers: Sequence[_Cell], rows: Rows) -> list[Array]:
        if not self.books_elsewhere:
            return super().gather_for_bookkeeping(buffers, rows)
        in_memory = self.together(buffers).in_memory()
        if in_memory is not None:
            return list(moves.gather(in_memory, rows))
        return [np.array(self.to_host(buffer, rows)) for buffer in buffers]

    def leaves_from_bookkeeping(self, leaves: Sequence[Array]) -> list[Array]:
        if not self.books_elsewhere:
            return list(leaves)
        with _wide_enough(*(leaf.dtype for leaf in leaves)):
            given = self._handed_out(list(leaves))
        if any(isinstance(leaf, jax.core.Tracer) for leaf in given):
            raise _traced("read")
        return given

    def _handed_out(self, arrays: list[NDArray[Any]]) -> list[Array]:
        """A copy of each, on this device, of arrays that nobody writes to any more: XLA reads them when it likes."""
        with _whatever_it_holds():
            copied: list[Array] = self._copied(arrays)
        return copied

    def bring(self, value: Any, dtype: np.dtype[Any]) -> Any:
        if isinstance(value, jax.core.Tracer):
            raise _traced("written to")
        if library_of(value) == self.library:
            if value.is_deleted():
                raise ValueError("the array was deleted, as one that was given away (donate_argnums) is")
            return self.move(value, dtype)
        # The compiled update sends all leaves to the device at once.
        return to_numpy(value).astype(dtype, copy=False)

    def move(self, array: jax.Array, dtype: Any) -> jax.Array:
        if array.dtype == dtype and array.devices() == {self._device}:
            return array
        with _wide_enough(dtype):
            moved: jax.Array = jax.device_put(array.astype(dtype), self._device)
        return moved

    def array(self, buffer: _Cell) -> jax.Array:
        buffer.lent = buffer.held.lent = True
        return buffer.array

    def flatnonzero(self, mask: jax.Array) -> jax.Array:
        positions = np.flatnonzero(mask)
        more = (1 << (positions.size - 1).bit_length()) - positions.size if positions.size else 0
        return self.from_numpy(np.append(positions, np.repeat(positions[-1:], more)))

    def put(self, array: jax.Array, places: Any, values: Any) -> jax.Array:
        held = _Held([array])
        held.read = True  # for all that is known here
        self.scatter([_Cell(held, 0)], self.as_rows(places), [values])
        return held.arrays[0]

    def random(self, seed: int | None = None) -> Random:
        return JaxRandom(self._device, seed)

    def free_memory(self) -> int | None:
        if parse_device(self.device)[0] == "cpu":
            return host_memory()
        stats = self._device.memory_stats() or {}
        if "bytes_limit" not in stats:
            return None
        return int(stats["bytes_limit"] - stats["bytes_in_use"])


class JaxRandom(Random):
    """Keys of JAX's own generator, Threefry; each draw splits the one that is there.

    Notes
    -----
    Every method is compiled once per number of draws, `permutation` once per `high`.
    """

    kind = "jax"

    def __init__(self, device: jax.Device, seed: int | None) -> None:
        self._device = device
        self._key = jax.device_put(seed_sequence(seed).generate_state(2, np.uint32), device)

    def _integers(self, high: int, count: int) -> jax.Array:
        if high > 2**31:
            most = _largest_integer() + 1
            if high > most:
                raise ValueError(
                    f"expected at most {most} integers to draw from, found {high}; jax_enable_x64 allows more"
                )
            return self._go_on(_draw_large_integers(self._key, high, count))
        return self._go_on(_draw_integers(self._key, np.uint32(high), count))

    def _uniform(self, count: int) -> jax.Array:
        return self._go_on(_draw_uniform(self._key, count))

    def _bits(self, count: int) -> jax.Array:
        return self._go_on(_draw_bits(self._key, count))

    def _permutation(self, high: int) -> jax.Array:
        return self._go_on(_draw_permutation(self._key, high))

    def _go_on(self, drawn: tuple[jax.Array, jax.Array]) -> jax.Array:
        self._key, array = drawn
        return array

    def _state(self) -> dict[str, Any]:
        return {"key": np.asarray(self._key).tolist()}

    def _restore(self, state: dict[str, Any]) -> None:
        first, second = state["key"]
        self._key = jax.device_put(np.array([first, second], np.uint32), self._device)


def _split(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The bits of the key that follows, and a key to draw with."""
    # By name, since users choose what JAX's default is.
    following, own = jax.random.split(jax.random.wrap_key_data(key, impl="threefry2x32"))
    return jax.random.key_data(following), own


@functools.partial(jax.jit, static_argnums=2)
def _draw_integers(key: jax.Array, high: Any, count: int) -> tuple[jax.Array, jax.Array]:
    """64 random bits times `high`, without the lower 64 bits of the product: a quarter of the time of a remainder."""
    following, own = _split(key)
    upper, lower = jax.random.bits(own, (2, count), np.uint32)
    whole, rest = _product(upper, high)
    drawn: jax.Array = whole + (rest + _product(lower, high)[0] < rest).astype(np.uint32)  # what the lower half carries
    return following, drawn.astype(jax.dtypes.canonicalize_dtype(np.int64))


def _product(one: jax.Array, other: Any) -> tuple[jax.Array, jax.Array]:
    """The upper and the lower 32 bits of the product of unsigned integers of 32 bits, by halves of these."""
    half, mask = np.uint32(16), np.uint32(0xFFFF)
    first = (one >> half) * (other & mask) + ((one & mask) * (other & mask) >> half)
    second = (one & mask) * (other >> half) + (first & mask)
    return (one >> half) * (other >> half) + (first >> half) + (second >> half), one * other


@functools.partial(jax.jit, static_argnums=2)
def _draw_large_integers(key: jax.Array, high: Any, count: int) -> tuple[jax.Array, jax.Array]:
    following, own = _split(key)
    return following, jax.random.randint(own, (count,), 0, high, jax.dtypes.canonicalize_dtype(np.int64))


@functools.partial(jax.jit, static_argnums=1)
def _draw_uniform(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    following, own = _split(key)
    return following, jax.random.uniform(own, (count,), jax.dtypes.canonicalize_dtype(np.float64))


@functools.partial(jax.jit, static_argnums=1)
def _draw_bits(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    following, own = _split(key)
    return following, jax.random.bits(own, (count,), np.uint32) >> np.uint32(1)


@functools.partial(jax.jit, static_argnums=1)
def _draw_permutation(key: jax.Array, high: int) -> tuple[jax.Array, jax.Array]:
    following, own = _split(key)
    return following, jax.random.permutation(own, jnp.arange(high))


_trace_state: Any = functools.partial(get_opaque_trace_state, convention="nnx")
_OUTSIDE = _trace_state()
_config: Any = jax.config  # whose types do not list the settings
_WIDE = {np.dtype(name) for name in ("int64", "uint64", "float64", "complex128")}
"""The dtypes that JAX has with x64 only."""
_is_deleted = operator.methodcaller("is_deleted")
_is_ready = operator.methodcaller("is_ready")
_exhaust = collections.deque[None](maxlen=0).extend


def _fits(leaf: jax.Array, array: jax.Array, lead: tuple[int, ...]) -> bool:
    """Whether a leaf is of the dtype of the buffer and the shape of the rows or of one item."""
    shape = array.shape[1:]
    return bool(leaf.dtype == array.dtype) and leaf.shape in (shape, lead + shape)


def _wide_enough(*dtypes: np.dtype[Any]) -> contextlib.AbstractContextManager[object]:
    """What to work in for arrays of these dtypes to be of them."""
    return enable_x64(True) if not _WIDE.isdisjoint(dtypes) and not _config.jax_enable_x64 else contextlib.nullcontext()


@contextlib.contextmanager
def _unchecked() -> Iterator[None]:
    with jax.debug_nans(False), jax.debug_infs(False):
        yield


def _whatever_it_holds() -> contextlib.AbstractContextManager[object]:
    """Where no NaN and no infinity is looked for: nothing is computed, and after a write the old arrays are gone."""
    return _unchecked() if _config.jax_debug_nans or _config.jax_debug_infs else contextlib.nullcontext()


def _largest_integer() -> int:
    return int(np.iinfo(jax.dtypes.canonicalize_dtype(np.int64)).max)


def _kept(leaf: Array, lent: bool) -> Array:
    """A leaf that stays as it is until XLA reads it; `lent` is whether it may be on the memory that is written to."""
    if type(leaf) is np.ndarray:
        return np.array(leaf)  # by NumPy: JAX reads what it copies later, too
    # Memory cannot be given away and read in one call.
    return jnp.copy(leaf) if lent else leaf


def _is_packed(dtype: np.dtype[Any]) -> bool:
    """Whether XLA may have several numbers of the dtype in a byte, as of int4."""
    info: Any = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo
    return is_extension(dtype) and info(dtype).bits < 8


def _are_ready(arrays: Sequence[jax.Array]) -> bool:
    """Whether each of them is there, and computed."""
    # JAX (0.4.35 to 0.10.2) does not survive being asked whether a deleted one is.
    return not any(map(_is_deleted, arrays)) and all(map(_is_ready, arrays))


def _is_untraced() -> bool:
    """Whether no transformation of JAX is going on in this thread."""
    return bool(_trace_state() == _OUTSIDE)


def _traced(done: str) -> TypeError:
    return TypeError(
        f"a storage cannot be {done} within jax.jit or another transformation of JAX, which would do it once, when it "
        "traces the function; keep it outside, and hand over what is read as an argument"
    )


def _few(count: int) -> int:
    """The least of a few numbers that is no less than `count`: the next power of two."""
    return 1 << (count - 1).bit_length() if count else 0


@functools.lru_cache(maxsize=64)
def _is_supported(dtype: np.dtype[Any]) -> bool:
    try:
        jnp.zeros((), jax.dtypes.canonicalize_dtype(dtype))
    except (TypeError, ValueError):
        return False
    return True


def _existing() -> dict[str, jax.Device]:
    """Every device of every platform, the default one first."""
    found = list(jax.devices())
    if found[0].platform != "cpu":
        with contextlib.suppress(RuntimeError):  # where JAX_PLATFORMS leaves the CPU out
            found += jax.devices("cpu")
    return {spell_device(device.platform, number): device for number, device in _numbered(found)}


def _numbered(devices: Sequence[jax.Device]) -> list[tuple[int, jax.Device]]:
    counts: dict[str, int] = {}
    numbered = []
    for device in devices:
        number = counts.get(device.platform, 0)
        counts[device.platform] = number + 1
        numbered.append((number, device))
    return numbered


def _on_memory(address: int, array: jax.Array) -> NDArray[Any]:
    memory: Any = (ctypes.c_char * array.nbytes).from_address(address)
    return np.ndarray(array.shape, array.dtype, memory)


@functools.lru_cache
def _copies_on(device: jax.Device) -> Any:
    def copied(arrays: list[Any]) -> list[jax.Array]:
        return [jnp.copy(array) for array in arrays]

    return jax.jit(copied, out_shardings=jax.sharding.SingleDeviceSharding(device))


def _read(buffers: list[jax.Array], rows: Rows) -> Any:
    if type(rows) is int:
        return _read_one(buffers, rows)
    if type(rows) is range and rows.step == 1:
        return _read_slice(buffers, rows.start, len(rows))
    return _read_rows(buffers, np.array(rows, np.intp))


@jax.jit
def _read_one(buffers: list[jax.Array], row: Any) -> list[jax.Array]:
    return [lax.dynamic_index_in_dim(buffer, row, keepdims=False) for buffer in buffers]


@functools.partial(jax.jit, static_argnums=2)
def _read_slice(buffers: list[jax.Array], start: Any, length: int) -> list[jax.Array]:
    return [lax.dynamic_slice_in_dim(buffer, start, length) for buffer in buffers]


@jax.jit
def _read_rows(buffers: list[jax.Array], rows: jax.Array) -> list[jax.Array]:
    return [buffer.at[rows].get(mode="promise_in_bounds") for buffer in buffers]


def _write_slice(buffers: list[jax.Array], start: Any, leaves: list[jax.Array], length: int) -> list[jax.Array]:
    def write(buffer: jax.Array, leaf: jax.Array) -> jax.Array:
        block = jnp.broadcast_to(leaf, (length, *buffer.shape[1:]))
        return lax.dynamic_update_slice_in_dim(buffer, block, start, 0)

    return [write(buffer, leaf) for buffer, leaf in zip(buffers, leaves)]


def _write_rows(
    buffers: list[jax.Array], rows: jax.Array, leaves: list[jax.Array], last: jax.Array | None
) -> list[jax.Array]:
    def write(buffer: jax.Array, leaf: jax.Array) -> jax.Array:
        batch = jnp.broadcast_to(leaf, rows.shape + buffer.shape[1:])
        if last is not None:
            batch = batch.reshape((rows.size, *buffer.shape[1:]))[last].reshape(batch.shape)
        return buffer.at[rows].set(batch, mode="promise_in_bounds", unique_indices=last is None)

    return [write(buffer, leaf) for buffer, leaf in zip(buffers, leaves)]


_given_slice = jax.jit(_write_slice, static_argnums=3, donate_argnums=0)
_given_rows = jax.jit(_write_rows, donate_argnums=0)
_new_slice = jax.jit(_write_slice, static_argnums=3)
_new_rows = jax.jit(_write_rows)

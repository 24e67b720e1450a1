"""What a backend is: an array library on a device, and what differs between libraries.

It owes the verbs that move data, allocation, and conversion in and out. Everything else has a default in the
array API's own words or in NumPy, and may be done better by a library of its own ways.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anystore.backends.random import BookkeepingRandom, HostRandom, Random
from anystore.convert import library_of, to_numpy
from anystore.rows import Rows

Array = Any
"""An array of the library at hand."""
Buffer = Any
"""What a backend keeps a leaf in: as a rule an array, for a library of immutable arrays a holder of one."""


class Backend(ABC):
    """An array library on one device, and how leaves are moved in and out of its buffers.

    Attributes
    ----------
    name : str
        The name that selects it.
    device : str
        The device, in the spelling that is the same for every library: "cpu", "cuda:0", ...
    xp : module
        The array-API namespace, through array-api-compat where the library needs it.

    Notes
    -----
    Backends hold no data and can be shared between storages and threads. Buffers and rows that are handed to one have
    been checked: rows are inside the buffers, leaves have the dtype of their buffer and a shape that fits the rows.
    """

    name: str
    library: str
    """The package whose arrays these are."""
    device: str
    has_views: bool = True
    """Whether memory can be shared with what `gather` returns."""
    mutable: bool = True
    """Whether the library's arrays can be written to, as `gather_into` does."""

    # What a storage needs ---------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, device: Any = None) -> Backend:
        """The backend for a device as the user names it; None stands for the library's default."""
        return cls(device)  # type: ignore[call-arg]  # the constructors that take a device

    @classmethod
    @abstractmethod
    def devices(cls) -> list[str]:
        """The devices that exist, best first; none where the library cannot be used."""

    @property
    @abstractmethod
    def xp(self) -> ModuleType:
        """The array-API namespace."""

    @abstractmethod
    def native_dtype(self, dtype: np.dtype[Any]) -> Any:
        """The library's own dtype.

        Raises
        ------
        ValueError
            If it has none, with the remedy.
        """

    @abstractmethod
    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Buffer:
        """A buffer of zeros, with memory committed only as rows are written wherever the device allows it."""

    def together(self, buffers: list[Buffer]) -> list[Buffer]:
        """The buffers of one storage as the other methods take them: with whatever is to be known of them all."""
        return buffers

    def check_rows(self, index: Array, capacity: int) -> Rows | None:
        """The rows that an index array means, checked where it lives; None for one that is to be read into NumPy.

        Raises
        ------
        IndexError
            If a row is out of range.
        """
        return None

    @abstractmethod
    def gather(self, buffers: Sequence[Buffer], rows: Rows, copy: bool | None) -> list[Array]:
        """The rows of every buffer.

        Views if `copy` is False, which is asked for only where `views` says that they can be had; memory of their
        own if it is True; None leaves it to the backend.
        """

    def gather_into(self, buffers: Sequence[Buffer], rows: Rows, out: Sequence[Array]) -> None:
        """Fill `out` with the rows of every buffer; asked for only where the library's arrays are `mutable`."""
        for leaf, array in zip(self.gather(buffers, rows, None), out):
            array[...] = leaf

    def to_host(self, buffer: Buffer, rows: Rows) -> NDArray[Any]:
        """The rows of a buffer in main memory, of which it may be a view."""
        (leaf,) = self.gather([buffer], rows, None)
        return to_numpy(leaf)

    @abstractmethod
    def scatter(self, buffers: Sequence[Buffer], rows: Rows, leaves: Sequence[Array]) -> None:
        """Write a leaf to the rows of each buffer; a leaf of the shape of one item goes to every row.

        Where a row is there more than once, the last value stays.
        """

    def scatter_as_is(self, buffers: Sequence[Buffer], rows: Rows, leaves: Sequence[Any]) -> bool:
        """Do what `scatter` does, if it is plain at a glance that every unchecked leaf fits its buffer and the rows.

        Returns
        -------
        bool
            Whether the leaves are written. False is always right, and then nothing is.
        """
        return False

    @abstractmethod
    def from_numpy(self, array: NDArray[Any]) -> Array:
        """An array of the library with the same values, on the device; it may share the memory of `array`."""

    @abstractmethod
    def move(self, array: Array, dtype: Any) -> Array:
        """An array of the library, whatever its device and dtype, on this device and in this native dtype."""

    def bring(self, value: Array, dtype: np.dtype[Any]) -> Array:
        """`value`, an array of any library, in this dtype and as `scatter` takes it: of this library, on this device.

        A backend whose `scatter` sends several leaves at once takes NumPy arrays there as well, and keeps them here.
        """
        if library_of(value) == self.library:
            return self.move(value, self.native_dtype(dtype))
        return self.from_numpy(to_numpy(value).astype(dtype, copy=False))

    def array(self, buffer: Buffer) -> Array:
        """The live array of a buffer, as users may have it."""
        return buffer

    def views(self, rows: Rows) -> bool:
        """Whether these rows of a buffer can be had without a copy."""
        return self.has_views and isinstance(rows, (int, range))

    def writable(self, array: Array) -> bool:
        """Whether `array` is one of this library, on this device, that can be written to."""
        return self.mutable and library_of(array) == self.library

    def free_memory(self) -> int | None:
        """The bytes that can still be allocated on the device, or None if that cannot be told."""
        return host_memory()

    def __repr__(self) -> str:
        return f"<anystore backend {self.name} on {self.device}>"

    def __reduce__(self) -> Any:
        from anystore.backends import select_backend

        return select_backend, (self.name, self.device)

    # What replay needs besides ----------------------------------------------------------------------------------------

    @property
    def index_dtype(self) -> np.dtype[Any]:
        """What places and numbers are counted in: int64, or int32 where the library has none."""
        return self._widest("int64", "int32")

    @property
    def float_dtype(self) -> np.dtype[Any]:
        """What chances are computed in: float64, or float32 where the library has none."""
        return self._widest("float64", "float32")

    def _widest(self, wide: str, narrow: str) -> np.dtype[Any]:
        try:
            self.native_dtype(np.dtype(wide))
        except ValueError:
            return np.dtype(narrow)
        return np.dtype(wide)

    def as_index(self, integers: NDArray[Any]) -> Array:
        """Integers from main memory as an array of the library, in `index_dtype`."""
        return self.from_numpy(integers.astype(self.index_dtype, copy=False))

    def own(self, value: Array, dtype: np.dtype[Any]) -> Array:
        """`value`, an array of any library, as one of this library: as `bring`, and also what that keeps in NumPy."""
        brought = self.bring(value, dtype)
        return self.from_numpy(brought) if isinstance(brought, np.ndarray) else brought

    def random(self, seed: int | None = None) -> Random:
        """A generator of random arrays of the library, on the device.

        Parameters
        ----------
        seed : int or None
            The same one gives the same draws; None stands for one that the system chooses.

        Raises
        ------
        TypeError, ValueError
            If the seed is not an integer, or is negative.
        """
        return HostRandom(self, seed)

    def as_rows(self, array: Array) -> Rows:
        """Rows in an array of the library, known to be inside the buffers, as the other methods take them."""
        return np.ascontiguousarray(to_numpy(array), np.intp)

    def inside(self, array: Array, length: int) -> bool:
        """Whether each integer of a flat array is at least 0 and below `length`; on a device, this waits for it."""
        return bool(self.xp.all((array >= 0) & (array < length)))

    def bounds(self, array: Array) -> tuple[float, float]:
        """The least and the greatest of the floats in an array, NaN if one is; on a device, this waits for it."""
        return float(self.xp.min(array)), float(self.xp.max(array))

    def count_nonzero(self, mask: Array) -> int:
        """How many of a mask are set; on a device, this waits for it."""
        return int(self.xp.count_nonzero(mask))

    def flatnonzero(self, mask: Array) -> Array:
        """The positions where a flat mask is set; on a device, this waits for it.

        A library that compiles for every shape repeats the last one, so that there are but a few shapes.
        """
        positions: Array = self.xp.nonzero(mask)[0]
        return positions

    def put(self, array: Array, places: Array, values: Array) -> Array:
        """`array` with `values` at these places along its first axis; it may be changed in place."""
        self.scatter([array], self.as_rows(places), [values])
        return array

    @property
    def books_elsewhere(self) -> bool:
        """Whether `bookkeeping` is another backend, NumPy's in main memory, where small operations cost a tenth."""
        return False

    @property
    def bookkeeping(self) -> Backend:
        """What to compute places, chances and priorities with: this one, or NumPy's if `books_elsewhere`."""
        if not self.books_elsewhere:
            return self
        from anystore.backends import select_backend

        return select_backend("numpy")

    def bookkeeping_random(self, seed: int | None = None) -> Random:
        """A generator of this library's, as `random` gives one, of arrays of `bookkeeping`."""
        books = self.bookkeeping
        return self.random(seed) if books.library == self.library else BookkeepingRandom(self, seed)

    def to_bookkeeping(self, array: Array) -> Array:
        """An array of this library as one of `bookkeeping`; it may share its memory."""
        return to_numpy(array) if self.books_elsewhere else array

    def from_bookkeeping(self, arrays: Sequence[Array]) -> list[Array]:
        """Arrays of `bookkeeping` as such of this library, in dtypes that it has; they may share memory."""
        return list(map(self.from_numpy, arrays)) if self.books_elsewhere else list(arrays)

    def gather_for_bookkeeping(self, buffers: Sequence[Buffer], rows: Rows) -> list[Array]:
        """The rows of every buffer in arrays of `bookkeeping`, in memory of their own."""
        return [self.to_bookkeeping(leaf) for leaf in self.gather(buffers, rows, True)]

    def leaves_from_bookkeeping(self, leaves: Sequence[Array]) -> list[Array]:
        """Leaves in arrays of `bookkeeping`, which nobody writes to any more, as such of this library."""
        return self.from_bookkeeping(leaves)

    def here(self) -> AbstractContextManager[object]:
        """In which the current device is that of the arrays; the current stream stays that of the thread."""
        return _no_stream

    def stream(self) -> AbstractContextManager[object]:
        """What another thread enters, once, to work on the stream that is current in this one."""
        return _no_stream


_no_stream = contextlib.nullcontext()


def no_dtype(library: str, dtype: np.dtype[Any], remedy: str = "choose another dtype or another backend") -> ValueError:
    """The error for a dtype that a library lacks."""
    return ValueError(f"{library} has no {dtype}; {remedy}")


@functools.lru_cache(maxsize=256)
def parse_device(device: str) -> tuple[str, int | None]:
    """The kind and the number of a device as the user spelled it: "cuda:1", "gpu", "cpu".

    Raises
    ------
    ValueError
        If it is spelled in another way.
    """
    match = re.fullmatch(r"([a-z_]+)(?::(\d+))?", device.strip().lower())
    if match is None:
        raise ValueError(f"expected a device such as 'cpu', 'cuda' or 'cuda:1', found {device!r}")
    kind = "cuda" if match[1] == "gpu" else match[1]
    return kind, None if match[2] is None else int(match[2])


def is_disk(device: str) -> bool:
    """Whether a device is a directory on a disk, such as "disk:/scratch"."""
    return device.partition(":")[0].strip().lower() == "disk"


def spell_device(kind: str, number: int) -> str:
    """The one spelling of a device."""
    kind = "cuda" if kind == "gpu" else kind
    return "cpu" if (kind, number) == ("cpu", 0) else f"{kind}:{number}"


def resolve_device(device: str, devices: Sequence[str], library: str) -> str:
    """The one of `devices` that the user means by `device`; the first of its kind if no number is given.

    Raises
    ------
    ValueError
        If there is no such device; the message lists those that there are.
    """
    if device in devices:
        return device
    try:
        kind, number = parse_device(device)
    except ValueError as error:
        raise ValueError(f"{error}; {library} has: {', '.join(devices) or 'none'}") from None
    if number is None:
        found = [name for name in devices if parse_device(name)[0] == kind]
    else:
        found = [name for name in devices if name == spell_device(kind, number)]
    if not found:
        raise ValueError(f"{library} has no device {device!r} here; there are: {', '.join(devices) or 'none'}")
    return found[0]


def host_memory() -> int | None:
    """The bytes of main memory that are free or can be freed, or None if the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def free_disk(directory: str | os.PathLike[str]) -> int:
    """The bytes that may still be written below a directory."""
    disk = os.statvfs(directory)
    return disk.f_bavail * disk.f_frsize

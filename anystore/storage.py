"""Storage: a spec, a capacity, and one buffer for each leaf of the spec."""

from __future__ import annotations

import dataclasses
import os
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from anystore.backends import Backend, select_backend
from anystore.convert import to_numpy
from anystore.moves import leading_shape
from anystore.nests import Nest, example_spec, label
from anystore.plan import Plan
from anystore.rows import Rows, find_rows
from anystore.specs import as_count
from anystore.values import CASTINGS, Casting, admit

if TYPE_CHECKING:
    from pathlib import Path

    from anystore.mapped import Mapped
    from anystore.snapshot.changes import Changes


class Storage:
    """A fixed number of rows for nested items, one buffer per leaf, in the array library and on the device named.

    Parameters
    ----------
    data_spec : nest of specs
        What an item looks like: dicts, lists, tuples, namedtuples, dataclasses and attrs classes in any depth, with
        an `ArraySpec` at each leaf, or the spec of another library, or a Gymnasium space.
    capacity : int
        The number of rows.
    backend : str, module, array or Backend, default "numpy"
        The array library; see `select_backend`.
    device : str or device object, optional
        Where the buffers live; see `select_backend`.
    casting : {"no", "equiv", "safe", "same_kind", "unsafe"}, default "same_kind"
        Which dtypes `set` converts to that of the spec, in NumPy's words and by its rules.
    directory : path, optional
        Where to keep the buffers in memory-mapped files, on the backend "numpy" alone. They are made if they are not
        there, and else opened, with nothing to read. On ``/dev/shm`` they are memory that processes share.
    mode : {"r+", "r"}, default "r+"
        Whether such files can be written to. Those who read see what others write, at once.

    Raises
    ------
    SnapshotError
        If there is something else in the directory, or a storage of another spec or capacity, or a damaged one.
    ValueError
        If a leaf is not a spec, or of a dtype that the library lacks (with its path); if the capacity is not positive;
        if there is no such backend or device.
    ImportError
        If the library is not installed.
    MemoryError
        If the buffers cannot be allocated.

    Warns
    -----
    RuntimeWarning
        If the buffers are larger than the memory that is free.

    Notes
    -----
    An index is an int, a slice, integers (a list, a range, an array of any library, in any number of dimensions), a
    mask of the capacity's length, or ``...``. It means the same on every backend: negative rows count from the end, a
    row out of range is an IndexError, and of several values for one row the last one stays.

    Rows that were never written hold zeros. On the CPU their memory is not committed (JAX commits it).

    Any number of threads may read at once. Writing, resizing, saving and unpickling need a lock of the caller's own
    against writing, and writing and resizing one against reading. So do the processes that share a memory-mapped
    storage: a reader without a lock may find a row half written.

    The files of a memory-mapped storage take room on the disk as rows are written, and a process that writes a row when
    the disk is full is ended by the system (SIGBUS). After the machine has stopped, what was not flushed may be there
    in part, whereas a snapshot (`save`) is whole. Others who have it open see it in its old size after a `resize`, and
    what they write then is lost, until they open it anew; `flush` tells them. A copy or a pickle of it is in memory,
    all of it; another process opens the directory instead. A value that is a view of the same files, opened once more,
    is not seen to be one: copy it before it is set to other rows.

    The storage began as a reimplementation of ``tf_agents.utils.numpy_storage.NumpyStorage``.

    Examples
    --------
    >>> import numpy as np
    >>> from anystore import ArraySpec, Storage
    >>> store = Storage({"obs": ArraySpec((4,), "float32"), "reward": ArraySpec((), "float32")}, capacity=100)
    >>> store.set(7, {"obs": np.ones(4, np.float32), "reward": 0.5})
    >>> store.get([7, 7, 8])["reward"]
    array([0.5, 0.5, 0. ], dtype=float32)
    """

    _nest_class: ClassVar[type[Nest]] = Nest

    def __init__(
        self,
        data_spec: Any,
        capacity: int,
        *,
        backend: Any = "numpy",
        device: Any = None,
        casting: Casting = "same_kind",
        directory: str | os.PathLike[str] | None = None,
        mode: Literal["r+", "r"] = "r+",
    ) -> None:
        if casting not in CASTINGS:
            raise ValueError(f"expected a casting among {', '.join(CASTINGS)}, found {casting!r}")
        if directory is None and mode != "r+":
            raise ValueError(f"mode= is for memory-mapped files, found {mode!r} without directory=")
        self._attach(data_spec, as_count("capacity", capacity), select_backend(backend, device), casting)
        self._buffers = self._allocate(self._capacity) if directory is None else self._map(directory, mode)

    @classmethod
    def like(cls, item: Any, capacity: int, **options: Any) -> Storage:
        """A storage for items like `item`, a nest of arrays of any library and Python numbers.

        Parameters
        ----------
        item : nest of arrays and numbers
            An example; it is not stored.
        capacity : int
            The number of rows.
        **options
            Those of the class.
        """
        return cls(example_spec(item), capacity, **options)

    @classmethod
    def open(cls, directory: str | os.PathLike[str], *, mode: Literal["r+", "r"] = "r+") -> Storage:
        """The memory-mapped storage in a directory, of the spec and capacity that it was made with.

        Classes of the user's own in the spec come back as `load` gives them.

        Parameters
        ----------
        directory : path
            Where it is.
        mode : {"r+", "r"}, default "r+"
            Whether it can be written to.

        Raises
        ------
        SnapshotError
            If there is none, or a file of it is damaged or missing.
        """
        from anystore.mapped import ITEMS, mapped_manifest
        from anystore.snapshot import SnapshotError

        manifest = mapped_manifest(directory)
        while True:
            entry = manifest.storages[ITEMS]
            try:
                return cls(entry.nest.data_spec, entry.capacity, casting=entry.casting, directory=directory, mode=mode)
            except SnapshotError:
                before, manifest = manifest.id, mapped_manifest(directory)
                if manifest.id == before:  # and else another has resized it meanwhile
                    raise

    def _attach(
        self, data_spec: Any, capacity: int, backend: Backend, casting: Casting, dtypes: list[Any] | None = None
    ) -> None:
        """Everything but the buffers; `dtypes` are the library's own, where they are known."""
        self._nest = self._nest_class(data_spec)
        self._capacity = capacity
        self._backend = backend
        self._casting = casting
        self._dtypes = self._native_dtypes() if dtypes is None else dtypes
        self._mapped: Mapped | None = None
        self._changes: Changes | None = None
        self._lent = _Lent()
        self._selections: weakref.WeakSet[Storage] = weakref.WeakSet()
        self._selected_from: tuple[Storage, list[int]] | None = None

    def _native_dtypes(self) -> list[Any]:
        found = []
        for path, spec in zip(self._nest.paths, self._nest.specs):
            try:
                found.append(self._backend.native_dtype(spec.dtype))
            except ValueError as error:
                raise ValueError(f"{label(path)}: {error}") from None
        return found

    def _map(self, directory: str | os.PathLike[str], mode: str) -> list[Any]:
        name, device = self._backend.name, self._backend.device
        if (name, device) != ("numpy", "cpu"):
            raise ValueError(f"a storage with a directory is of 'numpy' on 'cpu', not of {name!r} on {device!r}")
        from anystore.mapped import Mapped
        from anystore.snapshot.writer import storage_entry

        self._mapped = Mapped(directory, mode, storage_entry(self), self._nest)
        self._lent.ever = True  # to other processes, whose writes are seen here too
        return self._backend.together(self._mapped.buffers)

    def _allocate(self, capacity: int) -> list[Any]:
        needed, free = self._plan(capacity).nbytes, self._backend.free_memory()
        if free is not None and needed > free:
            warnings.warn(
                f"this storage takes {needed:,} bytes when it is full; {free:,} bytes are free on {self.device}",
                RuntimeWarning,
                stacklevel=3,
            )
        buffers = []
        for path, spec in zip(self._nest.paths, self._nest.specs):
            try:
                buffers.append(self._backend.allocate((capacity, *spec.shape), spec.dtype))
            except Exception as error:
                needed = capacity * spec.nbytes
                raise MemoryError(
                    f"{label(path)}: {needed:,} bytes cannot be allocated on {self.device}: {error}"
                ) from error
        return self._backend.together(buffers)

    def get(self, idx: Any, *, copy: bool | None = True, out: Any = None) -> Any:
        """The items at `idx`.

        Parameters
        ----------
        idx : index
            Which rows.
        copy : bool or None, default True
            True: what is returned shares no memory with the storage. False: live views of the buffers. None: views
            where they can be had. (As in the array API standard.)
        out : nest of arrays, optional
            Arrays of the storage's library and device to fill and return; they must not overlap the storage's own.

        Returns
        -------
        nest of arrays
            Of the types of the spec. Each leaf has the index's axes in front: none for an int, one for a slice or a
            mask, those of the array for an array of integers.

        Raises
        ------
        IndexError, TypeError
            For an index that is out of range, or not an index.
        ValueError
            If `copy` is False and views cannot be had (an array of rows; a library of immutable arrays), if `out`
            does not fit, or for a slice of step 0.
        """
        rows = find_rows(idx, self._capacity, self._backend)
        if out is not None:
            return self._get_into(rows, out, copy)
        if copy is not True:
            has_views = self._backend.views(rows)
            if copy is False and not has_views:
                raise ValueError(f"{_no_view(self._backend, rows)}; pass copy=None or copy=True")
            if has_views:
                self._lent.ever = True
        return self._nest.pack(self._backend.gather(self._buffers, rows, copy))

    def _get_for_bookkeeping(self, idx: Any) -> Any:
        """What `get` returns, in arrays of the backend's `bookkeeping`."""
        rows = find_rows(idx, self._capacity, self._backend)
        return self._nest.pack(self._backend.gather_for_bookkeeping(self._buffers, rows))

    def set(self, table_idx: Any, value: Any) -> None:
        """Write `value` to the rows at `table_idx`, whole or not at all.

        Parameters
        ----------
        table_idx : index
            Which rows. If a row is there more than once, the last of its values stays.
        value : nest
            An item or a batch: a nest like the spec, with arrays of any library on any device, Python numbers, or
            lists of these. A leaf has the index's axes in front; one of exactly its spec's shape goes to all rows.
            It is copied, and may be changed once `set` has returned.

        Raises
        ------
        IndexError, TypeError
            For an index that is out of range, or not an index.
        ValueError
            For a structure or a shape that does not fit, with the paths of the leaves; for a slice of step 0; for a
            storage of files that was opened with mode "r".
        TypeError
            For a dtype that the storage's casting refuses.
        OverflowError
            For a Python int that does not fit its dtype.
        """
        rows = find_rows(table_idx, self._capacity, self._backend)
        leaves = self._nest.flatten(value)
        if self._changes is not None:  # and before the write, which may change the rows if they are a view
            self._changes.note(rows)
        if not self._backend.scatter_as_is(self._buffers, rows, leaves):
            self._backend.scatter(self._buffers, rows, self._admit(leaves, leading_shape(rows)))

    def admit(self, value: Any, lead: tuple[int, ...] = ()) -> Any:
        """`value` as `set` would write it, every leaf checked and converted, but not written.

        Parameters
        ----------
        value : nest
            As `set` takes it.
        lead : tuple of int
            The axes that a batch has in front; none for an item.

        Returns
        -------
        nest of arrays
            Of the storage's library, or NumPy arrays that `set` takes as they are, all with the axes of the batch. They
            may share memory with `value`, and rows with each other.

        Raises
        ------
        ValueError, TypeError, OverflowError
            As `set`.
        """
        leaves = self._admit(self._nest.flatten(value), lead)
        return self._nest.pack([self._spread(leaf, lead + spec.shape) for leaf, spec in zip(leaves, self._nest.specs)])

    def _spread(self, leaf: Any, shape: tuple[int, ...]) -> Any:
        if tuple(leaf.shape) == shape:
            return leaf
        return (np if isinstance(leaf, np.ndarray) else self._backend.xp).broadcast_to(leaf, shape)

    def _admit(self, leaves: list[Any], lead: tuple[int, ...]) -> list[Any]:
        """The leaves as `scatter` takes them, if each fits its spec."""
        return admit(leaves, self._nest.specs, self._nest.paths, lead, self._casting, self._backend)

    def _get_into(self, rows: Rows, out: Any, copy: bool | None) -> Any:
        if copy is False:
            raise ValueError("out= is filled with a copy; pass copy=True or copy=None with it")
        if not self._backend.mutable:
            library = self._backend.library
            raise ValueError(f"arrays of {library} cannot be written to, so out= is not taken; use what get returns")
        arrays, lead = self._nest.flatten(out), leading_shape(rows)
        for path, array, spec, dtype in zip(self._nest.paths, arrays, self._nest.specs, self._dtypes):
            shape = lead + spec.shape
            if not self._backend.writable(array):
                expected = f"an array of {self._backend.library} on {self.device} that can be written to"
                found = f"a {type(array).__name__}" + (f" on {array.device}" if hasattr(array, "device") else "")
                raise ValueError(
                    f"{label(path)}: expected {expected} in out=, found {found}; a read-only array, and a tensor that "
                    "requires gradients, cannot be filled"
                )
            if array.shape != shape:
                raise ValueError(f"{label(path)}: expected shape {shape} in out=, found {tuple(array.shape)}")
            if array.dtype != dtype:
                raise ValueError(f"{label(path)}: expected {spec.dtype} in out=, found {array.dtype}")
        self._backend.gather_into(self._buffers, rows, arrays)
        return out

    @property
    def data_spec(self) -> Any:
        """The nest of `ArraySpec` that items are instances of, in containers of its own."""
        return self._nest.pack(self._nest.specs)

    @property
    def capacity(self) -> int:
        """The number of rows."""
        return self._capacity

    @property
    def backend(self) -> Backend:
        """The array library and device, to share with other storages."""
        return self._backend

    @property
    def device(self) -> str:
        """Where the buffers live: "cpu", "cuda:0", ..."""
        return self._backend.device

    @property
    def casting(self) -> Casting:
        """Which dtypes `set` converts."""
        return self._casting

    @property
    def nbytes(self) -> int:
        """The bytes of all buffers."""
        return self._plan(self._capacity).nbytes

    @property
    def buffers(self) -> Any:
        """The nest of the live buffers: each leaf has an axis of `capacity` in front.

        Writing to them writes to the storage. On JAX they cannot be written to and live until the next `set`.
        """
        self._lent.ever = True
        return self._nest.pack([self._backend.array(buffer) for buffer in self._buffers])

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        keep: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Save to the directory `path`, all or nothing: until all of it is on the disk, what was there stays.

        Saved again to the same path, a storage writes the rows that were `set` since it was last saved there or
        loaded from there. Where its buffers may have been written to without `set`, it is saved whole: once
        `buffers`, or a live view by ``get(..., copy=False)`` or ``copy=None``, was handed out, and after `resize`. So
        is a selection.

        Parameters
        ----------
        path : path
            A directory of the snapshot's own, for no other files; it is made, with those above it, if it is not there.
        keep : int, default 0
            How many of the older versions there stay loadable.
        progress : callable, optional
            Called with the bytes that are done and the bytes in total. Without one there is a bar on the standard error
            past a second, if that is a terminal and rich is installed.

        Raises
        ------
        SnapshotError
            If another process or thread is writing there, or the directory holds something else, or a snapshot that
            is damaged or of a newer format.
        ValueError
            If the spec has a key or a dtype that cannot be written down.
        OSError
            If the disk is full or fails.

        Notes
        -----
        No more than 64 MiB are taken beyond the storage itself, unless a single row is larger than 4 MiB, and a byte
        for each row from then on, committed as rows are written. No other thread may write meanwhile.

        See Also
        --------
        load
        """
        from anystore.snapshot import save_snapshot

        save_snapshot(path, {"items": self}, keep=keep, progress=progress)

    def _position(self, path: str) -> int:
        """Where the leaf at a path is among the buffers."""
        return self._nest.paths.index(path)

    def _track(self, changes: Changes | None) -> None:
        """Have the rows noted that are written from now on, here and through selections."""
        if self._selected_from is None:
            self._changes = changes
            for selection in self._selections:
                selection._changes = changes

    def _noted_since(self, snapshot: str, name: str) -> Changes | None:
        """The rows written since it was `name` in that version of a snapshot; None if some may not have been noted."""
        changes = self._changes
        if changes is None or (changes.snapshot, changes.name) != (snapshot, name):
            return None
        return None if self._lent.ever and self._backend.has_views else changes

    @property
    def directory(self) -> Path | None:
        """Where the files of the buffers are, of a memory-mapped storage."""
        return None if self._mapped is None else self._mapped.directory

    def flush(self) -> None:
        """Wait until what was written to a memory-mapped storage is on the disk; does nothing for one in memory.

        Other processes see what was written without it.

        Raises
        ------
        SnapshotError
            If another process has resized it, so that what was written here is lost; open it anew.
        OSError
            If the disk is full or fails.
        """
        if self._mapped is not None:
            self._mapped.flush()

    def __len__(self) -> int:
        return self._capacity

    def __repr__(self) -> str:
        selected = "" if self._selected_from is None else ", selected"
        where = f"backend={self._backend.name!r}, device={self.device!r}"
        if self._mapped is not None:
            where += f", directory={str(self._mapped.directory)!r}, mode={self._mapped.mode!r}"
        head = f"Storage(capacity={self._capacity}, {where}{selected})"
        return f"{head}\n{self._plan(self._capacity)}"

    def select(self, *paths: str) -> Storage:
        """A storage over part of the spec that shares this one's buffers.

        Parameters
        ----------
        *paths : str
            The path of a leaf or subtree ("obs/image"). For one path the items are that part itself; for several,
            dicts with the paths as keys.

        Returns
        -------
        Storage
            With the same contract for those leaves alone. It follows when this storage is resized. A copy or pickle
            of it has buffers of its own.

        Raises
        ------
        ValueError
            If a path is not in the spec, or a leaf would be selected twice.
        """
        if not all(isinstance(path, str) for path in paths):
            raise ValueError(f"expected paths such as 'obs/image', found {', '.join(map(repr, paths))}")
        data_spec, positions = self._nest.select(paths)
        root, within = self._selected_from or (self, list(range(len(self._buffers))))
        selection = Storage.__new__(Storage)
        dtypes = [self._dtypes[position] for position in positions]
        selection._attach(data_spec, self._capacity, self._backend, self._casting, dtypes)
        selection._buffers = self._backend.together([self._buffers[position] for position in positions])
        selection._changes, selection._lent, selection._mapped = self._changes, self._lent, self._mapped
        selection._selected_from = root, [within[position] for position in positions]
        root._selections.add(selection)
        return selection

    def resize(self, capacity: int) -> None:
        """Change the number of rows, in place; rows below both the old and the new capacity keep their items.

        Old and new buffers are there together for a while, and the memory of the rows that are kept is committed. Views
        that were taken before see the old buffers.

        Raises
        ------
        ValueError
            If the capacity is not positive, or this storage is a selection: resize the one it was selected from; if it
            is memory-mapped for reading.
        MemoryError
            If the buffers cannot be allocated; the storage stays as it was.
        SnapshotError
            If another process has resized a memory-mapped storage, or is about to.
        OSError
            If there is no room for its new files on the disk; it stays as it was.
        """
        if self._selected_from is not None:
            raise ValueError("a selection has the capacity of the storage it was selected from; resize that one")
        capacity = as_count("capacity", capacity)
        kept = range(min(capacity, self._capacity))
        if self._mapped is None:
            buffers = self._allocate(capacity)
            self._backend.scatter(buffers, kept, self._backend.gather(self._buffers, kept, None))
            self._switch(buffers, capacity)
            return
        from anystore.snapshot.writer import storage_entry, used_rows

        self._mapped.check_resizable()
        entry = dataclasses.replace(storage_entry(self), capacity=capacity)
        kept = kept[: used_rows(self)]
        try:
            with self._mapped.replaced(entry, len(kept)) as new:
                self._backend.scatter(new, kept, self._backend.gather(self._buffers, kept, None))
        finally:
            self._follow(self._mapped)

    def _follow(self, mapped: Mapped) -> None:
        """Go on with whichever files are there; after an interrupt once more, which only does the same again."""
        try:
            self._switch(self._backend.together(mapped.buffers), mapped.capacity)
        except BaseException:
            self._switch(self._backend.together(mapped.buffers), mapped.capacity)
            raise

    def _switch(self, buffers: list[Any], capacity: int) -> None:
        """Have other buffers, for so many rows."""
        self._track(None)
        self._lent = _Lent(self._mapped is not None)
        try:
            self._hold(buffers, capacity)
        except BaseException:  # an interrupt, after which selections must not go on with buffers of their own
            self._hold(buffers, capacity)
            raise

    def _hold(self, buffers: list[Any], capacity: int) -> None:
        """Have these buffers, of so many rows, and the selections theirs of them."""
        # In one statement: an interrupt between the two would leave rows that are in no buffer.
        self._buffers, self._capacity = buffers, capacity
        for selection in self._selections:
            _, positions = selection._selected_from  # type: ignore[misc]
            own = self._backend.together([buffers[position] for position in positions])
            selection._buffers, selection._capacity, selection._lent = own, capacity, self._lent

    def _plan(self, capacity: int) -> Plan:
        return Plan(capacity, self._nest.leaves)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "data_spec": self.data_spec,
            "capacity": self._capacity,
            "backend": self._backend,
            "casting": self._casting,
            "buffers": [to_numpy(self._backend.array(buffer)) for buffer in self._buffers],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        Storage.__init__(
            self, state["data_spec"], state["capacity"], backend=state["backend"], casting=state["casting"]
        )
        # Arrays come out of a pickle in the byte order of the machine.
        arrays = [array.astype(spec.dtype, copy=False) for array, spec in zip(state["buffers"], self._nest.specs)]
        self._backend.scatter(self._buffers, range(self._capacity), [self._backend.from_numpy(each) for each in arrays])


class _Lent:
    """Whether buffers, or what may be views of them, were ever handed out: a storage and its selections share it."""

    __slots__ = ("ever",)

    def __init__(self, ever: bool = False) -> None:
        self.ever = ever


def _no_view(backend: Backend, rows: Rows) -> str:
    if not backend.has_views:
        return f"{backend.name} has no views of its arrays, so copy=False cannot be had"
    if isinstance(rows, np.ndarray):
        return "an array of rows is always a copy, so copy=False cannot be had"
    return f"{backend.name} has no view of these rows, so copy=False cannot be had"

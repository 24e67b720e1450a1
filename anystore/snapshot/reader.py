"""Loading: the manifest and the files are checked before anything is allocated for them, then read in pieces."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anystore.nests import Nest, label
from anystore.snapshot.changes import Changes
from anystore.snapshot.files import SnapshotError, gone
from anystore.snapshot.manifest import (
    MANIFEST,
    File,
    Layer,
    Manifest,
    StorageEntry,
    kept_name,
    kept_versions,
    read_manifest,
)
from anystore.snapshot.npy import THREADS, NpyFile
from anystore.snapshot.progress import Callback, Progress
from anystore.snapshot.threads import Threads

if TYPE_CHECKING:
    from anystore.storage import Storage


_TRIES = 20
"""How often a load begins anew because a save has taken its files away."""
_INDEX = np.dtype(np.int64)
Moved = Callable[[NDArray[np.intp]], NDArray[np.intp]]
"""Gives the row that each saved row is to be in, and -1 for those that are to go."""


def load(
    path: str | os.PathLike[str],
    *,
    backend: Any = None,
    device: Any = None,
    capacity: int | None = None,
    like: Any = None,
    sampler: Any = None,
    version: int | None = None,
    progress: Callback | None = None,
) -> Any:
    """What was saved at `path`: a storage or a replay buffer, in memory of its own.

    Parameters
    ----------
    path : path
        The directory of a snapshot, or of a memory-mapped storage.
    backend, device : optional
        Where the buffers are to live; see `select_backend`. By default those of `like`, if that has some, or else
        NumPy's.
    capacity : int, optional
        The number of rows; by default what it was. A replay buffer keeps its newest items. The rows of a storage have
        no order in time: as in `Storage.resize`, those below the new capacity are kept.
    like : Storage, ReplayBuffer or nest of specs, optional
        What items are expected to look like: leaves of the same paths, shapes and dtypes. The items come back in its
        containers. Without it, those of a class of the user's own (namedtuple, dataclass, attrs class) come back as
        namedtuples of the same name and fields, and those derived from dict, list and tuple as these, since nothing
        that a file names is imported.
    sampler : Sampler, optional
        For a replay buffer whose sampler is of a class of the user's own: a new one of that class, a copy of which then
        takes up the state, and with it the settings, of the one that was saved. Those that come with anystore come back
        as they were, and need none; one with other settings than can be changed is refused.
    version : int, optional
        An older version that was kept; by default the newest.
    progress : callable, optional
        Called with the bytes that are done and the bytes in total. Without one there is a bar on the standard error
        past a second, if that is a terminal and rich is installed.

    Returns
    -------
    Storage or ReplayBuffer

    Raises
    ------
    SnapshotError
        If there is no snapshot, if a file of it is damaged or missing (the message names it), if it is of a newer
        format, or does not fit `like` or `sampler`.
    ValueError, ImportError, MemoryError
        As `Storage` does, if there is no such backend, or it lacks a dtype or the memory; for a sampler where there is
        no replay buffer.

    Notes
    -----
    It may run while another process saves there; what is loaded is one version or the next, never parts of both.

    Environments that begin anew do not go on with the episodes of a replay buffer that is loaded: call its
    `end_episode` first, as the first `reset` of a `Recorder` does.
    """
    for _ in range(_TRIES):
        snapshot = Snapshot(path, version)
        try:
            if sampler is not None and snapshot.kind != "replay":
                raise ValueError(f"{path}: sampler= is for a replay buffer, and this is none")
            options: Any = {"backend": backend, "device": device, "capacity": capacity, "like": like}
            if snapshot.kind == "replay":
                return _replay_buffer(snapshot, sampler=copy.copy(sampler), progress=progress, **options)
            return snapshot.storage(progress=progress, **options)
        except FileNotFoundError as error:
            missing = error
            if Snapshot(path, version).id == snapshot.id:
                break
    raise gone(missing.filename)


def _replay_buffer(snapshot: Snapshot, **options: Any) -> Any:
    from anystore.replay.saved import load_buffer

    return load_buffer(snapshot, **options)


class Snapshot:
    """One version of a snapshot, its manifest read and checked.

    Parameters
    ----------
    path : path
        The directory.
    version : int, optional
        An older version that was kept; by default the newest.

    Attributes
    ----------
    kind : str
        "storage", "replay", or "mapped" for a memory-mapped storage.
    state : dict
        What it was saved with.

    Raises
    ------
    SnapshotError
        If there is none, or its manifest is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], version: int | None = None) -> None:
        self.path = Path(path)
        self.manifest = self._read(version)
        self.id = self.manifest.id
        self.kind = self.manifest.kind
        self.state = self.manifest.state

    def _read(self, version: int | None) -> Manifest:
        newest = read_manifest(self.path / MANIFEST)
        if version is None or version == newest.version:
            return newest
        kept = kept_versions(self.path, newest)
        if version not in kept:
            there = ", ".join(map(str, [newest.version, *kept]))
            raise SnapshotError(f"{self.path}: expected one of the versions {there}, found {version!r:.80}")
        return read_manifest(self.path / kept_name(version))

    @property
    def nbytes(self) -> int:
        """The bytes of all rows and arrays that are in its files."""
        return sum(file.nbytes for file in self.files())

    def files(self) -> Iterator[NpyFile]:
        """Every file that it names, but for its manifest."""
        for entry in self.manifest.storages.values():
            for layer in entry.layers:
                if layer.index is not None:
                    yield self._file(layer.index, (layer.count,), _INDEX)
                yield from self._leaves(entry, layer).values()
        yield from self._arrays().values()

    def _file(self, file: File, shape: tuple[int, ...], dtype: Any) -> NpyFile:
        return NpyFile(self.path / file.name, shape, dtype, file.crc32)

    def _leaves(self, entry: StorageEntry, layer: Layer) -> dict[str, NpyFile]:
        return {
            path: self._file(layer.leaves[path], (layer.count, *spec.shape), spec.dtype)
            for path, spec in entry.leaves.items()
        }

    def _arrays(self) -> dict[str, NpyFile]:
        entries = self.manifest.arrays.items()
        return {name: self._file(entry.file, entry.shape, entry.dtype) for name, entry in entries}

    def check(self) -> None:
        """Check that every file is there, of the right size and with the right header; no more of them is read.

        Raises
        ------
        SnapshotError, FileNotFoundError
            If one is not.
        """
        for file in self.files():
            file.check()

    def verify(self) -> None:
        """Read every file that has a checksum and compare it.

        Raises
        ------
        SnapshotError, FileNotFoundError
            For the first one that is damaged, with its name.
        """
        self.check()
        files = [file for file in self.files() if file.crc32 is not None]
        with Progress("verifying", sum(file.nbytes for file in files), None) as bar, Threads(THREADS) as threads:
            for file in files:
                for _, piece in file.pieces(threads):
                    bar.advance(piece.nbytes)
            for entry in self.manifest.storages.values():
                for layer in entry.layers:
                    if layer.index is not None:
                        index = self._file(layer.index, (layer.count,), _INDEX)
                        _check_rows(index, index.pieces(threads), entry.rows)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays that it was saved with.

        Raises
        ------
        SnapshotError, FileNotFoundError
            If one is damaged or missing, with the name of its file.
        """
        self.check()
        with Threads(THREADS) as threads:
            return {name: _whole(file, threads) for name, file in self._arrays().items()}

    def storage(
        self,
        name: str = "items",
        *,
        backend: Any = None,
        device: Any = None,
        capacity: int | None = None,
        like: Any = None,
        progress: Callback | None = None,
    ) -> Storage:
        """One of its storages.

        Parameters
        ----------
        name : str, default "items"
            Which one; a storage that was saved by itself is "items".
        backend, device, capacity, like, progress
            As in `load`.

        Raises
        ------
        SnapshotError, FileNotFoundError
            If a file is damaged or missing, or the storage is not there or does not fit `like`.
        """
        from anystore.storage import Storage

        entry = self.entry(name)
        options = {"backend": backend_of(like, backend), "device": device, "casting": entry.casting}
        nest = nest_of(like, entry.nest, self.path)
        self.check()
        storage = Storage(nest.data_spec, entry.capacity if capacity is None else capacity, **options)
        with Progress("loading", self.rows_nbytes(name), progress) as bar:
            self.fill(storage, name, bar=bar)
        return storage

    def entry(self, name: str) -> StorageEntry:
        """What the manifest says of one of its storages.

        Raises
        ------
        SnapshotError
            If it is not there.
        """
        entries = self.manifest.storages
        if name not in entries:
            there = ", ".join(sorted(entries)) or "none"
            raise SnapshotError(f"{self.path / MANIFEST}: expected a storage {name!r}, found {there}")
        return entries[name]

    def rows_nbytes(self, *names: str) -> int:
        """The bytes of all rows of these storages that are to be read."""
        entries = map(self.entry, names)
        return sum(layer.count * entry.row_nbytes for entry in entries for layer in entry.layers)

    def fill(self, storage: Storage, name: str, *, bar: Progress, moved: Moved | None = None) -> None:
        """Read the rows of one of its storages into `storage`, which was not written to yet.

        Parameters
        ----------
        storage : Storage
            Of any backend and capacity, with leaves of the same paths, shapes and dtypes.
        moved : callable, optional
            Takes an array of rows as they were saved, and gives the row of each in `storage`, -1 for those that are
            to go. By default those below its capacity stay where they were.
        bar : Progress
            Told of the bytes that were read.

        Raises
        ------
        SnapshotError, FileNotFoundError
            If a file is damaged or missing, or the storage is not there or does not fit.
        """
        entry = self.entry(name)
        fitting(entry.nest, storage._nest, self.path)
        with Threads(THREADS) as threads:
            for layer in entry.layers:
                rows_of = self._rows(entry, layer, threads)
                for path, file in self._leaves(entry, layer).items():
                    target = _Target(storage, path, moved)
                    place = target.place(layer)
                    for piece, values in file.pieces(threads, place):
                        if place is None:
                            target.put(rows_of(piece), values)
                        bar.advance(values.nbytes)
        if moved is None and storage.capacity == entry.capacity and self.kind != "mapped":
            storage._track(Changes(self.id, name, entry.capacity))

    def _rows(self, entry: StorageEntry, layer: Layer, threads: Threads) -> Callable[[range], Any]:
        """What gives the rows of a piece of a layer."""
        if layer.index is None:
            start = layer.start or 0
            return lambda piece: range(start + piece.start, start + piece.stop)
        index = self._file(layer.index, (layer.count,), _INDEX)
        _check_rows(index, index.pieces(threads), entry.rows)

        def rows_of(piece: range) -> NDArray[np.intp]:
            rows = index.read(piece).astype(np.intp)
            _check_rows(index, [(piece, rows)], entry.rows)  # again, since rows are trusted further down
            return rows

        return rows_of


class _Target:
    """A buffer of a storage that is being loaded."""

    def __init__(self, storage: Storage, path: str, moved: Moved | None) -> None:
        self._buffers = [storage._buffers[storage._position(path)]]
        self._backend = storage._backend
        self._capacity = storage.capacity
        self._moved = moved

    def place(self, layer: Layer) -> Callable[[range], NDArray[Any]] | None:
        """What gives the memory of the rows themselves, where values can be read straight into it."""
        (buffer,) = self._buffers
        start = layer.start
        if start is None or start + layer.count > self._capacity or self._moved is not None:
            return None
        if not isinstance(buffer, np.ndarray):
            return None
        return lambda piece: buffer[start + piece.start : start + piece.stop]

    def put(self, rows: Any, values: NDArray[Any]) -> None:
        """Write values to rows."""
        if self._moved is None and isinstance(rows, range):
            rows = rows[: max(self._capacity - rows.start, 0)]
            values = values[: len(rows)]
        else:
            rows, values = self._kept(np.asarray(rows, np.intp), values)
        if len(rows):
            self._backend.scatter(self._buffers, rows, [self._backend.from_numpy(values)])

    def _kept(self, rows: NDArray[np.intp], values: NDArray[Any]) -> tuple[NDArray[np.intp], NDArray[Any]]:
        """The rows as they are to be, and their values."""
        new = rows if self._moved is None else np.asarray(self._moved(rows), np.intp)
        kept = (new >= 0) & (new < self._capacity)
        return (new, values) if kept.all() else (new[kept], values[kept])


def _check_rows(file: NpyFile, pieces: Any, stop: int) -> None:
    """Check that rows are in ascending order and below `stop`."""
    last = -1
    for _, rows in pieces:
        if len(rows) and not (rows[0] > last and rows[-1] < stop and (rows[1:] > rows[:-1]).all()):
            raise SnapshotError(f"{file.path}: expected rows in ascending order below {stop}, found others")
        last = int(rows[-1]) if len(rows) else last


def _whole(file: NpyFile, threads: Threads) -> NDArray[Any]:
    array: NDArray[Any] = np.empty(file.shape, file.dtype)
    flat = array.reshape(1) if array.ndim == 0 else array
    for _ in file.pieces(threads, lambda rows: flat[rows.start : rows.stop]):
        pass
    return array


def nest_of(like: Any, there: Nest, path: Path) -> Nest:
    """The nest that items come back in, for the `like` of `load` and the nest that is there.

    Raises
    ------
    SnapshotError
        If the nest that is there has not the leaves that are expected.
    """
    if like is None:
        return there
    return fitting(there, Nest(like.data_spec if _is_store(like) else like), path)


def backend_of(like: Any, backend: Any) -> Any:
    """The backend, for the `like` and the `backend` of `load`."""
    if backend is not None:
        return backend
    return like.backend if _is_store(like) else "numpy"


def _is_store(like: Any) -> bool:
    from anystore.replay import ReplayBuffer
    from anystore.storage import Storage

    return isinstance(like, (Storage, ReplayBuffer))


def fitting(there: Nest, expected: Nest, path: Path) -> Nest:
    """The nest that is expected, if the one that is there has the same leaves.

    Raises
    ------
    SnapshotError
        If it has not; the message names every difference by its path.
    """
    found, wanted = there.leaves, expected.leaves
    differences = [f"{label(each)}: expected, but not in the snapshot" for each in wanted if each not in found]
    differences += [f"{label(each)}: in the snapshot, but not expected" for each in found if each not in wanted]
    differences += [
        f"{label(each)}: expected {spec}, found {found[each]}"
        for each, spec in wanted.items()
        if each in found and found[each] != spec
    ]
    if differences:
        raise SnapshotError("\n".join([f"{path}: the snapshot is not like what is expected", *differences]))
    return expected

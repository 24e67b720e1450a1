"""The buffers of a storage as memory-mapped files, in the format of a snapshot."""

from __future__ import annotations

import contextlib
import mmap
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anystore.nests import Nest
from anystore.snapshot import files
from anystore.snapshot.directory import commit, file_name, next_version, prepared, stage, sweep, undone_on_error
from anystore.snapshot.files import SnapshotError
from anystore.snapshot.manifest import MANIFEST, File, Layer, Manifest, StorageEntry, read_manifest
from anystore.snapshot.npy import NpyFile, header, stored_dtype
from anystore.snapshot.reader import fitting

MODES = ("r+", "r")
_ITEMS = "items"


class Mapped:
    """The files behind the buffers of a storage.

    Parameters
    ----------
    directory : path
        Where they are, or are to be made.
    mode : {"r+", "r"}
        Whether they can be written to. What is not there is made in mode "r+" only.
    entry : StorageEntry
        The spec and capacity that are expected, or that new files are to have.
    nest : Nest
        The same spec; the order of its leaves is that of the buffers.

    Attributes
    ----------
    buffers : list of arrays
        Those of the leaves, on the memory of the files.

    Raises
    ------
    SnapshotError
        If a file is damaged or missing, or what is there is no memory-mapped storage of this spec and capacity.
    """

    def __init__(self, directory: str | os.PathLike[str], mode: str, entry: StorageEntry, nest: Nest) -> None:
        if mode not in MODES:
            raise ValueError(f"expected a mode among {', '.join(MODES)}, found {mode!r}")
        self.directory = Path(directory).absolute()
        self.mode = mode
        self._nest = nest
        if mode == "r+" and not os.path.lexists(self.directory / MANIFEST):
            self._create(entry)
        self._entry = self._expected(entry)
        self._maps, self.buffers = self._open(self._entry)

    @property
    def capacity(self) -> int:
        """How many rows there are."""
        return self._entry.capacity

    def _create(self, entry: StorageEntry) -> None:
        """Make the files, all or nothing; if another process does at this moment, wait for it."""
        with prepared(self.directory, "mapped", wait=True) as old:
            if old is None:
                with undone_on_error(self.directory):
                    stage(self.directory, MANIFEST, self._draft(entry))
                commit(self.directory, MANIFEST)

    def _draft(self, entry: StorageEntry) -> Manifest:
        """A manifest, and the files that it names: sparse ones, which take room as rows are written."""
        version, taken = next_version(self.directory), set[str]()
        leaves = {path: File(file_name(version, [_ITEMS, path], taken), None) for path in entry.leaves}
        for path, file in leaves.items():
            spec = entry.leaves[path]
            lead = header((entry.capacity, *spec.shape), stored_dtype(spec.dtype))
            fd = files.create(self.directory / file.file)
            try:
                files.write(fd, lead)
                files.truncate(fd, len(lead) + entry.capacity * spec.nbytes)
                files.fsync(fd)
            finally:
                files.close(fd)
        layer = Layer(entry.capacity, 0, None, leaves)
        whole = StorageEntry(entry.capacity, entry.casting, entry.spec, entry.capacity, (layer,))
        return Manifest(uuid.uuid4().hex, version, "mapped", {_ITEMS: whole}, {}, {})

    def _expected(self, entry: StorageEntry) -> StorageEntry:
        """The storage that is there, if it is the one that is expected."""
        found = mapped_entry(self.directory)
        fitting(found.nest, self._nest, self.directory)
        if found.capacity != entry.capacity:
            raise SnapshotError(
                f"{self.directory}: expected a capacity of {entry.capacity}, found {found.capacity}; open it with that "
                "one, and resize it"
            )
        return found

    def _open(self, entry: StorageEntry) -> tuple[list[mmap.mmap], list[NDArray[Any]]]:
        """The memory of the files, and the buffers on it."""
        (layer,) = entry.layers
        leaves = [(layer.leaves[path].file, entry.leaves[path]) for path in self._nest.paths]
        found = [
            NpyFile(self.directory / name, (entry.capacity, *spec.shape), spec.dtype, None) for name, spec in leaves
        ]
        maps = [self._map(file) for file in found]
        return maps, [np.ndarray(file.shape, file.dtype, memory, file.offset) for file, memory in zip(found, maps)]

    def _map(self, file: NpyFile) -> mmap.mmap:
        try:
            file.check()
        except FileNotFoundError:
            raise files.gone(file.path) from None
        fd = os.open(file.path, (os.O_RDWR if self.mode == "r+" else os.O_RDONLY) | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            access = mmap.PROT_READ | (mmap.PROT_WRITE if self.mode == "r+" else 0)
            memory = mmap.mmap(fd, file.offset + file.nbytes, mmap.MAP_SHARED, access)
        finally:
            os.close(fd)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # file systems without huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
        return memory

    def flush(self) -> None:
        """Wait until what was written is on the disk.

        Raises
        ------
        SnapshotError
            If another has resized the storage, so that these are no longer its files.
        """
        self._check_that_none_resized_it()
        if self.mode == "r+":
            _sync(self._maps)

    def _check_that_none_resized_it(self) -> None:
        if mapped_entry(self.directory) != self._entry:
            raise SnapshotError(
                f"{self.directory}: another has resized this storage since it was opened here, and what was written "
                "here since then is lost; open it again"
            )

    @contextlib.contextmanager
    def replaced(self, entry: StorageEntry) -> Iterator[list[NDArray[Any]]]:
        """New buffers to be filled, which have taken the place of the old ones at the end.

        Raises
        ------
        ValueError
            In mode "r".
        SnapshotError
            If another has resized the storage.
        """
        if self.mode == "r":
            raise ValueError(f"{self.directory}: opened with mode='r', so it cannot be resized; open it with mode='r+'")
        with prepared(self.directory, "mapped", wait=True):
            self._check_that_none_resized_it()
            new: StorageEntry | None = None
            try:
                with undone_on_error(self.directory):
                    manifest = self._draft(entry)
                    maps, buffers = self._open(manifest.storages[_ITEMS])
                    yield buffers
                    _sync(maps)
                    stage(self.directory, MANIFEST, manifest)
                new = manifest.storages[_ITEMS]
                commit(self.directory, MANIFEST)
            finally:
                if new is not None and mapped_entry(self.directory) == new:
                    self._maps, self.buffers, self._entry = maps, buffers, new
            sweep(self.directory)


def _sync(maps: list[mmap.mmap]) -> None:
    """Wait until what was written to this memory is on the disk."""
    for memory in maps:
        memory.flush()


def mapped_entry(directory: str | os.PathLike[str]) -> StorageEntry:
    """What the manifest says of the memory-mapped storage in a directory.

    Raises
    ------
    SnapshotError
        If there is none.
    """
    path = Path(directory) / MANIFEST
    manifest = read_manifest(path)
    entry = manifest.storages.get(_ITEMS)
    if manifest.kind != "mapped":
        raise SnapshotError(
            f"{path}: expected a memory-mapped storage, found a snapshot of kind {manifest.kind}; load it with "
            "anystore.load"
        )
    if entry is None or len(entry.layers) != 1 or (entry.layers[0].start, entry.layers[0].count) != (0, entry.capacity):
        raise SnapshotError(f"{path}: expected a memory-mapped storage with all of its rows in one file for each leaf")
    return entry

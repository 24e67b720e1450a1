"""The buffers of a storage as memory-mapped files, in the format of a snapshot."""

from __future__ import annotations

import contextlib
import mmap
import os
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anystore.backends.base import free_disk
from anystore.nests import Nest
from anystore.snapshot import files
from anystore.snapshot.directory import commit, file_name, next_version, prepared, stage, sweep, undone_on_error
from anystore.snapshot.files import SnapshotError
from anystore.snapshot.manifest import MANIFEST, File, Layer, Manifest, StorageEntry, read_manifest
from anystore.snapshot.npy import NpyFile, header, stored_dtype
from anystore.snapshot.reader import fitting

MODES = ("r+", "r")
ITEMS = "items"
"""The name of the storage in the manifest."""


class _Opened(NamedTuple):
    """The files that one manifest names, and the memory that they are."""

    id: str
    entry: StorageEntry
    maps: list[mmap.mmap]
    buffers: list[NDArray[Any]]
    inodes: dict[Path, tuple[int, int]]


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

    Raises
    ------
    SnapshotError
        If a file is damaged or missing, or what is there is no memory-mapped storage of this spec and capacity.

    Warns
    -----
    RuntimeWarning
        If new files, once they are full, will not fit on the disk.
    """

    def __init__(self, directory: str | os.PathLike[str], mode: str, entry: StorageEntry, nest: Nest) -> None:
        if mode not in MODES:
            raise ValueError(f"expected a mode among {', '.join(MODES)}, found {mode!r}")
        self.directory = Path(directory).absolute()
        self.mode = mode
        self._nest = nest
        if mode == "r+" and not os.path.lexists(self.directory / MANIFEST):
            self._create(entry)
        self._opened = self._open(self._expected(entry))

    @property
    def capacity(self) -> int:
        """How many rows there are."""
        return self._opened.entry.capacity

    @property
    def buffers(self) -> list[NDArray[Any]]:
        """Those of the leaves, on the memory of the files."""
        return self._opened.buffers

    def _create(self, entry: StorageEntry) -> None:
        """Make the files, all or nothing; if another process does at this moment, wait for it."""
        with prepared(self.directory, "mapped", wait=True) as old:
            if old is None:
                self._warn_if_there_is_no_room(entry)
                with undone_on_error(self.directory):
                    stage(self.directory, MANIFEST, self._draft(entry))
                commit(self.directory, MANIFEST)

    def _warn_if_there_is_no_room(self, entry: StorageEntry) -> None:
        needed, free = entry.capacity * entry.row_nbytes, free_disk(self.directory)
        if needed > free:
            warnings.warn(
                f"this storage takes {needed:,} bytes when it is full; {free:,} bytes are free at {self.directory}, "
                "and a write that there is no room for ends the process",
                RuntimeWarning,
                stacklevel=6,
            )

    def _draft(self, entry: StorageEntry, rows: int = 0) -> Manifest:
        """A manifest, and the files that it names: sparse ones, which take room as rows are written.

        For the first so many rows there is room at once, or it is an `OSError`: to run out of it later, when memory is
        written to, ends the process.
        """
        version, taken = next_version(self.directory), dict[str, int]()
        leaves = {path: File(file_name(version, [ITEMS, path], taken), None) for path in entry.leaves}
        for path, file in leaves.items():
            spec = entry.leaves[path]
            lead = header((entry.capacity, *spec.shape), stored_dtype(spec.dtype))
            fd = files.create(self.directory / file.name)
            try:
                files.write(fd, lead)
                files.truncate(fd, len(lead) + entry.capacity * spec.nbytes)
                if rows * spec.nbytes:
                    files.allocate(fd, len(lead) + rows * spec.nbytes)
                files.fsync(fd)
            finally:
                files.close(fd)
        layer = Layer(entry.capacity, 0, None, leaves)
        whole = replace(entry, rows=entry.capacity, layers=(layer,))
        return Manifest(uuid.uuid4().hex, version, "mapped", {ITEMS: whole}, {}, {})

    def _expected(self, entry: StorageEntry) -> Manifest:
        """What is there, if it is the storage that is expected."""
        manifest = mapped_manifest(self.directory)
        found = manifest.storages[ITEMS]
        fitting(found.nest, self._nest, self.directory)
        if found.capacity != entry.capacity:
            raise SnapshotError(
                f"{self.directory}: expected a capacity of {entry.capacity}, found {found.capacity}; open it with that "
                "one, and resize it"
            )
        return manifest

    def _open(self, manifest: Manifest) -> _Opened:
        """The memory of the files, and the buffers on it."""
        entry, inodes = manifest.storages[ITEMS], dict[Path, tuple[int, int]]()
        (layer,) = entry.layers
        leaves = [(layer.leaves[path].name, entry.leaves[path]) for path in self._nest.paths]
        found = [
            NpyFile(self.directory / name, (entry.capacity, *spec.shape), spec.dtype, None) for name, spec in leaves
        ]
        maps = [self._map(file, inodes) for file in found]
        buffers = [np.ndarray(file.shape, file.dtype, memory, file.offset) for file, memory in zip(found, maps)]
        return _Opened(manifest.id, entry, maps, buffers, inodes)

    def _map(self, file: NpyFile, inodes: dict[Path, tuple[int, int]]) -> mmap.mmap:
        flags = os.O_RDWR if self.mode == "r+" else os.O_RDONLY
        try:
            file.check()
            fd = os.open(file.path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            raise files.gone(file.path) from None
        try:
            inodes[file.path] = _inode(fd)
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
            If another has resized or replaced the storage, so that these are no longer its files.
        """
        self._check_that_these_are_its_files()
        if self.mode == "r+":
            _sync(self._opened.maps)

    def _check_that_these_are_its_files(self) -> None:
        inodes = self._opened.inodes.items()
        is_same = mapped_manifest(self.directory).id == self._opened.id
        if not is_same or any(not os.path.lexists(path) or _inode(path) != inode for path, inode in inodes):
            lost = ", and what was written here since then is lost" if self.mode == "r+" else ""
            raise SnapshotError(
                f"{self.directory}: another has resized or replaced this storage since it was opened here{lost}; open "
                "it again"
            )

    def check_resizable(self) -> None:
        """See to it that the storage may be resized here, before anything is done for it.

        Raises
        ------
        ValueError
            In mode "r".
        SnapshotError
            If another has resized or replaced the storage.
        """
        if self.mode == "r":
            raise ValueError(f"{self.directory}: opened with mode='r', so it cannot be resized; open it with mode='r+'")
        self._check_that_these_are_its_files()

    @contextlib.contextmanager
    def replaced(self, entry: StorageEntry, rows: int) -> Iterator[list[NDArray[Any]]]:
        """New buffers, to be filled as far as so many rows, which have taken the place of the old ones at the end.

        Raises
        ------
        SnapshotError
            If another has resized or replaced the storage.
        OSError
            If there is no room for the rows.
        """
        with prepared(self.directory, "mapped", wait=True):
            self._check_that_these_are_its_files()
            new: _Opened | None = None
            try:
                with undone_on_error(self.directory):
                    manifest = self._draft(entry, rows)
                    opened = self._open(manifest)
                    yield opened.buffers
                    _sync(opened.maps)
                    stage(self.directory, MANIFEST, manifest)
                new = opened
                commit(self.directory, MANIFEST)
            finally:
                if new is not None:
                    self._follow(new)
            sweep(self.directory)

    def _follow(self, new: _Opened) -> None:
        """Go on with these files, if they are those of the storage by now."""

        def follow() -> None:
            if mapped_manifest(self.directory).id == new.id:
                self._opened = new

        try:
            follow()
        except BaseException:  # an interrupt, after which nothing may be written to files that are gone
            follow()
            raise


def _inode(file: int | Path) -> tuple[int, int]:
    found = os.stat(file)
    return found.st_dev, found.st_ino


def _sync(maps: list[mmap.mmap]) -> None:
    """Wait until what was written to this memory is on the disk."""
    for memory in maps:
        memory.flush()


def mapped_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """The manifest of the memory-mapped storage in a directory.

    Raises
    ------
    SnapshotError
        If there is none.
    """
    path = Path(directory) / MANIFEST
    manifest = read_manifest(path)
    entry = manifest.storages.get(ITEMS)
    if manifest.kind != "mapped":
        raise SnapshotError(
            f"{path}: expected a memory-mapped storage, found a snapshot of kind {manifest.kind}; load it with "
            "anystore.load"
        )
    if entry is None or len(entry.layers) != 1 or (entry.layers[0].start, entry.layers[0].count) != (0, entry.capacity):
        raise SnapshotError(f"{path}: expected a memory-mapped storage with all of its rows in one file for each leaf")
    return manifest

"""Saving: the rows that were written, or all of them, in new files beside the old ones."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anystore.snapshot.blocks import Blocks
from anystore.snapshot.changes import Changes
from anystore.snapshot.described import describe
from anystore.snapshot.directory import (
    commit,
    file_name,
    forget_old,
    keep_old,
    next_version,
    prepared,
    stage,
    sweep,
    undone_on_error,
)
from anystore.snapshot.manifest import MANIFEST, MANIFEST_BYTES, ArrayEntry, File, Layer, Manifest, StorageEntry
from anystore.snapshot.npy import ROWS, as_bytes, rows_at_a_time, write_npy
from anystore.snapshot.progress import Callback, Progress
from anystore.specs import as_count

if TYPE_CHECKING:
    from anystore.storage import Storage


_LAYERS = 64
_LAYERS_BYTES = MANIFEST_BYTES // 4
"""A storage that has so many layers, or to which the manifest gives so many bytes, is written whole."""


def save_snapshot(
    path: str | os.PathLike[str],
    storages: Mapping[str, Storage],
    *,
    kind: str = "storage",
    state: Mapping[str, Any] | None = None,
    arrays: Mapping[str, NDArray[Any]] | None = None,
    keep: int = 0,
    progress: Callback | None = None,
) -> None:
    """Save storages, and what belongs to them, as the newest version of the snapshot at `path`: all or nothing.

    Parameters
    ----------
    path : path
        A directory; it is made, with those above it, if it is not there.
    storages : dict of str to Storage
        Of one that was last saved to or loaded from the newest version at `path`, only the rows are written that
        were written since.
    kind : {"storage", "replay"}
        What `load` makes of it.
    state : dict, optional
        Anything that JSON can hold.
    arrays : dict of str to array, optional
        NumPy arrays, written in full each time.
    keep : int, default 0
        How many older versions stay loadable.
    progress : callable, optional
        Called with the bytes that are done and the bytes in total.

    Raises
    ------
    SnapshotError
        If another is writing there, or the directory holds something else, or a damaged or newer snapshot.
    ValueError
        If a dtype, a key or the state cannot be put into the manifest.
    OSError
        If the disk is full or fails; the old version is still there.
    """
    path = Path(path)
    keep = as_count("keep", keep, 0)
    _check_state(state)
    entries = {name: storage_entry(storage) for name, storage in storages.items()}
    with prepared(path, kind) as old:
        manifest = Manifest(uuid.uuid4().hex, next_version(path), kind, {}, {}, dict(state or {}))
        plans = {name: _plan(name, storages[name], entry, old) for name, entry in entries.items()}
        with undone_on_error(path):
            manifest = _with_files(manifest, path, storages, plans, arrays or {}, progress)
            changes = {name: Changes(manifest.id, name, storage.capacity) for name, storage in storages.items()}
            if keep:
                keep_old(path, old)
            stage(path, MANIFEST, manifest)
        commit(path, MANIFEST)
        forget_old(path, keep)
        for name, storage in storages.items():
            storage._track(changes[name])
        sweep(path)


def _check_state(state: Mapping[str, Any] | None) -> None:
    """Refuse a state that the manifest cannot hold, before a file is written for it."""
    try:
        json.dumps(state, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected a state that JSON can hold, found another: {error}") from None


@dataclass(frozen=True)
class _Rows:
    """The rows of a layer: a run of them, or those that a mask has."""

    start: int | None
    count: int
    mask: NDArray[np.bool_] | None = None

    @staticmethod
    def of(mask: NDArray[np.bool_]) -> _Rows:
        count = int(np.count_nonzero(mask))
        start = int(mask.argmax()) if count else 0
        if count == 0 or mask[start : start + count].all():
            return _Rows(start, count)
        return _Rows(None, count, mask)

    def pieces(self, step: int) -> Iterator[Any]:
        """The rows, at most so many at a time, as a backend takes them."""
        if self.mask is None:
            start, stop = self.start or 0, (self.start or 0) + self.count
            for first in range(start, stop, step):
                yield range(first, min(first + step, stop))
            return
        for block in range(0, len(self.mask), ROWS):
            rows = np.flatnonzero(self.mask[block : block + ROWS]) + block
            for first in range(0, len(rows), step):
                yield rows[first : first + step]


def storage_entry(storage: Storage) -> StorageEntry:
    """What the manifest says of a storage, without its layers."""
    return StorageEntry(storage.capacity, storage.casting, describe(storage.data_spec))


def _plan(name: str, storage: Storage, entry: StorageEntry, old: Manifest | None) -> tuple[StorageEntry, _Rows]:
    """The layers that stay, and the rows that are to be written."""
    there = None if old is None else old.storages.get(name)
    changes = None if old is None else storage._noted_since(old.id, name)
    if changes is not None and there is not None and there.spec == entry.spec:
        rows = _Rows.of(changes.mask)
        written = sum(layer.count for layer in there.layers[1:]) + rows.count
        most = min(_LAYERS, _LAYERS_BYTES // len(json.dumps(there.layers[0].json(), indent=1)))
        if written <= max(there.layers[0].count, 1) and len(there.layers) < most:
            return there, rows
    return replace(entry, layers=()), _Rows(0, used_rows(storage))


def used_rows(storage: Storage) -> int:
    """The row from which on a storage holds nothing but bytes of zero, as rows do that were never written."""
    used = 0
    for buffer, spec in zip(storage._buffers, storage._nest.specs):
        step = rows_at_a_time(spec.nbytes)
        for stop in range(storage.capacity if spec.nbytes else 0, used, -step):
            rows = range(max(stop - step, used), stop)
            data = as_bytes(storage._backend.to_host(buffer, rows))
            if np.count_nonzero(data):
                used = rows.start + _last(data.reshape(len(rows), -1).any(axis=1)) + 1
                break
    return used


def _last(mask: Any) -> int:
    """The last place where a mask is true; there is one."""
    stop = len(mask)
    while not mask[max(stop - ROWS, 0) : stop].any():
        stop -= ROWS
    start = max(stop - ROWS, 0)
    return start + int(np.flatnonzero(mask[start:stop])[-1])


def _with_files(
    manifest: Manifest,
    path: Path,
    storages: Mapping[str, Storage],
    plans: Mapping[str, tuple[StorageEntry, _Rows]],
    arrays: Mapping[str, NDArray[Any]],
    callback: Callback | None,
) -> Manifest:
    """The manifest that names the files of what is to be written, once they are there."""
    rows_nbytes = sum(rows.count * entry.row_nbytes for entry, rows in plans.values())
    total = rows_nbytes + sum(array.nbytes for array in arrays.values())
    with Progress("saving", total, callback) as progress:
        draft = _Draft(path, manifest.version, progress, Blocks())
        entries = {name: draft.add_layer(name, storages[name], entry, rows) for name, (entry, rows) in plans.items()}
        added = {name: draft.add_array(name, array) for name, array in arrays.items()}
    return replace(manifest, storages=entries, arrays=added)


class _Draft:
    """The files of a version that no manifest names yet."""

    def __init__(self, path: Path, version: int, progress: Progress, blocks: Blocks) -> None:
        self._path = path
        self._version = version
        self._progress = progress
        self._blocks = blocks
        self._taken: dict[str, int] = {}

    def add_layer(self, name: str, storage: Storage, entry: StorageEntry, rows: _Rows) -> StorageEntry:
        if rows.count == 0 and entry.layers:
            return entry
        index, last = None, rows.count + (rows.start or 0)
        if rows.mask is not None:
            last = _last(rows.mask) + 1
            lists = (np.asarray(piece, np.int64) for piece in rows.pieces(ROWS))
            index = self._write([name, "rows"], (rows.count,), np.dtype(np.int64), lists, lambda _: None)
        leaves = {path: self._add_leaf([name, path], storage, storage._position(path), rows) for path in entry.leaves}
        layer = Layer(rows.count, rows.start, index, leaves)
        return replace(entry, rows=max(entry.rows, last), layers=(*entry.layers, layer))

    def _add_leaf(self, parts: Sequence[str], storage: Storage, position: int, rows: _Rows) -> File:
        spec, buffer = storage._nest.specs[position], storage._buffers[position]
        pieces = (storage._backend.to_host(buffer, piece) for piece in rows.pieces(rows_at_a_time(spec.nbytes)))
        return self._write(parts, (rows.count, *spec.shape), spec.dtype, pieces, self._progress.advance)

    def add_array(self, name: str, array: NDArray[Any]) -> ArrayEntry:
        step = rows_at_a_time(array[:1].nbytes) if array.ndim else 1
        pieces = (array[start : start + step] for start in range(0, len(array), step)) if array.ndim else [array]
        file = self._write(["array", name], array.shape, array.dtype, pieces, self._progress.advance)
        return ArrayEntry(file, array.shape, array.dtype)

    def _write(self, parts: Sequence[str], shape: Any, dtype: Any, pieces: Any, advance: Any) -> File:
        name = file_name(self._version, parts, self._taken)
        return File(name, write_npy(self._path / name, shape, dtype, pieces, advance, self._blocks))

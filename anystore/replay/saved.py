"""A replay buffer in a snapshot: its storages, and all that it goes on from."""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anystore.convert import to_numpy
from anystore.nests import Nest
from anystore.replay.lanes import DISTANCES
from anystore.replay.samplers import Prioritized, Recent, Sampler, Uniform
from anystore.snapshot import Snapshot, SnapshotError, save_snapshot
from anystore.snapshot.described import describe, rebuild
from anystore.snapshot.manifest import MANIFEST
from anystore.snapshot.npy import rows_at_a_time
from anystore.snapshot.progress import Callback, Progress
from anystore.snapshot.reader import backend_of, nest_of
from anystore.storage import Storage

if TYPE_CHECKING:
    from anystore.replay.buffer import ReplayBuffer


_OURS = (Uniform, Recent, Prioritized)
"""The samplers that can be made anew."""
_BY_ITEM = ("items", "marks", "distances")
"""The storages that have a row for each row of the ring."""
_WRONG = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError)
"""What comes of a state that is none."""


def save_buffer(buffer: ReplayBuffer, path: str | os.PathLike[str], keep: int, progress: Callback | None) -> None:
    """Save a buffer; see `ReplayBuffer.save`."""
    sampler = type(buffer.sampler)
    if sampler.update is not Sampler.update and sampler.state is Sampler.state:
        warnings.warn(
            f"a {sampler.__name__} sampler has priorities to update and no state(): they are not saved; let it define "
            "state and restore",
            RuntimeWarning,
            stacklevel=3,
        )
    with buffer.lock, buffer._on_device():
        arrays: dict[str, NDArray[Any]] = {}
        state = {
            "data_spec": describe(buffer.data_spec),
            "capacity": buffer.capacity,
            "sampler_class": type(buffer.sampler).__name__,
            "sampler_settings": _without_arrays(_settings(buffer.sampler), "settings", arrays),
            "buffer": _without_arrays(buffer._state(), "", arrays),
        }
        storages = buffer._storages()
        save_snapshot(path, storages, kind="replay", state=state, arrays=arrays, keep=keep, progress=progress)


def _fixed(sampler: Sampler) -> dict[str, Any]:
    """The settings that cannot be changed once it is made."""
    return {name: value for name, value in (_settings(sampler) or {}).items() if name not in ("beta", "newest")}


def _settings(sampler: Sampler) -> dict[str, Any] | None:
    """What a sampler that comes with anystore is made with; None for a class of the user's own."""
    return sampler._settings() if isinstance(sampler, _OURS) and type(sampler) in _OURS else None


def _without_arrays(node: Any, path: str, arrays: dict[str, NDArray[Any]]) -> Any:
    """The state with None in the places of its arrays, which are added to `arrays` by their paths."""
    if isinstance(node, np.ndarray):
        if path in arrays:
            raise ValueError(f"expected one array of the name {path!r} in the state of the sampler, found two")
        arrays[path] = node
        return None
    if isinstance(node, dict):
        return {key: _without_arrays(value, f"{path}/{key}" if path else key, arrays) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_without_arrays(value, f"{path}/{number}", arrays) for number, value in enumerate(node)]
    leaf = node.item() if isinstance(node, np.generic) else node
    if leaf is not None and not isinstance(leaf, (bool, int, float, str)):
        raise ValueError(f"{path}: expected numbers, strings, and NumPy arrays by name, found {leaf!r:.80}")
    return leaf


def _with_arrays(node: Any, path: str, arrays: dict[str, NDArray[Any]]) -> Any:
    """The state with its arrays in their places."""
    if path in arrays:
        return arrays[path]
    if isinstance(node, dict):
        return {key: _with_arrays(value, f"{path}/{key}" if path else key, arrays) for key, value in node.items()}
    if isinstance(node, list):
        return [_with_arrays(value, f"{path}/{number}", arrays) for number, value in enumerate(node)]
    return node


def load_buffer(
    snapshot: Snapshot,
    *,
    backend: Any,
    device: Any,
    capacity: int | None,
    like: Any,
    sampler: Sampler | None,
    progress: Callback | None,
) -> ReplayBuffer:
    """The buffer that was saved; see `anystore.load`.

    Raises
    ------
    SnapshotError
        If its state is none, or does not fit its storages.
    """
    where = snapshot.path / MANIFEST
    try:
        state = _State(snapshot)
        nest = Nest(rebuild(snapshot.state["data_spec"]))
    except _WRONG as error:
        raise SnapshotError(f"{where}: expected the state of a replay buffer, found another ({error!r})") from None
    nest, backend = nest_of(like, nest, snapshot.path), backend_of(like, backend)
    sampler = state.sampler(sampler)
    capacity = state.capacity if capacity is None else capacity
    buffer = state.new_buffer(nest.data_spec, capacity, sampler, backend, device)
    nbytes = snapshot.rows_nbytes(*snapshot.manifest.storages)
    with Progress("loading", nbytes, progress) as bar, buffer._on_device():
        state.fill(buffer, bar)
    return buffer


class _State:
    """The state of a buffer in a snapshot, checked as far as memory depends on it."""

    def __init__(self, snapshot: Snapshot) -> None:
        state = snapshot.state
        self._snapshot = snapshot
        self._where = snapshot.path / MANIFEST
        self.capacity: int = state["capacity"]
        self._class: str = state["sampler_class"]
        self._settings: dict[str, Any] | None = state["sampler_settings"]
        self._state: dict[str, Any] = _with_arrays(state["buffer"], "", snapshot.arrays())
        self._of_sampler = self._state["sampler"]
        ring = self._state["ring"]
        oldest, total = ring["oldest"], ring["total"]
        if not 0 <= oldest <= total < 2**62 or not total - oldest <= self.capacity:
            raise ValueError(f"items {oldest!r:.80} to {total!r:.80} in {self.capacity!r:.80} rows")
        self._items = range(oldest, total)
        for name in _BY_ITEM:
            if name in snapshot.manifest.storages and snapshot.entry(name).capacity != self.capacity:
                raise ValueError(f"{name} with {snapshot.entry(name).capacity} rows, not {self.capacity}")

    def sampler(self, given: Sampler | None) -> Sampler:
        """A sampler like the one that was saved: the one that the user gave, where its class is the user's own.

        Raises
        ------
        SnapshotError
            If none was given then, or if the one that was given is of another class or has other settings.
        """
        if given is not None and type(given).__name__ != self._class:
            raise SnapshotError(
                f"{self._where}: its sampler is a {self._class!r:.80}; pass a new one as sampler=, found a "
                f"{type(given).__name__}"
            )
        found = next((each for each in _OURS if each.__name__ == self._class), None)
        if self._settings is None or found is None:
            if given is None:
                raise SnapshotError(f"{self._where}: its sampler is a {self._class!r:.80}; pass a new one as sampler=")
            return given
        try:
            saved = found(**self._settings)
        except (TypeError, ValueError) as error:
            raise SnapshotError(f"{self._where}: expected the settings of a {self._class} ({error})") from None
        if given is not None and (type(given) is not found or _fixed(given) != _fixed(saved)):
            raise SnapshotError(
                f"{self._where}: its sampler is anystore's {saved!r:.80}, found {given!r:.80} of "
                f"{type(given).__module__}; leave sampler= out"
            )
        return saved

    def new_buffer(self, data_spec: Any, capacity: int, sampler: Sampler, backend: Any, device: Any) -> ReplayBuffer:
        """An empty buffer of the same options."""
        from anystore.replay.buffer import ReplayBuffer

        casting = self._snapshot.entry("items").casting
        options: Any = {"casting": casting, "backend": backend, "device": device, "sampler": sampler}
        try:
            options.update(_checked_options(self._state["options"]))
            # For a generator of another kind than the one that was saved, which cannot go on from its state.
            options["seed"] = zlib.crc32(json.dumps(self._state["random"], default=str).encode())
        except (KeyError, TypeError, AttributeError) as error:
            raise SnapshotError(f"{self._where}: expected the options of a replay buffer ({error!r})") from None
        return ReplayBuffer(data_spec, capacity, **options)

    def fill(self, buffer: ReplayBuffer, bar: Progress) -> None:
        """Bring an empty buffer to where the saved one was.

        Raises
        ------
        SnapshotError
            If the state is none.
        """
        moved = None if buffer.capacity == self.capacity else self._moved(buffer.capacity)
        distances = None
        for name, entry in self._snapshot.manifest.storages.items():
            if name == "distances":
                storage = distances = Storage(DISTANCES, buffer.capacity, backend=buffer.backend.bookkeeping)
            elif name in buffer._layout.storages:
                storage = buffer._layout.storages[name]
            else:
                raise SnapshotError(f"{self._where}: expected {', '.join(buffer._layout.storages)}, found {name!r:.80}")
            if name not in _BY_ITEM and storage.capacity != entry.capacity:
                storage.resize(entry.capacity)
            self._snapshot.fill(storage, name, moved=moved if name in _BY_ITEM else None, bar=bar)
        try:
            self._check(buffer, distances)
            buffer._restore(self._state, distances)
        except _WRONG as error:
            raise SnapshotError(
                f"{self._where}: expected the state of a replay buffer, found another ({error})"
            ) from None
        # By itself, since an error in a sampler of the user's own is none of the snapshot.
        buffer.sampler.restore(self._of_sampler, buffer._ring.items)

    def _moved(self, capacity: int) -> Callable[[NDArray[np.intp]], NDArray[np.intp]]:
        """What gives the rows of the newest items in a ring of another capacity."""
        items, old = self._items, self.capacity
        oldest = max(items.start, items.stop - capacity)

        def moved(rows: NDArray[np.intp]) -> NDArray[np.intp]:
            numbers = items.start + (rows - items.start) % old
            there = (numbers >= oldest) & (numbers < items.stop)
            return np.where(there, numbers % capacity, -1)

        return moved

    def _check(self, buffer: ReplayBuffer, distances: Storage | None) -> None:
        """Check what would not be noticed where it is taken."""
        lanes = self._state["lanes"]
        if lanes["in_step"] != (distances is None) or len(lanes["newest"]) != buffer.lanes:
            raise ValueError("the lanes do not fit")
        if "records" in buffer._layout.storages:
            _check_records(buffer, self._state["layout"])
        if type(buffer.sampler) is Prioritized:
            _check_chances(self._of_sampler, len(self._items))


def _checked_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options that items are laid out by, each of its type."""
    mappings = {"shared": str, "stacks": int}
    kinds: dict[str, Any] = {
        "lanes": int,
        **dict.fromkeys(("reward", "terminated", "truncated"), (str, type(None))),
        "following": (str, list, type(None)),
    }
    if options.keys() != {*mappings, *kinds} or not all(isinstance(options[key], kind) for key, kind in kinds.items()):
        raise TypeError(f"other options: {options!r:.200}")
    for key, kind in mappings.items():
        if not isinstance(options[key], dict) or not all(type(value) is kind for value in options[key].values()):
            raise TypeError(f"{key} is {options[key]!r:.80}")
    return options


def _check_records(buffer: ReplayBuffer, layout: dict[str, Any]) -> None:
    """Check that every number of a record is one, since rows follow from them without another look."""
    count = layout["records"]
    free, ended, record = (np.asarray(layout[name]) for name in ("free", "ended", "record"))
    named = np.concatenate([free, ended.reshape(-1, 2)[:, 1], record[record != -1]])
    rows = count * (buffer._layout.margin + 1)
    if buffer._layout.storages["records"].capacity != rows:
        raise ValueError(f"{rows} rows of records")
    if named.size and not (named.dtype.kind in "iu" and 0 <= named.min() <= named.max() < count):
        raise ValueError(f"records beyond {count}")
    fresh = buffer._layout.state()["expected"]
    if {path: (array.shape, array.dtype) for path, array in layout["expected"].items()} != {
        path: (array.shape, array.dtype) for path, array in fresh.items()
    }:
        raise ValueError("other observations")
    marks = buffer._layout.storages["marks"].select("record")
    step = rows_at_a_time(4)
    for start in range(0, buffer.capacity, step):
        numbers = to_numpy(marks.get(slice(start, start + step)))
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < count:
            raise ValueError(f"records beyond {count}")


def _check_chances(state: dict[str, Any], count: int) -> None:
    """Check that there is a chance for each item and for new ones: rows are drawn with them without another look."""
    scaled = state["numbers"]
    if scaled.shape != (count,) or scaled.dtype.kind != "f" or not (np.isfinite(scaled) & (scaled >= 0)).all():
        raise ValueError(f"no chances of {count} items")
    if not np.isfinite((state["highest"] + state["epsilon"]) ** state["alpha"] * state["beta"]):
        raise ValueError("no chance of a new item")

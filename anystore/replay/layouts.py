"""Items stored just as they are, and what every layout owes; shared.py leaves out what follows from neighbours.

A layout writes items to the rows of a ring and reads them back by their places: positions among the items that are
there, 0 the oldest.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anystore.backends.base import Array
from anystore.convert import to_numpy
from anystore.nests import map_leaves
from anystore.replay.lanes import Lanes
from anystore.replay.ring import Ring
from anystore.replay.roles import Roles
from anystore.storage import Storage


class Plain:
    """Items just as they are.

    Parameters
    ----------
    storage : Storage
        For the items.
    ring, lanes
        Which rows are whose, and which item follows which.
    roles : Roles
        Which leaves say that an episode ends with an item, or is broken off after it.
    """

    margin = 0
    """How many items of each lane, at the old end of the ring, may be unreadable."""

    def __init__(self, storage: Storage, ring: Ring, lanes: Lanes, roles: Roles) -> None:
        self.storages = {"items": storage}
        self._ring = ring
        self._lanes = lanes
        self._select = functools.cache(functools.partial(_selection, self.storages))
        self._flags = roles.flags
        self._ends = storage.select(*self._flags) if self._flags else None
        self._truncated = None if roles.truncated is None else storage.select(roles.truncated)

    @property
    def knows_ends(self) -> bool:
        """Whether it is told where episodes end."""
        return self._ends is not None

    def parts_of(self, batch: Any, count: int, lanes: int) -> list[tuple[Any, int]]:
        """A batch of items of so many lanes in turn, in parts that `write` takes one after the other, with their items.

        Raises
        ------
        ValueError, TypeError, OverflowError
            As `Storage.set`, if that is found here.
        """
        if count:
            return [(batch, count)]
        self.storages["items"].admit(batch, (0,))
        return []

    def write_one(self, item: Any) -> None:
        """Write an item, in the only lane.

        Raises
        ------
        ValueError, TypeError, OverflowError
            As `Storage.set`; nothing has changed then.
        """
        self.storages["items"].set(self._ring.total % self._ring.capacity, item)

    def write(self, batch: Any, count: int, lanes: NDArray[np.intp] | None) -> None:
        """Write the newest of `count` items, as many as there are rows.

        Raises
        ------
        ValueError, TypeError, OverflowError
            As `Storage.set`; nothing has changed then.

        Notes
        -----
        The ring is yet to advance: `settle` follows when it has. If it will not, `undo` does.
        """
        write_run(self.storages["items"], self._ring.next_rows(count), batch, count)

    def settle(self) -> None:
        """The ring has advanced: what was written holds. Idempotent."""

    def warn(self) -> None:
        """Warn whoever called what calls this, if most items of a buffer do not go on from one another."""

    def undo(self) -> None:
        """The ring has not advanced, and will not: be as before, but for items that were overwritten."""

    def ends(self, places: Array) -> Array:
        """Whether an episode ends with each of these items."""
        assert self._ends is not None
        found = self._ends._get_for_bookkeeping(self._ring.index(places))
        return functools.reduce(operator.or_, found.values() if isinstance(found, dict) else [found])

    def end(self, lanes: NDArray[np.intp]) -> None:
        """Let the episodes of these lanes end with their newest items.

        Raises
        ------
        ValueError
            If there is nothing to tell it by.
        """
        if self._truncated is None:
            raise ValueError('no leaf says that an episode was broken off; give the spec a bool leaf "truncated"')
        numbers = self._lanes.newest(lanes)
        numbers = numbers[numbers >= self._ring.items.start]
        going_on = ~to_numpy(self.ends(self._ring.places_of(numbers)))
        self._truncated.set(numbers[going_on] % self._ring.capacity, True)

    def readable(self, places: Array) -> Array:
        """Whether each of these items can be read, of those that come after `margin`."""
        return places >= 0

    def read(self, places: Array, paths: tuple[str, ...] | None = None) -> Any:
        """The items at these places; or a dict of some of their parts, by path."""
        if paths is None:
            return self.storages["items"].get(self._ring.index(places))
        return self._as_stored(paths, places)

    def _as_stored(self, paths: tuple[str, ...], places: Array) -> dict[str, Array]:
        if not paths:
            return {}
        leaves = self._select("items", *paths).get(self._ring.index(places))
        return leaves if len(paths) > 1 else {paths[0]: leaves}

    def every_end(self) -> NDArray[Any]:
        """What `ends` says of all items, oldest first, in main memory: many times faster than by their places."""
        return functools.reduce(operator.or_, [self.every(path) for path in self._flags])

    def every(self, path: str) -> NDArray[Any]:
        """The leaf at a path of all items, oldest first, in main memory."""
        return self._ring.in_order(self._select("items", path))

    def clear(self) -> None:
        """All items are gone."""

    def state(self) -> dict[str, Any]:
        """What `restore` takes, but for the storages."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Be as the layout was that `state` is of."""


def _selection(storages: dict[str, Storage], name: str, *paths: str) -> Storage:
    return storages[name].select(*paths)


def write_run(storage: Storage, runs: list[range], batch: Any, count: int) -> None:
    """Write the newest of the `count` items of a batch to one run of rows or two, all or none of them."""
    extra = count - sum(map(len, runs))
    if len(runs) == 1 and not extra:
        storage.set(slice(runs[0].start, runs[0].stop), batch)
        return
    batch = storage.admit(batch, (count,))
    for run in runs:
        take = functools.partial(_part, start=extra, stop=extra + len(run))
        storage.set(slice(run.start, run.stop), map_leaves(take, batch))
        extra += len(run)


def _part(leaf: Array, start: int, stop: int) -> Array:
    return leaf[start:stop, ...]

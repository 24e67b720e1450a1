"""Which item follows which: each environment that items come from has a lane of its own.

As long as every write is of whole steps, an item of each lane in turn, the next item of a lane is as many items further
on as there are lanes, and nothing needs to be stored. From the first write of only some of the lanes on, the
distances from each item to its neighbours in the lane are kept in a storage.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from anystore.backends import Backend
from anystore.backends.base import Array
from anystore.replay.ring import Ring
from anystore.specs import ArraySpec
from anystore.storage import Storage

DISTANCES = {"ahead": ArraySpec((), "int32"), "behind": ArraySpec((), "int32")}
"""From an item to the next and to the previous one of its lane; 0 where there is none yet, or was none."""


class Lanes:
    """The lanes of a ring.

    Parameters
    ----------
    count : int
        How many.
    ring : Ring
        The ring that their items are in.
    books : Backend
        What places are computed with: the `bookkeeping` of the backend of the items.
    """

    def __init__(self, count: int, ring: Ring, books: Backend) -> None:
        self.count = count
        self._ring = ring
        self._books = books
        self._keep(None)
        self._newest = np.full(count, -1, np.int64)  # kept only with distances
        self._next_newest: NDArray[np.int64] | None = None

    @property
    def in_step(self) -> bool:
        """Whether all writes so far were of whole steps."""
        return self._distances is None

    def of_batch(self, count: int, lanes: Any) -> NDArray[np.intp] | None:
        """The lanes that `count` items are of in turn, as the user named them; None for all.

        Raises
        ------
        ValueError
            If the items are no whole steps of these lanes, or the lanes are not among those of the buffer, each once.
        """
        if lanes is None:
            if count % self.count:
                raise ValueError(
                    f"expected items of {self.count} lanes in turn, a multiple of {self.count} items, found {count}; "
                    "for items of some lanes only, name these with lanes="
                )
            return None
        named = self.named(lanes)
        if len(named) == 0 and count:
            raise ValueError(f"expected the lanes of {count} items, found none named")
        if len(named) and count % len(named):
            raise ValueError(
                f"expected items of these {len(named)} lanes in turn, a multiple of {len(named)}, found {count}"
            )
        return None if len(named) == 0 or np.array_equal(named, np.arange(self.count)) else named

    def named(self, lanes: Any) -> NDArray[np.intp]:
        """The lanes that a user named: by an int, by integers, each once, or by a mask over all; None for all.

        Raises
        ------
        ValueError
            If they are not among those of the buffer.
        """
        if lanes is None:
            return np.arange(self.count)
        named = np.atleast_1d(lanes)
        if named.dtype == np.bool_ and named.shape == (self.count,):
            return np.flatnonzero(named)
        if named.size == 0:
            return np.empty(0, np.intp)
        if named.ndim != 1 or named.dtype.kind not in "iu":
            raise ValueError(
                f"expected lanes, a flat sequence of integers or a mask of {self.count}, found {named.dtype} of shape "
                f"{named.shape}"
            )
        if named.min() < 0 or named.max() >= self.count or len(np.unique(named)) < len(named):
            raise ValueError(
                f"expected lanes from 0 to {self.count - 1}, each of them once, found {named.tolist()!r:.80}"
            )
        return named.astype(np.intp)

    def newest(self, lanes: NDArray[np.intp] | None = None) -> NDArray[np.int64]:
        """The numbers of the newest items of these lanes, or of all, which may be gone; -1 where there was none."""
        if self._distances is None:
            start = self._ring.total - self.count
            newest = np.arange(start, start + self.count) if start >= 0 else self._newest
        else:
            newest = self._newest
        return newest if lanes is None else newest[lanes]

    def added(self, count: int, lanes: NDArray[np.intp] | None) -> None:
        """Note that `count` items are written behind those of the ring, which is yet to advance; `settle` follows then.

        If it will not, `undo` does.
        """
        if self._distances is None:
            if lanes is None:
                return
            self._keep_distances()
        lanes = np.arange(self.count) if lanes is None else lanes
        numbers = self._ring.total + np.arange(count)
        previous = np.concatenate([self._newest[lanes], numbers])[:count]
        self._note(numbers[-self._ring.capacity :], previous[-self._ring.capacity :])
        newest = self._newest.copy()
        newest[lanes] = numbers[-len(lanes) :]
        self._next_newest = newest

    def settle(self) -> None:
        """The ring has advanced: what was noted holds. Idempotent."""
        if self._next_newest is not None:
            self._newest, self._next_newest = self._next_newest, None

    def undo(self) -> None:
        """The ring has not advanced, and will not: nothing of what was noted holds."""
        self._next_newest = None
        if self._ahead is not None:
            items = np.asarray(self._ring.items, np.int64)
            last = items + self._ring.in_order(self._ahead) >= self._ring.total
            self._ahead.set(items[last] % self._ring.capacity, np.int32(0))

    def ahead(self, places: Array) -> tuple[Array, Array]:
        """The places of the next items of the same lanes, and whether there are such; else the places as they are."""
        return self._neighbours("ahead", places)

    def behind(self, places: Array) -> tuple[Array, Array]:
        """The places of the items before in the same lanes, and whether there are such; else the places as they are."""
        return self._neighbours("behind", places)

    def every_behind(self) -> NDArray[Any]:
        """How far behind each item the previous one of its lane is, in main memory; 0 or too far for none."""
        if self._distances is None:
            return np.broadcast_to(np.int32(self.count), (len(self._ring.items),))
        return self._ring.in_order(self._distances.select("behind"))

    def clear(self) -> None:
        """All items are gone, and none of them is the previous one of what comes."""
        self._newest[:] = -1
        self._keep(None)

    def _neighbours(self, name: str, places: Array) -> tuple[Array, Array]:
        sign, count = 1 if name == "ahead" else -1, len(self._ring.items)
        if self._distances is None:
            found = places + sign * self.count
            there = (found >= 0) & (found < count)
        else:
            distance = self._distances.get(self._ring.index(places))[name]
            distance = self._books.xp.astype(distance, places.dtype)
            found = places + sign * distance
            there = (distance > 0) & (found >= 0) & (found < count)
        return self._books.xp.where(there, found, places), there

    def _keep_distances(self) -> None:
        """From now on; the items that are there were all written in step."""
        newest = self.newest().copy()
        distances = Storage(DISTANCES, self._ring.capacity, backend=self._books)
        items = np.asarray(self._ring.items, np.int64)
        ahead = np.where(items + self.count < self._ring.total, self.count, 0)
        if items.size:
            values = {"ahead": ahead, "behind": np.full(items.size, self.count)}
            distances.set(items % self._ring.capacity, {k: v.astype(np.int32) for k, v in values.items()})
        self._newest = newest
        self._keep(distances)

    def _note(self, numbers: NDArray[np.int64], previous: NDArray[np.int64]) -> None:
        """Items of these numbers, and what the previous one of the lane is for each; -1 for none."""
        assert self._distances is not None
        assert self._ahead is not None
        capacity = self._ring.capacity
        linked = previous > max(-1, numbers[-1] - capacity)  # and not overwritten by one of these items
        distance = np.where(linked, numbers - previous, 0).astype(np.int32)
        self._distances.set(numbers % capacity, {"ahead": np.zeros_like(distance), "behind": distance})
        # For items without a previous one their own 0 once more, before the distance of what follows them is written:
        # always one shape, for libraries that compile.
        rows = np.where(linked, previous, numbers) % capacity
        self._ahead.set(rows, distance)

    def state(self) -> dict[str, Any]:
        """What `restore` takes, but for the distances."""
        return {"newest": self._newest.tolist(), "in_step": self.in_step}

    def restore(self, state: dict[str, Any], distances: Storage | None) -> None:
        """Be as the lanes were that `state` is of."""
        self._newest = np.asarray(state["newest"], np.int64)
        self._keep(distances)

    def _keep(self, distances: Storage | None) -> None:
        ahead = None if distances is None else distances.select("ahead")
        self._distances, self._ahead = distances, ahead

    @property
    def distances(self) -> Storage | None:
        """What is kept of each item's neighbours, if anything is."""
        return self._distances

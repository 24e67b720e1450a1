"""Items without what follows from their neighbours: next observations, and the frames of stacks but the newest.

Of each episode there is a record: the frames that came before its first one, and what was observed after its last item
so far. With it every item is put together again just as it was added, at both ends of an episode, at truncation and at
the newest item. Whether items of a lane go on from one another is seen from the observations themselves: an item
that does not begin with what followed the one before it begins an episode of its own.

Three storages hold them: "items" has a row for each item, with single frames in place of stacks; so has "marks", for
what is known of each item's episode; "records" has as many rows for each record as the deepest stack has frames. The
last of them is for the frame that followed the episode's last item so far, those in front of it are for the frames from
before its first item, the latest of them last. A record is free again once the last item of its episode is overwritten.
"""

from __future__ import annotations

import heapq
import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anystore.backends.base import Array
from anystore.convert import to_numpy
from anystore.nests import Nest, label
from anystore.replay.lanes import Lanes
from anystore.replay.layouts import Plain, write_run
from anystore.replay.ring import Ring
from anystore.replay.roles import Roles
from anystore.rows import KnownRows
from anystore.specs import ArraySpec
from anystore.storage import Storage

_MARKS = {"begins": ArraySpec((), "bool"), "ends": ArraySpec((), "bool"), "record": ArraySpec((), "int32")}
"""Of each item: whether an episode begins or ends with it, and the number of the episode's record."""
_STRANGERS = 100
"""From so many of each lane on that do not go on from those before them there is a warning, if most items are such."""


class _Observation(NamedTuple):
    """A leaf that is not stored as it is."""

    path: str
    spec: ArraySpec
    axis: int | None
    """That of the stack in the shape of the leaf; None for a leaf that is no stack."""
    after: str | None
    """The path of what it is in the next item, which is not stored."""

    @property
    def frames(self) -> int:
        return 1 if self.axis is None else self.spec.shape[self.axis]

    @property
    def frame(self) -> ArraySpec:
        """What is stored for each item."""
        if self.axis is None:
            return self.spec
        shape = list(self.spec.shape)
        del shape[self.axis]
        return self.spec.replace(shape=tuple(shape))

    def newest(self, leaf: Array) -> Array:
        """The newest frame of each of a batch of leaves."""
        return leaf if self.axis is None else leaf[self._among_frames(-1)]

    def older(self, leaf: Array) -> Array:
        """The frames before it, in stacks as they are."""
        return leaf[self._among_frames(slice(None, -1))]

    def _among_frames(self, frames: Any) -> tuple[Any, ...]:
        assert self.axis is not None
        return (*(slice(None),) * (self.axis + 1), frames, ...)


class Shared(Plain):
    """Items without what follows from their neighbours.

    Parameters
    ----------
    nest : Nest
        What items look like.
    ring, lanes
        Which rows are whose, and which item follows which.
    shared : mapping
        From the path of a part to that of the part that it is in the next item.
    stacks : mapping
        From the path of a leaf to the axis of its stack.
    roles : Roles
        Which leaves say that an episode ends with an item, or is broken off after it.
    options : dict
        Those of the storages.
    """

    def __init__(
        self,
        nest: Nest,
        ring: Ring,
        lanes: Lanes,
        shared: Mapping[str, str],
        stacks: Mapping[str, int],
        roles: Roles,
        options: dict[str, Any],
    ) -> None:
        self._nest = nest
        self._observations = _observations(nest, shared, stacks)
        self._depth = max(each.frames for each in self._observations)
        self.margin = self._depth - 1
        if ring.capacity <= self.margin * lanes.count:
            raise ValueError(
                f"expected a capacity of more than {self.margin * lanes.count}, found {ring.capacity}: of stacks of "
                f"{self._depth} frames in {lanes.count} lane(s) so many of the oldest items may have lost frames"
            )
        frames = {each.path: each.frame for each in self._observations}
        self._not_stored = {each.after for each in self._observations} - {None}
        stored = {path: frames.get(path, spec) for path, spec in nest.leaves.items() if path not in self._not_stored}
        super().__init__(Storage(stored, ring.capacity, **options), ring, lanes, roles)
        self._records = 2 * lanes.count
        self.storages["records"] = Storage(frames, self._records * self._depth, **options)
        # To convert whole items before they are taken apart: batches, of which it holds nothing, and single ones.
        self._whole_items = Storage(nest.data_spec, 1, **options)
        self._backend = self._whole_items.backend
        self._one_item = Storage(nest.data_spec, 1, casting=self._whole_items.casting)
        self._its_leaves = dict(zip(nest.paths, nest.flatten(self._one_item.get(..., copy=False))))
        self._books = self._backend.bookkeeping
        self.storages["marks"] = Storage(_MARKS, ring.capacity, backend=self._books)
        self._kept_whole = set(stored) - {each.path for each in self._observations if each.axis is not None}
        self._every_lane = np.arange(lanes.count)
        self._forget()

    def _forget(self) -> None:
        """No episode has begun."""
        # Each record is either free, that of an episode that has ended, or that of the one that goes on in a lane.
        self._free = list(range(self._records))[::-1]
        self._ended: list[tuple[int, int]] = []  # a heap of the last item of an episode, and its record
        self._record = np.full(self._lanes.count, -1, np.int64)
        self._change: _Change | None = None
        self._strangers = self._written = 0
        # What the next item of a lane begins with, if it goes on.
        self._expected = {
            each.path: np.zeros((self._lanes.count, *each.spec.shape), each.spec.dtype) for each in self._observations
        }

    @property
    def knows_ends(self) -> bool:
        return True

    # Writing --------------------------------------------------------------------------------------------------------

    def parts_of(self, batch: Any, count: int, lanes: int) -> list[tuple[Any, int]]:
        # In NumPy if in main memory, where they are taken apart faster.
        leaves = map(self._backend.to_bookkeeping, self._nest.flatten(self._whole_items.admit(batch, (count,))))
        parts = self._taken_apart(dict(zip(self._nest.paths, leaves)))
        # As many whole steps at a time as there are rows, so that no item is overwritten by its own batch.
        most = self._ring.capacity // lanes * lanes
        slices = [slice(start, min(count, start + most)) for start in range(0, count, most)]
        return [(parts.at(each), each.stop - each.start) for each in slices]

    def _taken_apart(self, leaves: dict[str, Array]) -> _Parts:
        """A batch of whole items in the parts that are needed, checked."""
        seen: dict[str, NDArray[Any]] = {}
        for each in self._observations:
            seen[each.path] = to_numpy(leaves[each.path])
            if each.after is not None:
                seen[each.after] = to_numpy(leaves[each.after])
                _check_frames(each, seen[each.path], seen[each.after])
        ends = np.zeros(len(next(iter(seen.values()))), bool)
        for path in self._flags:
            ends |= to_numpy(leaves[path])
        stored = {path: leaf for path, leaf in leaves.items() if path not in self._not_stored}
        for each in self._observations:
            if each.axis is not None:
                stored[each.path] = each.newest(stored[each.path])
        return _Parts(stored, seen, ends)

    def write_one(self, item: Any) -> None:
        self._one_item.set(0, item)
        self.write(self._taken_apart(self._its_leaves), 1, None)

    def write(self, batch: _Parts, count: int, lanes: NDArray[np.intp] | None) -> None:
        ids = self._every_lane if lanes is None else lanes
        shape = (count // len(ids), len(ids))  # of steps and lanes, as all below
        oldest, self._written = self._ring.total + count - self._ring.capacity, self._written + count
        goes_on, ends = self._goes_on(batch.seen, lanes, shape), batch.ends.reshape(shape)
        episodes = self._episodes(goes_on, ends, ids, oldest)
        ends, records, ended = episodes.ends, episodes.records, episodes.broken_off
        if ends.any():
            numbers = (self._ring.total + np.arange(count)).reshape(shape)
            ended = [*ended, *zip(numbers[ends].tolist(), records[ends].tolist())]
        expected = {each.path: batch.seen[each.after or each.path][-len(ids) :] for each in self._observations}
        self._change = _Change(ids, np.where(ends[-1], -1, records[-1]), expected, ended, episodes.taken)
        self._mark_ends(episodes.broken_off, oldest)
        runs = self._ring.next_rows(count)
        write_run(self.storages["items"], runs, batch.stored, count)
        marks = {"begins": episodes.begins, "ends": ends, "record": records.astype(np.int32)}
        write_run(self.storages["marks"], runs, {name: each.reshape(-1) for name, each in marks.items()}, count)
        self._write_records(batch.seen, episodes)

    def _episodes(
        self, goes_on: NDArray[np.bool_], ends: NDArray[np.bool_], ids: NDArray[np.intp], oldest: int
    ) -> _Episodes:
        """The episodes that items are of, of which item `oldest` will be the oldest that is there."""
        before = self._record[ids]
        if len(goes_on) == 1 and goes_on.all() and (before >= 0).all():
            # Most writes are of a step in which no episode begins.
            return _Episodes(~goes_on, ends, before[None], [], [])
        begins, ends = ~goes_on, ends.copy()
        # Those that do not go on though no end of an episode says why.
        strangers = begins[0] & (before >= 0), begins[1:] & ~ends[:-1]
        self._strangers += sum(map(np.count_nonzero, strangers))
        begins[0] |= before < 0
        begins[1:] |= ends[:-1]
        ends[:-1] |= begins[1:]
        count = int(begins.sum())
        self._reserve(count, oldest)
        taken = [self._free.pop() for _ in range(count)]
        return _Episodes(begins, ends, self._records_of(begins, before, taken), self._going_on(ids[begins[0]]), taken)

    def settle(self) -> None:
        change = self._change
        if change is None:
            return
        self._record[change.lanes] = change.record
        for path, expected in change.expected.items():
            self._expected[path][change.lanes] = expected
        while change.ended:  # an interrupt may cost the room of a record, which no two episodes must have
            heapq.heappush(self._ended, change.ended.pop())
        self._change = None

    def undo(self) -> None:
        change, self._change = self._change, None
        if change is not None:
            self._free += change.taken
        # Of the episodes that go on, what was written on behalf of their next items.
        lanes = np.flatnonzero(self._record >= 0)
        newest = self._lanes.newest(lanes)
        there = newest[newest >= self._ring.items.start]
        self._select("marks", "ends").set(there % self._ring.capacity, False)
        for each in self._observations:
            if each.after is not None:
                rows = self._record[lanes] * self._depth + self._depth - 1
                self._select("records", each.path).set(rows, each.newest(self._expected[each.path][lanes]))

    def _goes_on(
        self, seen: dict[str, NDArray[Any]], lanes: NDArray[np.intp] | None, shape: tuple[int, int]
    ) -> NDArray[np.bool_]:
        """Whether each item begins with what followed the one before it in its lane."""
        same = np.ones(shape[0] * shape[1], bool)
        for each in self._observations:
            before, now = self._expected[each.path], seen[each.path]
            if lanes is not None:
                before = before[lanes]
            if shape[0] > 1:
                before = np.concatenate([before, seen[each.after or each.path][: -shape[1]]])
            # Where nothing is shared, all that is known of the next stack is its older frames.
            same &= _move_on(each, before, now) if each.after is None else _equal(before, now)
        return same.reshape(shape)

    def warn(self) -> None:
        if self._strangers >= _STRANGERS * self._lanes.count and 2 * self._strangers > self._written:
            self._strangers = -(2**62)  # once is enough
            warnings.warn(
                "most items do not begin with what followed the one before in their lane, though no episode ended "
                "there, so that each of them takes the room of an episode; if they are of several environments, make "
                "the buffer with lanes=, name the lanes in extend, and have steps before lanes in a batch",
                RuntimeWarning,
                stacklevel=3,
            )

    def _reserve(self, count: int, oldest: int) -> None:
        """Have so many records free; those of episodes that ended before item `oldest`, which goes now, are."""
        while self._ended and self._ended[0][0] < oldest:
            self._free.append(heapq.heappop(self._ended)[1])
        if len(self._free) < count:
            more = max(count, self._records)
            records = self.storages["records"]
            try:
                records.resize((self._records + more) * self._depth)
            finally:  # as many as there are now, also if an interrupt came when they were there
                count, before = records.capacity // self._depth, self._records
                self._free, self._records = [*range(count - 1, before - 1, -1), *self._free], count

    def _going_on(self, lanes: NDArray[np.intp]) -> list[tuple[int, int]]:
        """The newest items of these lanes, where an episode goes on, and each with the episode's record."""
        lanes = lanes[self._record[lanes] >= 0]
        return list(zip(self._lanes.newest(lanes).tolist(), self._record[lanes].tolist()))

    def _mark_ends(self, items: list[tuple[int, int]], oldest: int) -> None:
        """Mark that episodes end with these items, if they are not older than `oldest`."""
        there = [number % self._ring.capacity for number, _ in items if number >= oldest]
        if there:
            self._select("marks", "ends").set(there, True)

    def _records_of(self, begins: NDArray[np.bool_], before: NDArray[np.int64], taken: list[int]) -> NDArray[np.int64]:
        """The record of each item: what it was `before`, or one of those `taken` for each episode that begins."""
        records = np.full(begins.shape, -1, np.int64)
        records[0] = before
        records[begins] = taken
        steps = np.arange(len(begins))[:, None]
        latest = np.maximum.accumulate(np.where(begins, steps, 0), axis=0)
        return np.take_along_axis(records, latest, axis=0)

    def _write_records(self, seen: dict[str, NDArray[Any]], episodes: _Episodes) -> None:
        """What came before the episodes that begin, and what followed the last item so far of every episode."""
        first, ends, records = episodes.begins.reshape(-1), episodes.ends, episodes.records.reshape(-1)
        last: Any = slice(None)
        if len(ends) > 1:
            last = np.concatenate([ends[:-1], np.ones_like(ends[-1:])]).reshape(-1)
        for each in self._observations:
            storage = self._select("records", each.path)
            if each.axis is not None and episodes.taken:
                rows = records[first][:, None] * self._depth + np.arange(self._depth - each.frames, self._depth - 1)
                storage.set(rows, np.moveaxis(each.older(seen[each.path][first]), each.axis + 1, 1))
            if each.after is not None:
                storage.set(records[last] * self._depth + self._depth - 1, each.newest(seen[each.after])[last])

    def end(self, lanes: NDArray[np.intp]) -> None:
        if self._truncated is not None:
            super().end(lanes)
        ended = self._going_on(lanes)
        self._change = _Change(lanes, -1, {}, ended, [])
        self._mark_ends(ended, self._ring.items.start)
        self.settle()

    def clear(self) -> None:
        self._forget()

    def state(self) -> dict[str, Any]:
        return {
            "records": self._records,
            "free": np.asarray(self._free, np.int64),
            "ended": np.asarray(self._ended, np.int64).reshape(-1, 2),
            "record": self._record,
            "expected": dict(self._expected),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._records, self._free = state["records"], np.asarray(state["free"], np.int64).tolist()
        self._ended = [(number, record) for number, record in np.asarray(state["ended"], np.int64).tolist()]
        self._record = np.array(state["record"], np.int64)
        self._expected = {path: np.array(array) for path, array in state["expected"].items()}

    # Reading --------------------------------------------------------------------------------------------------------

    def ends(self, places: Array) -> Array:
        return self._marks("ends", places)

    def every_end(self) -> NDArray[Any]:
        return self._ring.in_order(self._select("marks", "ends"))

    def every(self, path: str) -> NDArray[Any]:
        if path in self._kept_whole:
            return self._ring.in_order(self._select("items", path))
        places = self._books.as_index(np.arange(len(self._ring.items)))
        return to_numpy(self.read(places, (path,))[path])

    def readable(self, places: Array) -> Array:
        """Whether each of these items can be read: whether the frames of its stacks are there."""
        _, depth, begins = self._older(places)
        return begins | (depth == self._depth - 1)

    def read(self, places: Array, paths: tuple[str, ...] | None = None) -> Any:
        wanted = self._nest.paths if paths is None else paths
        leaves = self._as_stored(tuple(path for path in wanted if path in self._kept_whole), places)
        parts = [(each.path, each, 0) for each in self._observations if each.axis is not None]
        parts += [(each.after, each, 1) for each in self._observations if each.after is not None]
        leaves |= self._assembled([part for part in parts if part[0] in wanted], places)
        return leaves if paths is not None else self._nest.pack([leaves[path] for path in self._nest.paths])

    def _marks(self, name: str, places: Array) -> Array:
        return self._select("marks", name).get(self._ring.index(places))

    def _older(self, places: Array) -> tuple[list[Array], Array, Array]:
        """The places of the items before each, of the same episode, nearest first, as many as a stack has frames.

        Where there are fewer, the last is repeated; how many there are, and whether that one is the episode's first.
        """
        xp = self._books.xp
        found = [places]
        begins = self._marks("begins", places)
        depth = xp.zeros_like(places)
        for _ in range(self._depth - 1):
            before, there = self._lanes.behind(found[-1])
            there = there & ~begins & (depth == len(found) - 1)
            found.append(xp.where(there, before, found[-1]))
            begins = self._marks("begins", found[-1])
            depth = depth + xp.astype(there, depth.dtype)
        return found, depth, begins

    def _sources(self, places: Array) -> tuple[Array, Array]:
        """Where the frames of items are: of the stack, oldest first, and then of what follows.

        Returns
        -------
        rows : array of shape (count, depth + 1)
            In the ring, or in the records.
        of_records : array of bool
            Which.
        """
        xp = self._books.xp
        found, depth, _ = self._older(places)
        followed = xp.astype(self._marks("record", places), places.dtype) * self._depth + (self._depth - 1)
        rows, of_records = [], []
        for age, place in reversed(list(enumerate(found))):
            missing = age - depth
            of_records.append(missing > 0)
            rows.append(xp.where(missing > 0, followed - missing, self._ring.rows(place)))
        after, there = self._lanes.ahead(places)
        of_records.append(self._marks("ends", places) | ~there)
        rows.append(xp.where(of_records[-1], followed, self._ring.rows(after)))
        return xp.stack(rows, axis=1), xp.stack(of_records, axis=1)

    def _assembled(self, parts: list[tuple[str, _Observation, int]], places: Array) -> dict[str, Array]:
        """Leaves that consist of frames: of each its path, what it is of, and how many frames ahead of the item's."""
        if not parts:
            return {}
        rows, of_records = self._sources(self._books.xp.reshape(places, (-1,)))
        found = []
        for _, each, ahead in parts:
            which = slice(ahead + self._depth - each.frames, ahead + self._depth)
            frames = self._frames(each.path, rows[:, which], of_records[:, which])
            lead = places.shape if each.axis is None else (*places.shape, each.frames)
            found.append(self._books.xp.reshape(frames, lead + frames.shape[1:]))
        leaves, at = self._backend.leaves_from_bookkeeping(found), len(places.shape)
        return {
            path: self._backend.xp.moveaxis(leaf, at, at + each.axis) if each.axis else leaf
            for (path, each, _), leaf in zip(parts, leaves)
        }

    def _frames(self, path: str, rows: Array, of_records: Array) -> Array:
        """Frames from their sources, one after the other."""
        xp, books = self._books.xp, self._books
        flat, from_records = xp.reshape(rows, (-1,)), xp.reshape(of_records, (-1,))
        in_ring = xp.where(from_records, xp.zeros_like(flat), flat)
        index = KnownRows(books.as_rows(in_ring), self._ring.capacity)
        frames = self._select("items", path)._get_for_bookkeeping(index)
        chosen = books.flatnonzero(from_records)
        if chosen.shape[0]:
            known = KnownRows(books.as_rows(xp.take(flat, chosen, axis=0)), self._records * self._depth)
            frames = books.put(frames, chosen, self._select("records", path)._get_for_bookkeeping(known))
        return frames


class _Episodes(NamedTuple):
    """The episodes that the items of a batch are of: arrays of steps and lanes, and what is to be done."""

    begins: NDArray[np.bool_]
    ends: NDArray[np.bool_]
    records: NDArray[np.int64]
    broken_off: list[tuple[int, int]]
    """The newest items, and the records, of episodes that do not go on though they have not ended."""
    taken: list[int]
    """The records of the episodes that begin."""


class _Change(NamedTuple):
    """What a write makes of the episodes of lanes, once it holds."""

    lanes: NDArray[np.intp]
    record: Any
    """That of the episode that goes on in each; -1 for none."""
    expected: dict[str, NDArray[Any]]
    """What the next item of each begins with, if it goes on."""
    ended: list[tuple[int, int]]
    """The last items of episodes that have ended, and their records."""
    taken: list[int]
    """The records of the episodes that begin."""


class _Parts(NamedTuple):
    """A batch of items, taken apart."""

    stored: dict[str, Array]
    """What is stored, by path; frames in place of stacks."""
    seen: dict[str, NDArray[Any]]
    """The observations as they are, on the host."""
    ends: NDArray[np.bool_]
    """Whether an episode ends with each item, as far as the item tells."""

    def at(self, part: slice) -> _Parts:
        """Some of the items."""
        stored = {path: leaf[part, ...] for path, leaf in self.stored.items()}
        return _Parts(stored, {path: leaf[part] for path, leaf in self.seen.items()}, self.ends[part])


def _observations(nest: Nest, shared: Mapping[str, str], stacks: Mapping[str, int]) -> list[_Observation]:
    """The leaves that are not stored as they are.

    Raises
    ------
    ValueError
        If a path is not in the spec, parts do not fit each other, or a leaf has no such axis.
    TypeError
        If an axis is no int.
    """
    after = _following(nest, shared)
    axes = {path: _axis_of(nest, path, axis, after) for path, axis in stacks.items()}
    return [
        _Observation(path, spec, axes.get(path), after.get(path))
        for path, spec in nest.leaves.items()
        if path in axes or path in after
    ]


def _following(nest: Nest, shared: Mapping[str, str]) -> dict[str, str]:
    """By the path of each leaf that others are shared with, the path of what it is in the next item."""
    specs = nest.leaves
    after: dict[str, str] = {}
    for following, part in shared.items():
        for path in _paths_in(nest, part):
            other = following + path[len(part) :]
            if path == other:
                raise ValueError(f"{label(path)}: expected another part to share it with, found itself")
            if specs.get(other) != specs[path]:
                raise ValueError(
                    f"{label(other)}: expected {specs[path]}, that of {label(path)}, which it is shared with, "
                    f"found {specs.get(other, 'no such leaf')}"
                )
            after[path] = other
        lone = [path for path in _paths_in(nest, following) if path not in after.values()]
        if lone:
            raise ValueError(f"{label(lone[0])}: expected a leaf of the same name in {part!r} to share with")
    if set(after) & set(after.values()) or len(set(after.values())) < len(after):
        raise ValueError(f"expected each part to be shared with one other, found {dict(shared)}")
    return after


def _paths_in(nest: Nest, part: str) -> list[str]:
    """The paths of the leaves of a part."""
    _, positions = nest.select((part,))
    return [nest.paths[position] for position in positions]


def _axis_of(nest: Nest, path: str, axis: int, after: Mapping[str, str]) -> int:
    """The axis of a stack in the shape of its leaf, counted from the front."""
    if path not in nest.paths or path in after.values():
        why = "no such leaf" if path not in nest.paths else "which is shared, and a stack where the other is one"
        raise ValueError(f"stacks: expected the path of a leaf that is stored, found {path!r}, {why}")
    shape = nest.leaves[path].shape
    if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)):
        raise TypeError(f"{label(path)}: expected the axis of a stack, an int, found {axis!r:.80}")
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"{label(path)}: expected an axis of a stack of shape {shape}, found {axis}")
    if shape[axis] == 0:
        raise ValueError(f"{label(path)}: expected a stack of 1 frame or more, found shape {shape}")
    return axis % len(shape)


def _check_frames(each: _Observation, now: NDArray[Any], after: NDArray[Any]) -> None:
    """That the older frames of what follows are the newer ones of what was observed."""
    if each.axis is None:
        return
    if not _move_on(each, now, after).all():
        raise ValueError(
            f"{each.after}: expected the frames of {each.path} moved on by one and a new frame behind them along axis "
            f"{each.axis}, found others; store such items without stacks="
        )


def _equal(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each item of one batch has the bytes of the same item of another."""
    same: NDArray[np.bool_] = (_bytes(one) == _bytes(other)).all(axis=1)
    return same


def _move_on(each: _Observation, stacks: NDArray[Any], later: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether the older frames of each of `later` have the bytes of the newer ones of `stacks`."""
    assert each.axis is not None
    frame = math.prod(each.spec.shape[each.axis + 1 :]) * each.spec.dtype.itemsize
    if not stacks.size or each.frames == 1:
        return np.ones(len(stacks), bool)
    # A frame further on in memory, all in one: channels-last stacks would be compared byte by byte.
    alike = np.empty((len(stacks), each.spec.nbytes), bool)
    np.equal(_bytes(stacks)[:, frame:], _bytes(later)[:, :-frame], out=alike[:, :-frame])
    alike.reshape(-1, each.frames, frame)[:, -1] = True
    same: NDArray[np.bool_] = np.logical_and.reduce(alike, axis=1)
    return same


def _bytes(batch: NDArray[Any]) -> NDArray[np.uint8]:
    """The bytes of each item."""
    flat = np.ascontiguousarray(batch).reshape(len(batch), math.prod(batch.shape[1:]))
    return flat.view(np.uint8)

"""ReplayBuffer: a ring of items on a storage, and samples of them."""

from __future__ import annotations

import functools
import operator
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anystore.backends import Backend, select_backend
from anystore.backends.base import Array
from anystore.convert import as_array, to_numpy
from anystore.nests import Nest, example_spec
from anystore.replay.batch import check_counts, count_items, looks_like_a_batch
from anystore.replay.draws import Draws, Usable
from anystore.replay.feed import Batches, check_target, hand_over
from anystore.replay.lanes import Lanes
from anystore.replay.layouts import Plain
from anystore.replay.ring import Ring
from anystore.replay.roles import Roles
from anystore.replay.samplers import Prioritized, Sampler, Uniform, as_priorities
from anystore.replay.shared import Shared
from anystore.replay.stats import Counts, Meter, Stats
from anystore.replay.windows import Windows
from anystore.specs import as_count, as_dtype
from anystore.storage import Storage
from anystore.values import Casting

AtEnd = Literal["cross", "pad", "whole"]

_LOOKED_AT = 1 << 16
"""So many items are looked at in one go: for stats, spread evenly over all; by a pass, unless a batch is larger."""


class Sample(NamedTuple):
    """What `ReplayBuffer.sample` returns: arrays of memory of their own, of the buffer's library, on its device.

    Being a named tuple, it is a nest to JAX, torch, TensorFlow and optree: ``jax.jit`` takes it as an argument.

    Attributes
    ----------
    items : nest of arrays
        Of the containers and dtypes of the spec, but for the reward of n-step returns, which is float32 where that of
        the spec is no float of NumPy's own: for integers, and for bfloat16 and the like. Each leaf has
        ``(batch_size,)`` in front, for windows ``(batch_size, num_steps)``.
    rows : array of int64, shape (batch_size,)
        Which items they are, or which ones the windows begin with; for `ReplayBuffer.update_priorities`. They are
        running numbers: ``rows % capacity`` are the rows of the storage. Of int32 where the library has no int64.
    weights : array of float32, shape (batch_size,), or None
        Importance weights, the largest of them 1; None where all are as likely.
    mask : array of bool, shape (batch_size, num_steps), or None
        Which steps of padded windows are real.
    discounts : array of floats, shape (batch_size,), or None
        For n-step returns, of which ``n_step=1`` are those of single items, what the value of the following observation
        counts: the discount to the power of the number of steps, 0 where the episode terminated. Of the dtype of the
        reward in `items`.
    """

    items: Any
    rows: Array
    weights: Array = None
    mask: Array = None
    discounts: Array = None


class ReplayBuffer:
    """The newest items that were added, in a ring of rows, and samples of them on the device where they are.

    Parameters
    ----------
    data_spec : nest of specs
        What an item looks like, as for `Storage`.
    capacity : int
        How many items are kept.
    sampler : Sampler, optional
        Which items are drawn: `Uniform` (the default), `Prioritized`, `Recent` or one of your own.
    lanes : int, default 1
        How many environments the items come from, in turn: windows and n-step returns never mix them.
    shared : mapping of str to str, optional
        Parts that are not stored, since they are what another part is in the next item: ``{"next_obs": "obs"}``. What
        follows the last item of an episode is kept, and so is what follows an item whose successor turns out not to
        go on from it. A sample holds them all as they were added.
    stacks : mapping of str to int, optional
        Leaves that are stacks of successive frames, newest last, and the axis of the stack in the shape of the leaf:
        ``{"obs": 0}``. They are stored frame by frame, and put together when sampled, just as they were added. Once
        items were overwritten, the oldest of each lane are not sampled, one less than the deepest stack has frames,
        since frames of theirs may be gone; nor, with lanes out of step, is any other item of which one is.
    reward, terminated, truncated : str, optional
        Where these are in an item: the leaf of the reward; the bool leaves that say that the episode ended with it or
        was broken off after it. By default the leaves "reward", "terminated" and "truncated", where there are such of
        that dtype. What needs one says so. The reward may have axes, as one for each of several agents.
    following : str or sequence of str, optional
        The parts that are what comes after the item, such as the next observation, for n-step returns; "next_obs" by
        default, where there is one. Those in `shared` always are. Where other leaves have "next" in their names, n-step
        returns ask for it.
    backend, device, casting
        As for `Storage`.
    seed : int, optional
        What the draws follow from: the same seed gives the same draws on the same backend, if they are made at the same
        moments between writes, as with ``prefetch=0`` in `batches`.

    Attributes
    ----------
    lock : threading.RLock
        Held by every method while it works.

    Raises
    ------
    ValueError, TypeError, ImportError, MemoryError
        As `Storage`; and if there are not enough rows for the lanes, a path is not in the spec, or `sampler` is not a
        sampler.

    Notes
    -----
    Any number of threads may add and sample: an item is sampled whole or not at all. Hold `lock` yourself to do several
    things as one, and to read `storage`; but ask `batches` for none meanwhile, whose thread needs it. `size` and
    `total_added` may be read at any time. What a sample holds is a copy that nobody changes.

    A write that is refused changes nothing. One that is interrupted, or for which the memory runs out, is there as a
    whole or not at all, but may cost the oldest items, which it was to overwrite; with `shared` or `stacks`, so is each
    run of `capacity` items of a batch that is longer. In a process that was forked off while a thread was writing, the
    buffer may hold the half of what it wrote; with a disk for its device (`select_backend`) it must not be used at all
    in one of the two.

    Examples
    --------
    >>> import numpy as np
    >>> from anystore import ArraySpec
    >>> from anystore.replay import ReplayBuffer
    >>> spec = {"obs": ArraySpec((4,), "float32"), "reward": ArraySpec((), "float32")}
    >>> buffer = ReplayBuffer(spec, capacity=1000, seed=0)
    >>> buffer.extend({"obs": np.ones((64, 4), np.float32), "reward": np.zeros(64, np.float32)})
    >>> len(buffer), buffer.sample(32, num_steps=8).items["obs"].shape
    (64, (32, 8, 4))
    """

    def __init__(
        self,
        data_spec: Any,
        capacity: int,
        *,
        sampler: Sampler | None = None,
        lanes: int = 1,
        shared: Mapping[str, str] | None = None,
        stacks: Mapping[str, int] | None = None,
        reward: str | None = None,
        terminated: str | None = None,
        truncated: str | None = None,
        following: str | Sequence[str] | None = None,
        backend: Any = "numpy",
        device: Any = None,
        casting: Casting = "same_kind",
        seed: int | None = None,
    ) -> None:
        self._renew_lock()
        self._nest = Nest(data_spec)
        self._backend = select_backend(backend, device)
        self._books = self._backend.bookkeeping
        self._floats = self._backend.float_dtype  # of JAX in a fifth of the time of an update
        self._ring, self._lanes = self._rows_for(capacity, lanes)
        shared, stacks = _by_path("shared", shared), _by_path("stacks", stacks)
        self._roles = Roles.of(self._nest, reward, terminated, truncated, following, shared)
        self._options = {
            "shared": shared,
            "stacks": stacks,
            "reward": self._roles.reward,
            "terminated": self._roles.terminated,
            "truncated": self._roles.truncated,
            "following": following if following is None or isinstance(following, str) else list(following),
        }
        self._layout = self._laid_out(shared, stacks, casting)
        self._windows = Windows(self._layout, self._ring, self._lanes, self._books)
        self._random = self._backend.bookkeeping_random(seed)
        self._sampler = self._opened(Uniform() if sampler is None else sampler)
        self._draws = Draws(self._sampler, self._random, self._books)
        self._sampled = 0
        self._meter = Meter()
        _live_buffers.add(self)

    @classmethod
    def like(cls, item: Any, capacity: int, **options: Any) -> ReplayBuffer:
        """A buffer of items like `item`, a nest of arrays of any library and Python numbers.

        Parameters
        ----------
        item : nest of arrays and numbers
            An example; it is not added.
        capacity : int
            How many items are kept.
        **options
            Those of the class.
        """
        return cls(example_spec(item), capacity, **options)

    def _renew_lock(self) -> None:
        self.lock = threading.RLock()

    def _on_device(self) -> AbstractContextManager[object]:
        """What every method works in: the device of the arrays is the current one, whichever it is for the caller."""
        # Some libraries make what they are not told a device for on the current one, and run kernels there, wherever
        # the arrays are.
        return self._backend.here()

    # Its parts ------------------------------------------------------------------------------------------------------

    def _rows_for(self, capacity: int, lanes: int) -> tuple[Ring, Lanes]:
        """The ring of so many items, and its lanes."""
        capacity, lanes = as_count("capacity", capacity), as_count("lanes", lanes)
        if lanes > capacity:
            raise ValueError(f"expected a capacity of {lanes} or more, a row for each lane, found {capacity}")
        ring = Ring(capacity, self._backend)
        return ring, Lanes(lanes, ring, self._books)

    def _laid_out(self, shared: dict[str, str], stacks: dict[str, int], casting: Casting) -> Plain:
        """The storages of the items, and how they are in them."""
        options: dict[str, Any] = {"backend": self._backend, "casting": casting}
        if shared or stacks:
            return Shared(self._nest, self._ring, self._lanes, shared, stacks, self._roles, options)
        storage = Storage(self._nest.data_spec, self._ring.capacity, **options)
        return Plain(storage, self._ring, self._lanes, self._roles)

    def _opened(self, sampler: Sampler) -> Sampler:
        """The sampler, ready for this buffer."""
        if not isinstance(sampler, Sampler):
            raise TypeError(f"expected a sampler, such as Prioritized(), found {sampler!r:.80}")
        sampler.open(self._ring.capacity, self._books, self._random)
        return sampler

    # Where things are -----------------------------------------------------------------------------------------------

    @property
    def data_spec(self) -> Any:
        """The nest of `ArraySpec` that items are instances of, in containers of its own."""
        return self._nest.pack(self._nest.specs)

    @property
    def capacity(self) -> int:
        """How many items are kept."""
        return self._ring.capacity

    @property
    def sampler(self) -> Sampler:
        """What draws the items; the `beta` of `Prioritized` may be changed at any time, as the `newest` of `Recent`."""
        return self._sampler

    @property
    def lanes(self) -> int:
        """How many environments the items come from."""
        return self._lanes.count

    @property
    def backend(self) -> Backend:
        """The array library and device."""
        return self._backend

    @property
    def device(self) -> str:
        """Where the items are: "cpu", "cuda:0", ..."""
        return self._backend.device

    @property
    def storage(self) -> Storage:
        """What the items are in, as they are stored: without what is shared, stacks as frames. To be read only."""
        return self._layout.storages["items"]

    @property
    def size(self) -> int:
        """How many items are there."""
        return len(self._ring.items)

    @property
    def total_added(self) -> int:
        """How many items were ever added."""
        return self._ring.total

    @property
    def nbytes(self) -> int:
        """The bytes of all that items are stored in, without what a sampler keeps."""
        return sum(storage.nbytes for storage in self._storages().values())

    def _storages(self) -> dict[str, Storage]:
        """All storages that items are in, by name."""
        distances = self._lanes.distances
        return {**self._layout.storages, **({} if distances is None else {"distances": distances})}

    def _state(self) -> dict[str, Any]:
        """All that the buffer goes on from, but for its storages: numbers, strings, and NumPy arrays by name."""
        return {
            "options": {**self._options, "lanes": self._lanes.count},
            "ring": self._ring.state(),
            "lanes": self._lanes.state(),
            "layout": self._layout.state(),
            "sampler": self._sampler.state(self._ring.items),
            "random": self._random.state(),
            "sampled": self._sampled,
            "levels": list(self._draws.levels),
        }

    def _restore(self, state: dict[str, Any], distances: Storage | None) -> None:
        """Go on from what `_state` returned, in an empty buffer of the same options whose storages are filled.

        All but the sampler, which comes after it and may be one of the user's own.
        """
        self._ring.restore(state["ring"])
        self._lanes.restore(state["lanes"], distances)
        self._layout.restore(state["layout"])
        if state["random"]["kind"] == self._random.kind:
            self._random.restore(state["random"])
        self._sampled = int(state["sampled"])
        of_all, of_some = state.get("levels", [0, 0])
        self._draws.levels = [max(0, int(of_all)), max(0, int(of_some))]
        self._meter = Meter(self._ring.total, self._sampled)

    def __reduce__(self) -> Any:
        raise TypeError("a ReplayBuffer is not copied or pickled; save it, and bring it back by anystore.load")

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        head = f"{len(self)} of {self.capacity} items, {self.total_added} added, on {self.device}"
        return f"ReplayBuffer({head}, {type(self._sampler).__name__})\n{self.storage!r}"

    # Writing --------------------------------------------------------------------------------------------------------

    def add(self, item: Any) -> None:
        """Add an item; with several lanes, one of each: a batch of as many items as lanes.

        (What comes in batches whatever the number of lanes, as from a vector environment, goes to `extend`.)

        Parameters
        ----------
        item : nest
            As `Storage.set` takes it; it is copied.

        Raises
        ------
        ValueError, TypeError, OverflowError
            As `Storage.set`; nothing has changed then.
        """
        if self._lanes.count > 1:
            count = count_items(self._nest, item, self._lanes.count)
            if count != self._lanes.count:
                raise ValueError(f"expected an item of each of {self._lanes.count} lanes, found {count} items")
            self._extend(item, None)
        else:
            self._add(item)
        self._layout.warn()

    def _add(self, item: Any) -> None:
        try:
            with self.lock, self._on_device():
                first = self._ring.total
                try:
                    self._layout.write_one(item)
                    self._advance(1)
                except BaseException as error:
                    self._mend(error, first, 1)
                    raise
        except ValueError as error:
            if not looks_like_a_batch(self._nest, item):
                raise
            raise ValueError(f"{error}; this looks like a batch, which extend takes") from None

    def extend(self, batch: Any, *, lanes: Any = None) -> None:
        """Add a batch of items, oldest first.

        Parameters
        ----------
        batch : nest
            As `Storage.set` takes it: each leaf has an axis of items in front, any number of them. With several lanes
            that is whole steps, an item of each lane in turn: steps before lanes. Items of several environments in a
            buffer of one lane are taken for an episode of one; successive items of one of several environments need its
            lane named.
        lanes : int, sequence of int, or mask over the lanes, optional
            For steps of some of the lanes: those that the items are of, in turn. With an int they are successive items
            of that lane.

        Raises
        ------
        ValueError, TypeError, OverflowError
            As `Storage.set`, or if the lanes are not right; nothing has changed then.

        Warns
        -----
        RuntimeWarning
            Once, with `shared` or `stacks`, if most items do not begin with what followed the one before.
        """
        self._extend(batch, lanes)
        self._layout.warn()

    def _extend(self, batch: Any, lanes: Any) -> None:
        count = count_items(self._nest, batch, self._lanes.count)
        try:
            with self.lock, self._on_device():
                of_items = self._lanes.of_batch(count, lanes)
                in_turn = self._lanes.count if of_items is None else len(of_items)
                for part, number in self._layout.parts_of(batch, count, in_turn):
                    first = self._ring.total
                    try:
                        self._layout.write(part, number, of_items)
                        self._lanes.added(number, of_items)
                        self._advance(number)
                    except BaseException as error:
                        self._mend(error, first, number)
                        raise
        except ValueError:
            check_counts(self._nest, batch)
            raise

    def _advance(self, count: int) -> None:
        self._ring.advance(count)
        self._follow(count)

    def _follow(self, count: int) -> None:
        """Have the others go on, now that the ring has advanced. Idempotent."""
        self._lanes.settle()
        self._layout.settle()
        newest = min(count, self._ring.capacity)
        self._sampler.added(range(self._ring.total - newest, self._ring.total))

    def _mend(self, error: BaseException, first: int, count: int) -> None:
        """After an error in a write of items: have all of it, or nothing but the loss of those it was to overwrite."""
        if isinstance(error, _REFUSALS):
            return
        if self._ring.total > first:
            self._follow(count)
            return
        self._ring.forget(first + count - self._ring.capacity)
        self._lanes.undo()
        self._layout.undo()

    def end_episode(self, lanes: Any = None) -> None:
        """Let the episodes of these lanes, or of all, end with their newest items, as if these had been truncated.

        For an environment that is reset, or left, before its episode is over.

        Parameters
        ----------
        lanes : int, sequence of int, or mask over the lanes, optional
            Which; all by default.

        Raises
        ------
        ValueError
            If the spec has no flag for it, or the lanes are not right.
        """
        with self.lock, self._on_device():
            named = self._lanes.named(lanes)
            try:
                self._layout.end(named)
            except _REFUSALS:
                raise
            except BaseException:
                self._layout.end(named)  # what was done of it does no harm twice
                raise

    def clear(self) -> None:
        """Forget all items; `total_added` goes on from where it is, and settings and generator stay as they are."""
        with self.lock, self._on_device():
            self._ring.clear()
            self._lanes.clear()
            self._layout.clear()
            self._sampler.clear()

    def save(
        self, path: str | os.PathLike[str], *, keep: int = 0, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Save to the directory `path`, all or nothing, for `anystore.load` to go on from, with the very same draws.

        Saved again to the same path, what is written are the items that were added since, and in full what the
        sampler keeps of each item (8 bytes, for `Prioritized`). The buffer is locked meanwhile. What `batches` has
        drawn ahead is not saved, and not drawn again.

        Parameters
        ----------
        path, keep, progress
            As for `Storage.save`.

        Raises
        ------
        SnapshotError, ValueError, OSError
            As `Storage.save`, and if the sampler has a state of something else than numbers, strings, and NumPy arrays
            by name; what was there is still there then.

        Warns
        -----
        RuntimeWarning
            If the sampler has priorities to update, and no `state`.

        Notes
        -----
        The draws go on with the same generator, that is on a backend whose generator is of the same kind; on another
        one it starts anew, from a seed that follows from the state. A sampler of a class of your own is passed to
        `anystore.load`.
        """
        from anystore.replay.saved import save_buffer

        save_buffer(self, path, keep, progress)

    # Sampling -------------------------------------------------------------------------------------------------------

    def sample(
        self,
        batch_size: int,
        *,
        num_steps: int | None = None,
        at_end: AtEnd = "cross",
        n_step: int | None = None,
        discount: float | None = None,
        to: str | None = None,
        device: Any = None,
    ) -> Sample:
        """Items, windows of items, or items with n-step returns, drawn by the sampler.

        Parameters
        ----------
        batch_size : int
            How many.
        num_steps : int, optional
            For windows: how many successive items of one lane each has. None reaches across the head of the ring.
        at_end : {"cross", "pad", "whole"}, default "cross"
            What a window does at the end of an episode. "cross": it goes on with the next one. "pad": it ends, its
            last item is repeated, and `Sample.mask` tells; it does the same at the newest item of its lane. "whole":
            it is not drawn; only windows within an episode are, each with the same chance among these. An episode ends
            where its flags say so or `end_episode` did; with `shared` or `stacks` also where an item does not begin
            with what followed the one before it.
        n_step : int, optional
            For n-step returns: each item stands for so many successive steps, or for fewer where the episode or the
            lane's newest item ends them. Its reward is the discounted sum of theirs, what follows it and its flags are
            those of the last one, and `Sample.discounts` is what the value of the following observation counts: not
            cut at truncation, 0 at termination.
        discount : float, optional
            What a reward one step later counts in n-step returns; 0.99 by default.
        to, device : optional
            The library whose arrays to hand over, and where, as for `batches`; by default the buffer's own, which
            `Sample.rows` always are of.

        Returns
        -------
        Sample

        Raises
        ------
        ValueError
            If there is nothing to draw from, or not enough; if the spec has no leaf for what is asked.
        ValueError, ImportError
            As `to_library`, for `to` and `device`; nothing is drawn where there is no such library or device.

        Notes
        -----
        n-step returns: Sutton and Barto, "Reinforcement Learning: An Introduction" (2018), section 7.1.
        """
        batch_size = as_count("batch_size", batch_size)
        how = _How.of(num_steps, at_end, n_step, discount)
        check_target(to, device)
        with self.lock, self._on_device():
            candidates, usable = self._choice(how)
            drawn = self._draws.draw(batch_size, candidates, usable)
            too_old = candidates.start - self._ring.items.start
            places = drawn + too_old if too_old else drawn
            sample = self._sample_of(places, how, self._draws.weights(drawn, candidates))
            self._sampled += batch_size
        return sample if to is None else hand_over(sample, to, device=device)

    def one_pass(
        self,
        batch_size: int,
        *,
        num_steps: int | None = None,
        at_end: AtEnd = "cross",
        n_step: int | None = None,
        discount: float | None = None,
    ) -> Iterator[Sample]:
        """Every item, or window, that can be sampled now, once, in random order; the last batch may be smaller.

        Takes what `sample` takes but for `to`; the sampler has no part in it. Items that begin no such window are left
        out, as are those that are overwritten before their turn has come. With `batches` a thread draws ahead
        (``passes=1``), and hands over.

        Raises
        ------
        ValueError
            As `sample`, at once.
        """
        batch_size = as_count("batch_size", batch_size)
        how = _How.of(num_steps, at_end, n_step, discount)
        with self.lock, self._on_device():
            candidates, _ = self._choice(how)
            numbers = np.arange(candidates.start, candidates.stop, dtype=np.int64)
            if not len(self._first_usable(numbers, 1, how)[0]):
                raise ValueError(
                    f"of {len(numbers)} candidates none can be drawn, for want of such a window; ask for fewer steps, "
                    "or add more"
                )
            numbers = numbers[to_numpy(self._random.permutation(len(numbers)))]
        return self._pass_through(numbers, batch_size, how)

    def _pass_through(self, numbers: NDArray[np.int64], batch_size: int, how: _How) -> Iterator[Sample]:
        while len(numbers):
            with self.lock, self._on_device():
                chosen, numbers = self._first_usable(numbers, batch_size, how)
                if not len(chosen):
                    return
                self._sampled += len(chosen)
                sample = self._sample_of(self._ring.places_of(chosen), how)
            yield sample

    def _first_usable(
        self, numbers: NDArray[np.int64], count: int, how: _How
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The first `count` of these items that are there and of use, or all that are, and those behind them."""
        too_old, tests = self._requirements(how)
        chosen, length = numbers[:0], count
        while len(numbers) and len(chosen) < count:
            some = numbers[:length]
            good = np.flatnonzero(some >= self._ring.items.start + too_old)
            for test in tests if len(good) else ():
                good = good[to_numpy(test(self._ring.places_of(some[good])))]
            good = good[: count - len(chosen)]
            chosen = np.concatenate([chosen, some[good]])
            numbers = numbers[good[-1] + 1 if len(chosen) == count else len(some) :]
            length = min(2 * length, max(count, _LOOKED_AT))
        return chosen, numbers

    def _requirements(self, how: _How) -> tuple[int, list[Usable]]:
        """How many of the oldest items cannot be read, and what tells of others whether they are of use."""
        too_old = self._layout.margin * self._lanes.count if self._ring.overwrote else 0
        tests = []
        if (beginning := self._windows.beginning(how.num_steps or 1, how.at_end)) is not None:
            tests.append(beginning)
        if too_old and not self._lanes.in_step:
            tests.append(self._layout.readable)
        return too_old, tests

    def _choice(self, how: _How) -> tuple[range, Usable | None]:
        """The items to draw from, and what tells which of their places are of use; None if all are."""
        items = self._ring.items
        if not items:
            raise ValueError("the buffer is empty; add items before sampling")
        if how.n_step is not None:
            self._roles.check_n_step(self._nest)
        elif how.at_end != "cross":
            self._roles.check_flags(self._nest, f'windows with at_end="{how.at_end}"')
            if not self._layout.knows_ends:
                raise ValueError(
                    f'at_end="{how.at_end}" needs to know where episodes end; give the spec bool leaves "terminated" '
                    'and "truncated", or name them: ReplayBuffer(..., terminated="path")'
                )
        too_old, tests = self._requirements(how)
        steps = (how.num_steps or 1) - 1
        too_new = 0 if how.at_end == "pad" else steps * (self._lanes.count if self._lanes.in_step else 1)
        candidates = range(items.start + too_old, max(items.start + too_old, items.stop - too_new))
        if not candidates:
            raise ValueError(
                f"{len(items)} items of {self._lanes.count} lane(s) hold no window of {steps + 1} steps that can be "
                "drawn; ask for fewer steps, or add more"
            )
        if not tests:
            return candidates, None

        def usable(places: Array) -> Array:
            places = places + too_old if too_old else places
            return functools.reduce(operator.and_, [test(places) for test in tests])

        return candidates, usable

    def _sample_of(self, places: Array, how: _How, weights: Array | None = None) -> Sample:
        """The items at these places, or what begins with them."""
        computed = {"rows": self._ring.numbers(places)}
        if weights is not None:
            computed["weights"] = weights
        parts: dict[str, Array] = {}
        if how.n_step is not None:
            parts, computed["reward"], computed["discounts"] = self._merged(places, how.n_step, how.discount)
        elif how.num_steps is None:
            items = self._layout.read(places)
        elif how.at_end == "pad":
            steps, computed["mask"] = self._windows.padded(places, how.num_steps)
            items = self._layout.read(steps)
        else:
            items = self._layout.read(self._windows.steps(places, how.num_steps))
        given = dict(zip(computed, self._backend.from_bookkeeping(list(computed.values()))))
        if how.n_step is not None:
            parts[self._roles.reward] = given.pop("reward")  # type: ignore[index]  # there is one, or `_merged` fails
            items = self._nest.pack([parts[path] for path in self._nest.paths])
        return Sample(items, **given)

    def _merged(self, places: Array, n_step: int, discount: float) -> tuple[dict[str, Array], Array, Array]:
        """Items that stand for `n_step` steps each: their parts by path, their rewards, and what values after count."""
        reward, terminated = self._roles.reward, self._roles.terminated
        assert reward is not None
        assert terminated is not None
        taken = self._backend.to_bookkeeping
        steps, mask = self._windows.padded(places, n_step)
        last = tuple(dict.fromkeys((*self._roles.following, *self._roles.flags)))  # flags may be part of what follows
        parts = self._layout.read(steps[:, -1], last)
        rewards, ended = taken(self._layout.read(steps, (reward,))[reward]), taken(parts[terminated])
        others = tuple(path for path in self._nest.paths if path not in parts and path != reward)
        parts |= self._layout.read(places, others)
        return parts, *self._windows.returns(rewards, mask, ended, discount)

    def batches(
        self,
        batch_size: int,
        *,
        prefetch: int = 2,
        to: str | None = None,
        copy: bool | None = None,
        device: Any = None,
        count: int | None = None,
        passes: int | None = None,
        num_steps: int | None = None,
        at_end: AtEnd = "cross",
        n_step: int | None = None,
        discount: float | None = None,
    ) -> Batches:
        """Samples without end, or all items in so many passes, drawn ahead on a thread while the learner works.

        Parameters
        ----------
        batch_size : int
            How many items each has.
        prefetch, to, copy, device, count, passes
            As for `Batches`: how many are drawn ahead, in the arrays of which library and on which device they are
            handed over, how many there are, and how many times `one_pass` is to go through the buffer instead.
        num_steps, at_end, n_step, discount
            As for `sample`.

        Returns
        -------
        Batches
            An iterator of `Sample`.

        Raises
        ------
        ValueError, ImportError
            As `Batches`, at once; what `sample` raises comes with the first batch.
        """
        return Batches(
            self,
            as_count("batch_size", batch_size),
            prefetch=prefetch,
            to=to,
            copy=copy,
            device=device,
            count=count,
            passes=passes,
            num_steps=num_steps,
            at_end=at_end,
            n_step=n_step,
            discount=discount,
        )

    def update_priorities(self, rows: Array, priorities: Any) -> int:
        """Give items that were sampled new priorities; those that are gone since are left out.

        Parameters
        ----------
        rows : array of integers, shape (n,)
            `Sample.rows`. Of several priorities for one item the last stays.
        priorities : array of floats, shape (n,)
            At least 0, such as the magnitude of a temporal-difference error; of any library.

        Returns
        -------
        int
            How many rows still held the item that was sampled.

        Raises
        ------
        ValueError
            For priorities that are negative, infinite or NaN, or not as many as rows; nothing has changed then.
        TypeError
            If the sampler has no priorities, or the rows are no integers.
        """
        backend, xp = self._books, self._books.xp
        with self.lock, self._on_device():
            numbers = self._as_numbers(rows)
            values = as_priorities(priorities, int(numbers.shape[0]), backend, self._floats)
            places, count, size = self._ring.places(numbers), int(numbers.shape[0]), self.size
            if not backend.inside(places, size):
                there = (places >= 0) & (places < size)
                count = backend.count_nonzero(there)
                chosen = backend.flatnonzero(there)[:count]
                places, values = xp.take(places, chosen, axis=0), xp.take(values, chosen, axis=0)
            if count or type(self._sampler).update is Sampler.update:  # which refuses
                self._sampler.update(self._ring.rows(places), values)
            return count

    def _as_numbers(self, rows: Any) -> Array:
        """Running numbers as a user gave them, on the device."""
        if isinstance(rows, Sample):
            raise TypeError("expected rows as in Sample.rows, found the sample itself")
        array = as_array(rows)
        if array.shape == (0,) and isinstance(rows, (list, tuple)):
            array = array.astype(np.intp)
        if len(array.shape) != 1 or as_dtype(array.dtype).kind not in "iu":
            raise TypeError(f"expected rows as in Sample.rows, a flat array of integers, found {rows!r:.80}")
        return self._books.own(array, self._books.index_dtype)

    def _counts(self) -> Counts:
        """What `stats` are made of."""
        with self.lock, self._on_device():
            items = self._ring.items
            some = items[:: -(-len(items) // _LOOKED_AT) or 1]
            return Counts(
                size=len(items),
                capacity=self._ring.capacity,
                total_added=self._ring.total,
                total_sampled=self._sampled,
                nbytes=self.nbytes,
                overwrote=self._ring.overwrote,
                lanes=self._lanes.count,
                behind=self._lanes.every_behind(),
                ends=self._layout.every_end() if self._layout.knows_ends else None,
                rewards=None if self._roles.reward is None else self._layout.every(self._roles.reward),
                priorities=to_numpy(self._sampler.priorities(some)) if isinstance(self._sampler, Prioritized) else None,
            )

    def stats(self) -> Stats:
        """How full the buffer is, how fast it is used, and what of: items, bytes, rates, episodes, priorities.

        The rates are those since the last call, the means those of the newest 100 episodes. It reads the flags and
        rewards of all items, and the priorities of up to 65,536, spread evenly over all.
        """
        return self._meter.read(self._counts())

    @property
    def priorities(self) -> Array:
        """The priorities of all items, oldest first, where the sampler is `Prioritized`.

        Raises
        ------
        TypeError
            If it is another.
        """
        with self.lock, self._on_device():
            if not isinstance(self._sampler, Prioritized):
                raise TypeError(f"a {type(self._sampler).__name__} sampler has no priorities; use Prioritized")
            (priorities,) = self._backend.from_bookkeeping([self._sampler.priorities(self._ring.items)])
            return priorities


_live_buffers: weakref.WeakSet[ReplayBuffer] = weakref.WeakSet()
"""All buffers of the process."""


def _renew_locks() -> None:
    for buffer in list(_live_buffers):
        buffer._renew_lock()


if hasattr(os, "register_at_fork"):
    # In the child there is no thread that could give back a lock that another one held at that moment.
    os.register_at_fork(after_in_child=_renew_locks)


def _by_path(name: str, mapping: Mapping[str, Any] | None) -> dict[str, Any]:
    """A mapping that the user gave, checked, as a dict of our own."""
    if mapping is not None and not isinstance(mapping, Mapping):
        raise TypeError(f"expected {name} to be a mapping by path, found {mapping!r:.80}")
    return dict(mapping or {})


_REFUSALS = ValueError, TypeError, OverflowError
"""The errors of a write of which nothing was written."""


class _How(NamedTuple):
    """What a sample is to be of: items, windows, or n-step returns."""

    num_steps: int | None
    at_end: str
    n_step: int | None
    discount: float

    @classmethod
    def of(cls, num_steps: int | None, at_end: str, n_step: int | None, discount: float | None) -> _How:
        """As the user gave it, checked."""
        num_steps = None if num_steps is None else as_count("num_steps", num_steps)
        n_step = None if n_step is None else as_count("n_step", n_step)
        if num_steps is not None and n_step is not None:
            raise ValueError("expected num_steps for windows or n_step for n-step returns, found both")
        if at_end not in ("cross", "pad", "whole"):
            raise ValueError(f'expected at_end to be "cross", "pad" or "whole", found {at_end!r}')
        if num_steps is None and at_end != "cross":
            remedy = "give num_steps= as well" if n_step is None else "n-step returns end with the episode without it"
            raise ValueError(f'at_end="{at_end}" is for windows; {remedy}')
        if discount is None:
            discount = 0.99
        elif n_step is None:
            raise ValueError(f"discount={discount!r} is for n-step returns; give n_step= as well")
        if not isinstance(discount, (int, float, np.number)) or not 0 <= discount < float("inf"):
            raise ValueError(f"expected a finite discount of 0 or more, found {discount!r}")
        return cls(num_steps, at_end, n_step, float(discount))

"""Which items a sample holds: the interface, and the samplers that come with it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from anystore.backends import Backend
from anystore.backends.base import Array
from anystore.backends.random import Random
from anystore.convert import is_array, to_numpy
from anystore.replay.sum_tree import SumTree
from anystore.specs import as_count, limits


class Sampler(ABC):
    """What draws items for a `ReplayBuffer`; for one of your own, define `draw`, and more where it is needed.

    Items have three names. `draw`, `chances` and `weights` go by their place among those that may be drawn: 0 is the
    oldest, ``len(items) - 1`` the newest. `items` is the range of their running numbers. `update` goes by the row of
    the storage: item number ``n`` is in row ``n % capacity``.

    Attributes
    ----------
    distinct : bool
        Whether a sample may hold an item once only. The buffer sees to it.
    inside : bool
        Whether `draw` finds nothing but places in ``range(len(items))``, so that the buffer need not look. It is taken
        from the class that defines `draw`.
    capacity : int
        The number of rows.
    backend : Backend
        Whose arrays places, chances and priorities are: that of the buffer, or NumPy's for a buffer in main memory,
        where other libraries take many times as long for so few numbers.
    random : Random
        Draws such arrays, by the generator of the buffer's library: ``integers(high, count)``, ``uniform(count)`` and
        ``permutation(high)``.

    Notes
    -----
    The buffer calls a sampler under its lock. A sampler belongs to one buffer. One that keeps something, such as what
    `update` tells it, defines `state` and `restore` as well, or a snapshot of the buffer lacks it.

    Examples
    --------
    >>> import numpy as np
    >>> from anystore import ArraySpec
    >>> from anystore.replay import ReplayBuffer, Sampler
    >>> class Newer(Sampler):
    ...     "The newer, the likelier: the item at place k as 2 k + 1."
    ...
    ...     def draw(self, count, items):
    ...         xp = self.backend.xp
    ...         return xp.astype(len(items) * xp.sqrt(self.random.uniform(count)), self.backend.index_dtype)
    ...
    ...     def chances(self, places, items):
    ...         return 2 * places + 1
    >>> buffer = ReplayBuffer(ArraySpec((), "int64"), 100, sampler=Newer(), seed=0)
    >>> buffer.extend(np.arange(100))
    >>> int(np.median(buffer.sample(1000).items))
    72
    """

    distinct = False
    inside = False
    capacity: int
    backend: Backend
    random: Random

    def open(self, capacity: int, backend: Backend, random: Random) -> None:
        """Make ready for a buffer of so many rows."""
        if hasattr(self, "capacity"):
            raise ValueError(
                f"this {type(self).__name__} has a buffer already; give each buffer and each load one of its own"
            )
        self.capacity, self.backend, self.random = capacity, backend, random

    @abstractmethod
    def draw(self, count: int, items: range) -> Array:
        """Places of `count` items: a flat array of integers.

        The buffer draws again for those that are not in ``range(len(items))``, or that it cannot use.
        """

    def chances(self, places: Array, items: range) -> Array | None:
        """How likely `draw` finds each of these places, up to a factor; None if all are as likely.

        To be defined wherever `draw` favours some items: where few of its draws are of use, and without replacement,
        the buffer draws by these.
        """
        return None

    def weights(self, places: Array, items: range) -> Array | None:
        """The importance weight of each item of a sample; None if all are the same."""
        return None

    def added(self, items: range) -> None:  # noqa: B027  # by default there is nothing to do
        """Items of these numbers were added; at most `capacity`. After an interrupt it may be told so once more.

        It should not raise: the items are there by then, and stay.
        """

    def update(self, rows: Array, priorities: Array) -> None:
        """The items in these rows of the storage have new priorities; the buffer has left out those that are gone."""
        raise TypeError(f"a {type(self).__name__} sampler has no priorities to update; use Prioritized")

    def clear(self) -> None:  # noqa: B027  # by default there is nothing to do
        """All items are gone."""

    def state(self, items: range) -> dict[str, Any]:
        """What `restore` takes: numbers, strings and NumPy arrays by name; `items` are there.

        The state of `random` is no part of it.
        """
        return {}

    def restore(self, state: dict[str, Any], items: range) -> None:  # noqa: B027  # by default there is nothing to do
        """Be as the sampler was that `state` is of; `items` are there, the newest of those that were there then."""


class _Ours(Sampler):
    """One that comes with anystore, and can be made again of its settings."""

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """What another one is made with."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._settings().items())})"


class Uniform(_Ours):
    """Every item with the same chance.

    Parameters
    ----------
    replacement : bool, default True
        Whether a sample may hold an item more than once. For every item once, in random order, whatever the
        sampler: `ReplayBuffer.one_pass`.
    """

    inside = True

    def __init__(self, *, replacement: bool = True) -> None:
        self.distinct = not replacement

    def _settings(self) -> dict[str, Any]:
        return {"replacement": not self.distinct}

    def draw(self, count: int, items: range) -> Array:
        return self.random.integers(len(items), count)


class Recent(_Ours):
    """Every one of the newest items with the same chance, and no other; of windows, of those that can begin one.

    Parameters
    ----------
    newest : int
        How many items; all of them while there are fewer. For windows of k steps the newest k - 1 items of each lane,
        which cannot begin one, are left out first. If the lanes are out of step, no more than k - 1 items in all are,
        so that some of the `newest` begin no window: let it be many times the number of lanes then.
    replacement : bool, default True
        Whether a sample may hold an item more than once.
    """

    inside = True

    def __init__(self, newest: int, *, replacement: bool = True) -> None:
        self.newest = newest
        self.distinct = not replacement

    @property
    def newest(self) -> int:
        """How many items; it may be changed at any time."""
        return self._newest

    @newest.setter
    def newest(self, newest: int) -> None:
        self._newest = as_count("newest", newest)

    def _settings(self) -> dict[str, Any]:
        return {"newest": self.newest, "replacement": not self.distinct}

    def draw(self, count: int, items: range) -> Array:
        oldest = max(0, len(items) - self.newest)
        return self.random.integers(len(items) - oldest, count) + oldest

    def chances(self, places: Array, items: range) -> Array:
        xp = self.backend.xp
        dtype = self.backend.native_dtype(self.backend.float_dtype)
        return xp.astype(places >= len(items) - self.newest, dtype)


class Prioritized(_Ours):
    """Items with a chance in proportion to ``(priority + epsilon) ** alpha``; a new one has the highest there was.

    Parameters
    ----------
    alpha : float, default 0.6
        How much priorities count; 0 makes all items as likely. It cannot be changed, nor can `epsilon`: the priorities
        are kept to its power.
    beta : float, default 0.4
        How much of the bias the importance weights make up for, ``(1 / (n * chance)) ** beta``, scaled so that the
        largest of a sample is 1. An attribute that may be changed at any time, as annealing does.
    epsilon : float, default 1e-6
        Keeps items of priority 0 from never being drawn again.

    Attributes
    ----------
    highest : float
        The highest priority that there ever was, also before a `clear`; what items have until they are updated. 1 at
        first.

    Notes
    -----
    The proportional variant of Schaul et al., "Prioritized Experience Replay" (2016), https://arxiv.org/abs/1511.05952,
    with independent draws where the paper has one for each of as many strata. Adding items costs nothing until the
    next draw.

    The priority of a window is that of the item it begins with, and every item begins one: an update reaches one of
    many windows that overlap. For priorities of sequences, let windows begin at some items only, as the README shows.
    """

    def __init__(self, *, alpha: float = 0.6, beta: float = 0.4, epsilon: float = 1e-6) -> None:
        self._alpha, self._epsilon = _setting("alpha", alpha), _setting("epsilon", epsilon)
        self.beta = beta
        self.highest = 1.0

    @property
    def beta(self) -> float:
        """How much of the bias the weights make up for; it may be changed at any time."""
        return self._beta

    @beta.setter
    def beta(self, beta: float) -> None:
        self._beta = _setting("beta", beta)

    @property
    def alpha(self) -> float:
        """How much priorities count."""
        return self._alpha

    @property
    def epsilon(self) -> float:
        """What is added to each priority."""
        return self._epsilon

    def _settings(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "beta": self.beta, "epsilon": self.epsilon}

    def open(self, capacity: int, backend: Backend, random: Random) -> None:
        super().open(capacity, backend, random)
        self._tree = SumTree(capacity, backend)
        self._waiting = range(0)
        floats = np.finfo(backend.float_dtype)
        self._most = float(floats.max) / 2 / capacity  # so that no sum is infinite
        self._least = float(floats.tiny)

    def draw(self, count: int, items: range) -> Array:
        self._let_in()
        if self.epsilon**self.alpha < self._least and not self._tree.total() > 0:
            raise ValueError("no item has a priority above 0; update priorities, or give Prioritized an epsilon")
        uniforms = self.random.uniform(self._tree.depth * count)
        rows = self._tree.find(self.backend.xp.reshape(uniforms, (self._tree.depth, count)))
        return (rows - items.start % self.capacity) % self.capacity

    def chances(self, places: Array, items: range) -> Array:
        self._let_in()
        return self._tree.get((places + items.start % self.capacity) % self.capacity)

    def weights(self, places: Array, items: range) -> Array:
        """The weights, of float32, the largest of them 1."""
        # The number of items and the sum of all priorities fall out of the scaling.
        chances = self.chances(places, items)
        weights = (chances / self.backend.xp.min(chances)) ** -self.beta
        return self.backend.xp.astype(weights, self.backend.native_dtype(np.dtype("float32")), copy=False)

    def added(self, items: range) -> None:
        start = self._waiting.start if self._waiting else items.start
        self._waiting = range(max(start, items.stop - self.capacity), items.stop)

    def update(self, rows: Array, priorities: Array) -> None:
        self._let_in()
        highest = max(self.highest, self.backend.bounds(priorities)[1])
        if self.alpha * math.log(highest + self.epsilon) > math.log(self._most):
            raise ValueError(
                f"expected priorities whose sum, each to the power of alpha={self.alpha}, is finite, found {highest}; "
                "clip them"
            )
        self.highest = highest
        self._tree.set(rows, (priorities + self.epsilon) ** self.alpha)

    def clear(self) -> None:
        self._waiting = range(0)
        self._tree.set_run(range(self.capacity), 0.0)

    def priorities(self, items: range) -> Array:
        """The priorities of these items, oldest first."""
        scaled, xp = self._scaled(items), self.backend.xp
        found = scaled ** (1 / self.alpha) - self.epsilon if self.alpha else scaled - self.epsilon
        return xp.where(found > 0, found, xp.zeros_like(found))  # which rounding may have left below

    def state(self, items: range) -> dict[str, Any]:
        """The settings, the highest priority, and what the tree holds of the items, oldest first, as "numbers".

        The settings are part of it, since the rest says nothing without them: a sampler of a class derived from this
        one that is handed to `anystore.load` goes on with those of the one that was saved.
        """
        return {**self._settings(), "highest": self.highest, "numbers": to_numpy(self._scaled(items))}

    def restore(self, state: dict[str, Any], items: range) -> None:
        self._alpha, self.beta, self._epsilon = state["alpha"], state["beta"], state["epsilon"]
        self.highest = state["highest"]
        scaled = np.asarray(state["numbers"], self.backend.float_dtype)[-len(items) :]
        if items:
            self._tree.set(self._rows(items), self.backend.from_numpy(scaled))
        self._waiting = range(0)

    def _rows(self, items: range) -> Array:
        rows = np.arange(items.start, items.stop, items.step) % self.capacity
        return self.backend.as_index(rows)

    def _scaled(self, items: range) -> Array:
        """What the tree holds of items, ``(priority + epsilon) ** alpha``, oldest first."""
        self._let_in()
        return self._tree.get(self._rows(items))

    def _let_in(self) -> None:
        """Give the items that were added since the last time the highest priority."""
        scaled = (self.highest + self.epsilon) ** self.alpha
        while self._waiting:
            start = self._waiting.start % self.capacity
            run = range(start, min(self.capacity, start + len(self._waiting)))
            self._tree.set_run(run, scaled)
            self._waiting = range(self._waiting.start + len(run), self._waiting.stop)


def _setting(name: str, value: float) -> float:
    if not 0 <= value < float("inf"):
        raise ValueError(f"expected a finite {name} of 0 or more, found {value}")
    return float(value)


def as_priorities(priorities: Any, count: int, backend: Backend, given: np.dtype[Any]) -> Array:
    """Priorities as a user gave them, as `count` floats of the backend; `given` is what the user can have them in.

    Raises
    ------
    ValueError
        If there are not as many, or one is negative, infinite in `given`, or NaN.
    """
    dtype = backend.float_dtype
    with np.errstate(over="ignore"):  # what is too large for the dtype is refused below
        array = backend.own(priorities if is_array(priorities) else np.asarray(priorities, dtype), dtype)
    if array.shape != (count,):
        raise ValueError(f"expected {count} priorities, one for each row, found an array of shape {tuple(array.shape)}")
    _, largest = limits(given)
    lowest, highest = backend.bounds(array) if count else (0.0, 0.0)
    if not (lowest >= 0 and highest <= largest):  # nor if one is NaN
        wrong = to_numpy(array)
        wrong = wrong[~((wrong >= 0) & (wrong <= largest))]
        raise ValueError(
            f"expected finite priorities of 0 or more, such as the magnitude of an error, found {wrong[0]} "
            f"({len(wrong)} of {count})"
        )
    return array

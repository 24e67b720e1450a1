"""What a sampler draws, as far as it is of use."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anystore.backends import Backend
from anystore.backends.base import Array
from anystore.backends.random import Random
from anystore.convert import as_array, is_array, library_of, to_numpy
from anystore.replay.samplers import Prioritized, Sampler
from anystore.specs import as_dtype

Usable = Callable[[Array], Array]
"""Tells of places, the positions of items among those that may be drawn, which are of use."""

_HIGHEST = 9
"""The level from which on every item is looked at, instead of drawing still more."""
_FEW = 1 << 16
"""So many draws are made at any rate, before every one of fewer items is looked at."""


class Draws:
    """Places of items that a sampler draws, and others for those that are of no use.

    Parameters
    ----------
    sampler : Sampler
        What draws; one of the user's own is not trusted.
    random : Random
        For the draws that it does not make itself.
    books : Backend
        What places are computed with: the `bookkeeping` of the backend of the items.

    Attributes
    ----------
    levels : list of int
        How many more are drawn than are wanted, so that enough of them are of use, as it was found to be right before:
        where all items are of use, and where some are not.
    """

    def __init__(self, sampler: Sampler, random: Random, books: Backend) -> None:
        self._sampler = sampler
        self._random = random
        self._books = books
        self._is_inside = _is_inside(type(sampler))
        self._nothing = books.as_index(np.empty(0, np.intp))
        self.levels = [0, 0]

    def draw(self, count: int, items: range, usable: Usable | None) -> Array:
        """`count` places of these items, each as likely as the sampler has it among those that are of use.

        Raises
        ------
        ValueError
            If none is, or not as many as are wanted without replacement.
        """
        sampler, xp = self._sampler, self._books.xp
        kind = int(usable is not None)
        if self._is_inside and usable is None and not sampler.distinct:
            return self._drawn(count, items)
        if sampler.distinct and 2 * count > len(items):
            return self._draw_exactly(count, items, usable)
        places = self._nothing
        while self.levels[kind] < _HIGHEST and _drawn_at(self.levels[kind], count) <= max(count, len(items), _FEW):
            # The whole numbers that a level has, and not just as many as are missing, which would never be the same: a
            # library that compiles does so for every shape.
            more = self._drawn(_drawn_at(self.levels[kind], count) - places.shape[0], items)
            places = xp.concat([places, more]) if places.shape[0] else more
            if usable is None and not sampler.distinct and self._books.inside(places, len(items)):
                self.levels[kind] = 0
                return self._some(places, count, places.shape[0])
            good = self._good(places, items, usable)
            found = self._books.count_nonzero(good)
            if found >= count:
                self._choose_level(kind, count, found / places.shape[0])
                return xp.take(places, self._some(self._books.flatnonzero(good), count, found), axis=0)
            self.levels[kind] += 1
        self._refuse_strangers(places, items)
        return self._draw_exactly(count, items, usable)

    def _some(self, places: Array, count: int, found: int) -> Array:
        """`count` of the first `found`: any of them where a sampler of the user's own may have drawn in some order.

        Without replacement it is the first ones, the order of draws being what the chances of the later ones hang on.
        """
        if self._is_inside or self._sampler.distinct or found == count:
            return places[:count]
        return self._books.xp.take(places, self._random.permutation(found)[:count], axis=0)

    def _refuse_strangers(self, places: Array, items: range) -> None:
        """Refuse a sampler that finds nothing but places that are none, and does not say why that may be."""
        if self._is_inside or type(self._sampler).chances is not Sampler.chances or not places.shape[0]:
            return
        found = to_numpy(places)
        if not ((found >= 0) & (found < len(items))).any():
            self.levels = [0, 0]
            raise ValueError(
                f"expected places below {len(items)} from {type(self._sampler).__name__}.draw, found none among "
                f"{len(found)}: {found[:3].tolist()}, ..."
            )

    def _choose_level(self, kind: int, count: int, share: float) -> None:
        """Begin the next time at the lowest level that will do, if such a share of the draws is of use."""
        level = 0
        while level < _HIGHEST:
            drawn = _drawn_at(level, count)
            if drawn * share - 3 * math.sqrt(drawn * share * (1 - share)) >= count:  # three standard deviations
                break
            level += 1
        self.levels[kind] = level

    def _drawn(self, count: int, items: range) -> Array:
        places = self._sampler.draw(count, items)
        if self._is_inside and library_of(places) == self._books.library:
            return places
        if not is_array(places) or tuple(places.shape) != (count,) or as_dtype(places.dtype).kind not in "iu":
            raise TypeError(
                f"expected {count} places from {type(self._sampler).__name__}.draw, a flat array of integers, found "
                f"{places!r:.80}"
            )
        if library_of(places) != self._books.library:
            places = self._books.as_index(to_numpy(places))
        # A copy, since it may be an array that the sampler goes on to use.
        return self._books.xp.astype(places, self._nothing.dtype, copy=True)

    def weights(self, places: Array, items: range) -> Array | None:
        """The importance weights of what was drawn, of float32 and in memory of their own; None if all are the same.

        Raises
        ------
        TypeError
            If a sampler of the user's own finds no such weights.
        """
        weights, books, wanted = self._sampler.weights(places, items), self._books, np.dtype("float32")
        if weights is None or type(self._sampler).weights is Prioritized.weights:
            return weights
        if not is_array(weights) or tuple(weights.shape) != tuple(places.shape):
            raise TypeError(
                f"expected {places.shape[0]} weights from {type(self._sampler).__name__}.weights, a flat array, found "
                f"{weights!r:.80}"
            )
        # A copy, since it may be an array that the sampler goes on to use.
        return books.xp.astype(books.own(weights, wanted), books.native_dtype(wanted), copy=True)

    def _good(self, places: Array, items: range, usable: Usable | None) -> Array:
        """Which draws are of use."""
        xp = self._books.xp
        if self._is_inside:
            good = xp.ones_like(places, dtype=xp.bool) if usable is None else usable(places)
        else:
            good = (places >= 0) & (places < len(items))
            if usable is not None:
                good = good & usable(xp.where(good, places, xp.zeros_like(places)))
        return good & self._first_of_equals(places) if self._sampler.distinct else good

    def _first_of_equals(self, places: Array) -> Array:
        """Whether each place is not there before."""
        _, first = np.unique(to_numpy(places), return_index=True)
        new = np.zeros(places.shape[0], bool)
        new[first] = True
        return self._books.from_numpy(new)

    def _draw_exactly(self, count: int, items: range, usable: Usable | None) -> Array:
        """What `draw` returns, found by a look at every item."""
        every = self._books.as_index(np.arange(len(items)))
        found = self._sampler.chances(every, items)
        chances = np.ones(len(items)) if found is None else self._checked_chances(found, len(items))
        good = chances > 0
        if usable is not None:
            good &= to_numpy(usable(every))
        places = np.flatnonzero(good)
        if len(places) == 0:
            otherwise = "" if found is None else f", or have {type(self._sampler).__name__} draw from more"
            raise ValueError(
                f"of {len(items)} candidates none can be drawn, for want of a chance or of such a window; ask for "
                f"fewer steps, or add more{otherwise}"
            )
        if self._sampler.distinct and count > len(places):
            raise ValueError(f"expected at most {len(places)} draws without replacement, found {count}")
        self._choose_level(int(usable is not None), count, float(min(1.0, chances[good].sum() / chances.sum())))
        return self._books.as_index(places[self._chosen(len(places), count, None if found is None else chances[good])])

    def _checked_chances(self, found: Any, count: int) -> NDArray[Any]:
        """The chances of all items, if a sampler of the user's own finds such."""
        chances = to_numpy(as_array(found))
        if chances.shape != (count,) or not (np.isfinite(chances) & (chances >= 0)).all():
            raise ValueError(
                f"expected {count} finite chances of 0 or more from {type(self._sampler).__name__}.chances, found "
                f"{chances!r:.80}"
            )
        return chances

    def _chosen(self, length: int, count: int, chances: NDArray[Any] | None) -> NDArray[np.intp]:
        """`count` positions below `length`, by their chances."""
        if chances is None:
            drawn = self._random.permutation(length) if self._sampler.distinct else self._random.integers(length, count)
            return np.asarray(to_numpy(drawn)[:count], np.intp)
        if self._sampler.distinct:
            # Efraimidis and Spirakis, "Weighted random sampling with a reservoir" (2006).
            with np.errstate(divide="ignore"):  # of a draw that is 0
                keys = np.log(to_numpy(self._random.uniform(length))) / chances
            heaviest: NDArray[np.intp] = np.argsort(-keys)[:count]
            return heaviest
        sums = np.cumsum(chances, dtype=np.float64)
        drawn = np.searchsorted(sums, to_numpy(self._random.uniform(count)) * sums[-1], side="right")
        return np.asarray(np.minimum(drawn, length - 1), np.intp)


def _is_inside(sampler: type[Sampler]) -> bool:
    """What a class says of its own `draw`, and not what another says that it inherits from."""
    return next(bool(vars(cls).get("inside")) for cls in sampler.__mro__ if "draw" in vars(cls))


def _drawn_at(level: int, count: int) -> int:
    """How many are drawn for so many: just as many, somewhat more, twice as many as that, and so on."""
    return (count + count // 8 + 8) << (level - 1) if level else count

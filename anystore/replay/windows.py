"""Windows: the successive items of a lane, the ends of episodes among them, and n-step returns."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from anystore.backends import Backend
from anystore.backends.base import Array
from anystore.replay.lanes import Lanes
from anystore.replay.layouts import Plain
from anystore.replay.ring import Ring
from anystore.specs import as_dtype, is_extension, kind_of


class Windows:
    """What items come after others in their lanes; all by their places."""

    def __init__(self, layout: Plain, ring: Ring, lanes: Lanes, books: Backend) -> None:
        self._layout = layout
        self._ring = ring
        self._lanes = lanes
        self._books = books
        self._strides = functools.cache(functools.partial(_strides, lanes.count, books))

    def beginning(self, num_steps: int, at_end: str) -> Callable[[Array], Array] | None:
        """What tells which items begin a window that can be drawn; None if all do."""
        if at_end == "pad" or num_steps == 1 or (at_end == "cross" and self._lanes.in_step):
            return None

        def begins(places: Array) -> Array:
            xp = self._books.xp
            if self._lanes.in_step:  # none of the newest items is a candidate, so that all steps are there
                return ~xp.any(self._layout.ends(self._strided(places, num_steps - 1)), axis=0)
            steps, there = self._follow(places, num_steps)
            if at_end == "whole":
                there = there[1:, :] & ~self._layout.ends(steps[:-1, :])
            return xp.all(there, axis=0)

        return begins

    def steps(self, places: Array, num_steps: int) -> Array:
        """The places of windows all of whose steps are there, of shape (count, num_steps)."""
        in_step = self._lanes.in_step
        steps = self._strided(places, num_steps) if in_step else self._follow(places, num_steps)[0]
        return steps.T

    def padded(self, places: Array, num_steps: int) -> tuple[Array, Array]:
        """The places of windows up to the ends of episodes, and which of their steps are real.

        Both are of shape (count, num_steps). The places of the others are that of the last real one.
        """
        xp = self._books.xp
        steps, there = self._follow(places, num_steps)
        if num_steps > 1:
            # Places grow along a window, so that the first of its ends is the least.
            last = xp.min(xp.where(self._layout.ends(steps[:-1, :]), steps[:-1, :], steps[-1:, :]), axis=0)
            there = there & (steps <= last)
            steps = xp.minimum(steps, last)
        return steps.T, there.T

    def returns(self, rewards: Array, mask: Array, terminated: Array, discount: float) -> tuple[Array, Array]:
        """The discounted sums of the rewards of windows, and what the values after them count."""
        xp = self._books.xp
        found = as_dtype(rewards.dtype)
        plain_float = kind_of(found) == 2 and not is_extension(found)
        dtype = rewards.dtype if plain_float else self._native("float32")
        powers = (discount ** np.arange(mask.shape[1] + 1)).astype(self._books.float_dtype)
        powers = xp.astype(self._books.from_numpy(powers), dtype)
        zero = xp.zeros_like(powers[:1])  # and not a product with the mask: of powers that overflow it were NaN
        factors = xp.where(mask, powers[None, :-1], zero[None, :])
        factors = xp.reshape(factors, factors.shape + (1,) * (rewards.ndim - 2))
        integer = self._native(self._books.index_dtype.name)
        counts = xp.sum(xp.astype(mask, integer), axis=-1, dtype=integer)
        discounts = xp.where(terminated, zero, xp.take(powers, counts, axis=0))
        return xp.sum(xp.astype(rewards, dtype) * factors, axis=1), discounts

    def _follow(self, places: Array, num_steps: int) -> tuple[Array, Array]:
        """The places of the items from each one on, and which of them are there, both of shape (num_steps, count).

        In this order since what follows looks along the windows, and across the rows of an array is quicker. Where no
        item is there, the place is once more the one before.
        """
        xp = self._books.xp
        if self._lanes.in_step:
            newest = len(self._ring.items) - 1
            newest_of_lane = newest - (newest - places) % self._lanes.count
            steps = self._strided(places, num_steps)
            return xp.minimum(steps, newest_of_lane), steps <= newest_of_lane
        found, there = [places], [places >= 0]
        for _ in range(num_steps - 1):
            after, is_there = self._lanes.ahead(found[-1])
            found.append(after)
            there.append(there[-1] & is_there)
        return xp.stack(found), xp.stack(there)

    def _strided(self, places: Array, num_steps: int) -> Array:
        """The places of the items from each one on where lanes are in step, of shape (num_steps, count).

        Also of those that are not there yet.
        """
        return self._strides(num_steps) + places[None, :]

    def _native(self, name: str) -> Any:
        return self._books.native_dtype(np.dtype(name))


def _strides(lanes: int, books: Backend, num_steps: int) -> Array:
    """How many places further on each step of a window is, of shape (num_steps, 1)."""
    return books.as_index(np.arange(num_steps) * lanes)[:, None]

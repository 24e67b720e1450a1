"""Random draws by the generator of an array library, on its device; and those of NumPy."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from anystore.backends.base import Array, Backend


_SCALED = 2**32
"""Up to so many, integers are scaled floats: their probabilities then differ by less than one part in two million."""
_BLOCK = 1 << 14
"""The draws for which bits are drawn at once."""


class Random(ABC):
    """A generator of random arrays, all of them flat, of one library and on one device.

    The same seed gives the same draws on the same backend, with the same version of its library. The libraries' global
    generators are neither read nor moved on.

    Attributes
    ----------
    kind : str
        Whose generator it is; a state is taken by a generator of the same kind only.

    Notes
    -----
    Draws move the generator on and need a lock of the caller's own against each other, as does `state`. On a GPU they
    are made on the current stream; draws on several streams are made in turn if each stream waits for the last.
    """

    kind: str

    def integers(self, high: int, count: int) -> Array:
        """`count` integers, each of those below `high` as likely as any other.

        Parameters
        ----------
        high : int
            How many integers there are to draw from, 1 at least.
        count : int
            How many to draw.

        Returns
        -------
        array of int64, shape (count,)
            int32 where the library has no int64 (JAX without x64).

        Raises
        ------
        ValueError
            If `high` is not positive or `count` is negative; nothing is drawn then.
        """
        _check(high, count)
        return self._integers(high, count)

    def uniform(self, count: int) -> Array:
        """`count` floats drawn uniformly from [0, 1): never 1.0.

        Returns
        -------
        array of float64, shape (count,)
            float32 where the library or the device has no float64 (JAX without x64).

        Raises
        ------
        ValueError
            If `count` is negative.
        """
        _check(1, count)
        return self._uniform(count)

    def permutation(self, high: int) -> Array:
        """The integers below `high` in random order.

        Returns
        -------
        array of int64, shape (high,)
            int32 where the library has no int64.

        Raises
        ------
        ValueError
            If `high` is not positive.
        """
        _check(high, 0)
        return self._permutation(high)

    def state(self) -> dict[str, Any]:
        """All that the draws to come depend on, in strings, integers, lists and dicts, as JSON takes them."""
        return {"kind": self.kind, **self._state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state` with the very draws that would have followed there.

        Raises
        ------
        ValueError
            If it is not a state of this kind of generator; this one then stays as it was.
        """
        kind = state.get("kind") if isinstance(state, dict) else None
        if kind != self.kind:
            raise ValueError(f"expected the state of a generator of {self.kind}, found {kind or state!r:.80}")
        try:
            self._restore(state)
        except Exception as error:
            raise ValueError(f"this is no state of a generator of {self.kind}: {error!r}") from error

    @abstractmethod
    def _integers(self, high: int, count: int) -> Array: ...

    @abstractmethod
    def _uniform(self, count: int) -> Array: ...

    def _bits(self, count: int) -> Array:
        """`count` integers of 31 random bits."""
        return self._integers(2**31, count)

    @abstractmethod
    def _permutation(self, high: int) -> Array: ...

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """The same without the kind."""

    @abstractmethod
    def _restore(self, state: dict[str, Any]) -> None:
        """Take a state of this kind; any exception means that it is malformed, and nothing has changed."""


def seed_sequence(seed: int | None) -> np.random.SeedSequence:
    """The bits that a seed stands for, well mixed; fresh ones from the system for None.

    Raises
    ------
    TypeError
        If the seed is not an integer.
    ValueError
        If it is negative.
    """
    if seed is None:
        return np.random.SeedSequence()
    try:
        number = operator.index(seed)
    except TypeError:
        raise TypeError(f"expected an integer or None as the seed, found {seed!r:.80}") from None
    if number < 0:
        raise ValueError(f"expected a seed of 0 or more, found {number}")
    return np.random.SeedSequence(number)


def _check(high: int, count: int) -> None:
    if high <= 0:
        raise ValueError(f"there is no integer below {high} to draw; expected 1 or more to draw from")
    if count < 0:
        raise ValueError(f"expected 0 draws or more, found {count}")


class NumpyRandom(Random):
    """NumPy's Generator on PCG64."""

    kind = "numpy"

    def __init__(self, seed: int | None, float_dtype: Any = np.float64) -> None:
        self._generator = np.random.Generator(np.random.PCG64(seed_sequence(seed)))
        self._float_dtype = float_dtype

    def _integers(self, high: int, count: int) -> NDArray[np.int64]:
        if high > _SCALED:
            return self._generator.integers(high, size=count)
        # In half the time of Generator.integers. The product of a float64 below 1 and `high` is below `high`.
        return (self._generator.random(count) * high).astype(np.int64)

    def _uniform(self, count: int) -> NDArray[np.floating[Any]]:
        drawn: NDArray[np.floating[Any]] = self._generator.random(count, self._float_dtype)
        return drawn

    def _permutation(self, high: int) -> NDArray[np.int64]:
        return self._generator.permutation(high)

    def _state(self) -> dict[str, Any]:
        return dict(self._generator.bit_generator.state)

    def _restore(self, state: dict[str, Any]) -> None:
        # NumPy changes a generator part by part, and a part may be refused.
        generator = np.random.PCG64()
        generator.state = state  # type: ignore[assignment]  # a dict that has been through JSON
        self._generator = np.random.Generator(generator)


class BookkeepingRandom(Random):
    """Draws of a backend's own generator, for its `bookkeeping` in NumPy.

    Its bits are drawn in large blocks: some libraries take longer for a call than for all that a sample needs.

    Parameters
    ----------
    backend : Backend
        Whose generator draws.
    seed : int or None
        What the draws follow from.
    """

    def __init__(self, backend: Backend, seed: int | None) -> None:
        self._backend = backend
        self._random = backend.random(seed)
        self.kind = f"{self._random.kind}, in blocks"
        self._before = self._random.state()
        self._block = np.empty(0, np.int64)
        self._used = 0

    def _drawn(self, count: int) -> NDArray[np.int64]:
        """`count` integers of 62 random bits."""
        parts = []
        while count > len(self._block) - self._used:
            parts.append(self._block[self._used :])
            count -= len(parts[-1])
            self._before = self._random.state()
            self._block, self._used = self._next_block(self._random), 0
        parts.append(self._block[self._used : self._used + count])
        self._used += count
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _next_block(self, random: Random) -> NDArray[np.int64]:
        halves = np.asarray(self._backend.to_bookkeeping(random._bits(2 * _BLOCK)), np.int64)
        return halves[:_BLOCK] << 31 | halves[_BLOCK:]

    def _integers(self, high: int, count: int) -> NDArray[np.int64]:
        if high > _SCALED:
            return self._drawn(count) % high
        return (self._uniform(count) * high).astype(np.int64)

    def _uniform(self, count: int) -> NDArray[np.floating[Any]]:
        return (self._drawn(count) >> 9) * 2.0**-53

    def _permutation(self, high: int) -> NDArray[np.int64]:
        return np.argsort(self._drawn(high))

    def _state(self) -> dict[str, Any]:
        return {"before": self._before, "used": self._used}

    def _restore(self, state: dict[str, Any]) -> None:
        before, used = state["before"], state["used"]
        if type(used) is not int or not 0 <= used <= _BLOCK:
            raise ValueError(f"{used!r:.80} of {_BLOCK} bits are used")
        random = self._backend.random(0)
        random.restore(before)
        block = self._next_block(random) if used else np.empty(0, np.int64)
        self._random, self._before, self._block, self._used = random, before, block, used


class HostRandom(Random):
    """Draws of NumPy's generator, moved to a backend whose library has no generator of its own.

    Parameters
    ----------
    backend : Backend
        Whose arrays to return.
    seed : int or None
        What the draws follow from.
    """

    kind = NumpyRandom.kind

    def __init__(self, backend: Backend, seed: int | None) -> None:
        self._backend = backend
        # In the dtype in which it is returned: a float64 just below 1 would be rounded to 1.
        self._host = NumpyRandom(seed, backend.float_dtype)

    def _integers(self, high: int, count: int) -> Array:
        return self._backend.as_index(self._host.integers(high, count))

    def _uniform(self, count: int) -> Array:
        return self._backend.from_numpy(self._host.uniform(count))

    def _permutation(self, high: int) -> Array:
        return self._backend.as_index(self._host.permutation(high))

    def _state(self) -> dict[str, Any]:
        return self._host._state()

    def _restore(self, state: dict[str, Any]) -> None:
        self._host._restore(state)

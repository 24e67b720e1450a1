"""A leaf as the user wrote it, checked against its spec, and brought to where its buffer lives.

Nothing is written here: whatever a value can be refused for, it is refused for before the first buffer is touched.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anystore.convert import is_array
from anystore.nests import label
from anystore.specs import ArraySpec, as_dtype, kind_of, limits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anystore.backends import Backend


Casting = Literal["no", "equiv", "safe", "same_kind", "unsafe"]
CASTINGS: tuple[Casting, ...] = ("no", "equiv", "safe", "same_kind", "unsafe")


class _Leaf(NamedTuple):
    """A leaf of a value, with what the checks need to know of it."""

    path: str
    spec: ArraySpec
    value: Any
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_python: bool
    """A number or list of Python's own, which has no dtype yet and takes that of the spec if it fits."""


def admit(
    values: Sequence[Any],
    specs: Sequence[ArraySpec],
    paths: Sequence[str],
    lead: tuple[int, ...],
    casting: Casting,
    backend: Backend,
) -> list[Any]:
    """The leaves of an item or batch as arrays of the backend, of the very dtypes of their specs.

    Parameters
    ----------
    values : sequence
        Arrays of any library on any device, Python numbers, and lists of these.
    lead : tuple of int
        The axes that a batch has in front; a leaf of exactly its spec's shape is taken as well.

    Raises
    ------
    ValueError
        For a shape that does not fit.
    TypeError
        For a dtype that `casting` refuses, and for something that is no array.
    OverflowError
        For a Python int that does not fit its dtype.
    """
    leaves = [
        None if _is_right(value, spec, lead) else _describe(value, spec, path)
        for value, spec, path in zip(values, specs, paths)
    ]
    others = [leaf for leaf in leaves if leaf is not None]
    for leaf in others:
        _check_shape(leaf, lead)
    for leaf in others:
        _check_dtype(leaf, casting)
    return [
        backend.bring(value, spec.dtype) if leaf is None else _brought(leaf, backend)
        for value, spec, leaf in zip(values, specs, leaves)
    ]


def _is_right(value: Any, spec: ArraySpec, lead: tuple[int, ...]) -> bool:
    """Whether a value is plainly an array that needs no more than to be brought to the backend."""
    is_plain = type(value) is np.ndarray or isinstance(value, np.generic)
    return is_plain and value.dtype == spec.dtype and value.shape == lead + spec.shape


def _brought(leaf: _Leaf, backend: Backend) -> Any:
    if leaf.is_python:
        _check_integers(leaf)
    try:
        array = backend.bring(_from_python(leaf) if leaf.is_python else leaf.value, leaf.spec.dtype)
    except MemoryError:
        raise
    except Exception as error:  # each library has others of its own
        raise TypeError(f"{label(leaf.path)}: {error}") from error
    if tuple(array.shape) != leaf.shape:
        raise ValueError(
            f"{label(leaf.path)}: the array says that its shape is {leaf.shape}, and is read as {tuple(array.shape)}"
        )
    return array


def _describe(value: Any, spec: ArraySpec, path: str) -> _Leaf:
    is_python = isinstance(value, (bool, int, float, complex, list, tuple))
    try:
        if is_array(value) and not isinstance(value, ArraySpec):
            return _Leaf(path, spec, value, tuple(value.shape), as_dtype(value.dtype), is_python=False)
        array = _numbers(value, spec) if is_python else np.asarray(value)
    except Exception as error:
        raise _no_array(path, spec, value, f" ({error})") from None
    if array.dtype.hasobject and not (is_python and _holds_integers(array)):
        raise _no_array(path, spec, value)
    return _Leaf(path, spec, array, array.shape, array.dtype, is_python)


def _no_array(path: str, spec: ArraySpec, value: Any, why: str = "") -> TypeError:
    found = f"{type(value).__name__}: {value!r:.80}"
    return TypeError(f"{label(path)}: expected an array or numbers for {spec}, found a {found}{why}")


def _numbers(value: Any, spec: ArraySpec) -> NDArray[Any]:
    """Python's numbers as NumPy reads them, save where it makes less of them than they are."""
    array = np.asarray(value)
    if array.size == 0:
        return array.astype(spec.dtype)
    if array.dtype.kind == "f" and kind_of(spec.dtype) == 1:
        # Integers of both signs past 63 bits, which NumPy reads as floats.
        integers = np.asarray(value, object)
        return integers if _holds_integers(integers) else array
    return array


def _holds_integers(array: NDArray[Any]) -> bool:
    """Whether an array of objects is one of integers beyond 64 bits."""
    return all(type(element) is int for element in array.flat)


def _check_shape(leaf: _Leaf, lead: tuple[int, ...]) -> None:
    expected = lead + leaf.spec.shape
    if leaf.shape != expected and leaf.shape != leaf.spec.shape:
        raise ValueError(f"{label(leaf.path)}: expected shape {expected}, found {leaf.shape}")


def _check_dtype(leaf: _Leaf, casting: Casting) -> None:
    if leaf.is_python and _python_fits(leaf.dtype, leaf.spec.dtype):
        return
    if leaf.dtype != leaf.spec.dtype and not can_cast(leaf.dtype, leaf.spec.dtype, casting):
        raise TypeError(
            f"{label(leaf.path)}: expected {leaf.spec.dtype}, found {leaf.dtype}, which casting={casting!r} refuses; "
            "convert the value, or give the storage another casting"
        )


@functools.lru_cache(maxsize=256)
def can_cast(found: np.dtype[Any], expected: np.dtype[Any], casting: Casting) -> bool:
    """Whether `casting` allows to convert between dtypes, in NumPy's words and by its rules.

    Also of the types of ml_dtypes, which NumPy finds to be of the same kind as any other.
    """
    if not np.can_cast(found, expected, casting):
        return False
    low, high = kind_of(found), kind_of(expected)
    if casting == "unsafe" or low is None or high is None:
        return True
    return low < high or (low == high and (low != 1 or limits(expected)[0] < 0 or limits(found)[0] >= 0))


def _python_fits(found: np.dtype[Any], expected: np.dtype[Any]) -> bool:
    """Whether Python numbers that NumPy reads as `found` may become `expected`: a bool any, an int no bool, ..."""
    low, high = 1 if found.hasobject else kind_of(found), kind_of(expected)
    return low is not None and high is not None and low <= high


def _check_integers(leaf: _Leaf) -> None:
    """Refuse Python's integers if one of them does not fit the dtype of their spec."""
    numbers: NDArray[Any] = leaf.value
    if numbers.dtype.kind in "iuO" and numbers.size:
        low, high = limits(leaf.spec.dtype)
        if numbers.min() < low or numbers.max() > high:
            found = f"{numbers.tolist()!r:.80}"
            raise OverflowError(f"{label(leaf.path)}: expected integers that fit {leaf.spec.dtype}, found {found}")


def _from_python(leaf: _Leaf) -> NDArray[Any]:
    """Python's numbers in the dtype of their spec."""
    numbers: NDArray[Any] = leaf.value
    if numbers.dtype.hasobject and kind_of(leaf.spec.dtype) == 2:
        numbers = numbers.astype(np.float64)  # the types of ml_dtypes take no integers past 64 bits
    return numbers.astype(leaf.spec.dtype)

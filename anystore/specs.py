"""What one leaf of an item looks like, and the specs of other libraries that say the same.

Foreign specs are recognised by the name of their class, so that none of their libraries is imported here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from typing import Any

import numpy as np
from numpy.typing import DTypeLike


@dataclasses.dataclass(frozen=True, slots=True)
class ArraySpec:
    """The shape and dtype of one leaf of an item.

    Two specs are equal if their shapes and dtypes are; the name is a remark for people.

    Parameters
    ----------
    shape : sequence of int, or int
        The shape of a single item, without the axis that counts items.
    dtype : dtype-like
        Anything NumPy reads as a dtype, and the names and dtypes of the extension types of ``ml_dtypes``
        ("bfloat16", "float8_e4m3fn", ...) and of other array libraries (``torch.float32``).
    name : str, optional
        A remark for people.

    Raises
    ------
    ValueError
        If a dimension is unknown (None) or negative.
    TypeError
        If the shape or the dtype is not one.

    Examples
    --------
    >>> from anystore import ArraySpec
    >>> ArraySpec((84, 84, 4), "uint8", name="frames")
    ArraySpec((84, 84, 4), 'uint8', name='frames')
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    name: str | None = dataclasses.field(default=None, compare=False)

    def __init__(self, shape: Any, dtype: DTypeLike, name: str | None = None) -> None:
        object.__setattr__(self, "shape", _as_shape(shape))
        object.__setattr__(self, "dtype", as_dtype(dtype))
        object.__setattr__(self, "name", name)

    def __repr__(self) -> str:
        name = "" if self.name is None else f", name={self.name!r}"
        return f"ArraySpec({self.shape}, {_dtype_name(self.dtype)!r}{name})"

    @property
    def nbytes(self) -> int:
        """The bytes of one item."""
        return math.prod(self.shape) * self.dtype.itemsize

    @staticmethod
    def from_array(array: Any, name: str | None = None) -> ArraySpec:
        """The spec that `array`, an array of any library or a Python number, is an instance of.

        Raises
        ------
        ValueError
            If `array` is neither.
        """
        if not (hasattr(array, "shape") and hasattr(array, "dtype")):
            if not isinstance(array, (bool, int, float, complex)):
                raise ValueError(f"expected an array or a number, found {type(array).__name__}: {array!r:.80}")
            array = np.asarray(array)
        return ArraySpec(array.shape, array.dtype, name)

    def replace(self, shape: Any = None, dtype: Any = None, name: str | None = None) -> ArraySpec:
        """A copy of this spec with the given fields instead of its own; None keeps a field."""
        return ArraySpec(
            self.shape if shape is None else shape,
            self.dtype if dtype is None else dtype,
            self.name if name is None else name,
        )

    def check_array(self, array: Any) -> bool:
        """Whether `array`, an array of any library or a number, has this very shape and dtype."""
        try:
            return ArraySpec.from_array(array) == self
        except (TypeError, ValueError):
            return False


def as_dtype(dtype: Any) -> np.dtype[Any]:
    """The NumPy dtype that `dtype` names: a name, a NumPy dtype, or the dtype of any array library.

    Raises
    ------
    TypeError
        If it names none.
    """
    if dtype is None:
        raise TypeError("expected a dtype, found None (which NumPy would read as float64)")
    dtype = getattr(dtype, "as_numpy_dtype", dtype)  # TensorFlow's DType
    try:
        found: np.dtype[Any] = np.dtype(dtype)
        return found
    except (TypeError, SyntaxError):
        # "bfloat16", and the dtype objects of torch and array_api_strict, which NumPy does not know.
        name = str(dtype).rpartition(".")[2]
    return _named_dtype(name)


@functools.lru_cache(maxsize=64)
def _named_dtype(name: str) -> np.dtype[Any]:
    try:
        found: np.dtype[Any] = np.dtype(name)
        return found
    except (TypeError, SyntaxError):  # the latter of what begins like a list of dtypes
        pass
    try:
        import ml_dtypes
    except ImportError:
        raise TypeError(
            f"{name!r} is not a dtype that NumPy knows; for bfloat16 and float8: pip install ml_dtypes"
        ) from None
    try:
        found = np.dtype(getattr(ml_dtypes, name))
        return found
    except (AttributeError, TypeError):
        raise TypeError(f"{name!r} is not a dtype that NumPy or ml_dtypes knows") from None


_KINDS = {"bool": 0, "int": 1, "uint": 1, "float": 2, "bfloat": 2, "complex": 3}


@functools.lru_cache(maxsize=64)
def kind_of(dtype: np.dtype[Any]) -> int | None:
    """0 for a bool, 1 for an integer, 2 for a float, 3 for a complex dtype, None for any other.

    ``dtype.kind`` does not tell: most types of ml_dtypes are of kind "V".
    """
    return _KINDS.get(dtype.name.split("_")[0].rstrip("0123456789"))


def is_extension(dtype: np.dtype[Any]) -> bool:
    """Whether `dtype` is one of those that ml_dtypes adds to NumPy."""
    return dtype.isbuiltin == 2


@functools.lru_cache(maxsize=64)
def limits(dtype: np.dtype[Any]) -> tuple[float, float]:
    """The least and the greatest finite number of an integer, float or complex dtype; no limits for any other."""
    kind = kind_of(dtype)
    if kind not in (1, 2, 3):
        return -np.inf, np.inf
    if is_extension(dtype):
        import ml_dtypes

        extension: Any = ml_dtypes.iinfo if kind == 1 else ml_dtypes.finfo
        return float(extension(dtype).min), float(extension(dtype).max)
    if kind == 1:
        return int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    return float(np.finfo(dtype).min), float(np.finfo(dtype).max)


def as_count(name: str, count: Any, least: int = 1) -> int:
    """A count as a user gave it, as an int.

    Raises
    ------
    ValueError
        If it is no integer of `least` or more; it says of what by `name`.
    """
    try:
        number = least - 1 if isinstance(count, (bool, np.bool_)) else operator.index(count)
    except TypeError:
        number = least - 1
    if number < least:
        raise ValueError(f"expected {name} to be an int of {least} or more, found {count!r:.80}")
    return number


def _dtype_name(dtype: np.dtype[Any]) -> Any:
    """What `ArraySpec` makes this dtype of: a name, or the fields of a structured one."""
    if dtype.names is not None:
        return np.lib.format.dtype_to_descr(dtype)
    return dtype.name if dtype.isnative and kind_of(dtype) is not None else dtype.str


def _as_shape(shape: Any) -> tuple[int, ...]:
    try:
        lengths = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
        if None in lengths:
            raise ValueError(f"expected a shape without unknown dimensions, found {shape}; give every length")
        lengths = tuple(operator.index(length) for length in lengths)
    except TypeError:
        raise TypeError(f"expected a shape, a sequence of integers, found {shape!r}") from None
    if any(length < 0 for length in lengths):
        raise ValueError(f"expected a shape without negative lengths, found {shape}")
    return lengths


# Foreign specs, by the package and the name of a class among their bases. ----------------------------------------

_LEAVES = {
    ("tf_agents", "ArraySpec"),
    ("dm_env", "Array"),
    ("tensorflow", "TensorSpec"),
    ("jax", "ShapeDtypeStruct"),
    ("gymnasium", "Box"),
    ("gymnasium", "Discrete"),
    ("gymnasium", "MultiDiscrete"),
    ("gymnasium", "MultiBinary"),
}
_NESTS = {("gymnasium", "Dict"): dict, ("gymnasium", "Tuple"): tuple}


def understand(spec: Any) -> Any:
    """An ArraySpec for `spec`, or the nest of specs that it stands for.

    Parameters
    ----------
    spec : object
        An ArraySpec, a spec of another library, or a Gymnasium space.

    Returns
    -------
    ArraySpec, or a dict or tuple of specs that are still to be understood

    Raises
    ------
    ValueError
        If `spec` is anything else, or a spec without a fixed shape and a dtype of fixed size.
    """
    if isinstance(spec, ArraySpec):
        return _storable(spec)
    for base in type(spec).__mro__:
        kind = (base.__module__.partition(".")[0], base.__name__)
        if kind in _NESTS:
            return _NESTS[kind](spec.spaces)
        if kind in _LEAVES:
            return _storable(_from_foreign(spec))
    raise ValueError(f"expected an ArraySpec, found {type(spec).__name__}: {spec!r:.80}{_advice(spec)}")


def _from_foreign(spec: Any) -> ArraySpec:
    try:
        return ArraySpec(spec.shape, spec.dtype, getattr(spec, "name", None))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{error} (in {spec!r:.80})") from None


def _storable(spec: ArraySpec) -> ArraySpec:
    if spec.dtype.hasobject:
        raise ValueError(f"{spec} holds Python objects; expected a dtype whose values have a fixed size in bytes")
    if spec.dtype.subdtype is not None:
        base, shape = spec.dtype.subdtype
        raise ValueError(f"{spec} has a dtype with axes; expected ArraySpec({spec.shape + shape}, {str(base)!r})")
    if spec.dtype.itemsize == 0:
        raise ValueError(f"{spec} has a dtype of no size; expected one with a length, such as 'U8'")
    return spec


def _advice(spec: Any) -> str:
    if type(spec).__module__.partition(".")[0] == "gymnasium":
        return "; a space whose elements have no fixed shape is to be encoded, or left out, by a wrapper"
    if hasattr(spec, "shape") and hasattr(spec, "dtype"):
        return "; for the spec of an array: ArraySpec.from_array(array), or Storage.like(item, capacity)"
    return ""

"""Arrays of any library, read into NumPy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anystore.specs import as_dtype, is_extension

_LIBRARIES = {"numpy", "cupy", "torch", "jax", "tensorflow", "array_api_strict"}
_CUDA = (2, 13)
"""DLPack's device types of CUDA: plain and managed memory."""


def is_array(value: Any) -> bool:
    """Whether `value` is an array, of whatever library."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def as_array(value: Any) -> Any:
    """`value` if it is an array, of whatever library, and else a NumPy array of it."""
    return value if is_array(value) else np.asarray(value)


def library_of(value: Any) -> str:
    """The package that the class of `value` comes from; for a class of the user's own, that of its array library."""
    cls: Any = type(value)
    return _library_of_class(cls)


@functools.lru_cache(maxsize=256)
def _library_of_class(cls: Any) -> str:
    packages: list[str] = [base.__module__.partition(".")[0].replace("jaxlib", "jax") for base in cls.__mro__]
    return next((package for package in packages if package in _LIBRARIES), packages[0])


def on_gpu(value: Any) -> bool:
    """Whether `value` is an array that another library can read from the memory of an NVIDIA GPU."""
    try:
        return value.__dlpack_device__()[0] in _CUDA
    except Exception:  # there is no such method, or no such device, or there are several
        return cuda_interface(value) is not None


def cuda_interface(value: Any) -> dict[str, Any] | None:
    """What an array says of its memory on a GPU, for CUDA; None if it says nothing."""
    try:
        found: dict[str, Any] = value.__cuda_array_interface__
        return found
    except Exception:  # of any kind: KeyError for float8 of torch, ValueError for JAX's arrays on several devices
        return None


def to_numpy(value: Any) -> NDArray[Any]:
    """`value`, an array of any library on any device, as a NumPy array; the memory is shared where it can be.

    Raises
    ------
    TypeError
        If the array cannot be read into NumPy.
    """
    if type(value) is np.ndarray:
        return value
    try:
        array = _READERS.get(library_of(value), np.asarray)(value)
    except Exception as error:
        raise TypeError(f"an array of type {type(value).__name__} cannot be read into NumPy: {error}") from error
    if array.dtype.hasobject:  # as with a sparse or a ragged tensor of TensorFlow
        raise TypeError(f"an array of type {type(value).__name__} is read by NumPy as an array of Python objects")
    return array


def _read_torch(tensor: Any) -> NDArray[Any]:
    dtype = as_dtype(tensor.dtype)
    if not is_extension(dtype):
        found: NDArray[Any] = tensor.numpy(force=True)
        return found
    import torch

    # bfloat16 and float8, which Tensor.numpy() does not know (pytorch #109873)
    bits = tensor.detach().cpu().view({1: torch.int8, 2: torch.int16}[dtype.itemsize])
    return np.asarray(bits).view(dtype)


def _read_tensorflow(tensor: Any) -> NDArray[Any]:
    # __array__ of a single bfloat16 returns a scalar, which NumPy does not take.
    return np.asarray(tensor.numpy() if tensor.shape.rank == 0 and hasattr(tensor, "numpy") else tensor)


_READERS: dict[str, Callable[[Any], NDArray[Any]]] = {
    # numpy.asarray reads from its CPU device only, DLPack from every one.
    "array_api_strict": np.from_dlpack,
    "cupy": lambda array: array.get(),
    "tensorflow": _read_tensorflow,
    "torch": _read_torch,
}

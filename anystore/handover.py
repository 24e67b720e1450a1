"""A batch in the arrays of another library, on the same memory.

A room of its own because it alone knows what each library does to memory that it does not like: some copy it without
a word, some end the process. All of that is found here, before the library sees the array.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anystore.backends import select_backend
from anystore.backends.base import Backend, no_dtype
from anystore.convert import cuda_interface, is_array, library_of, on_gpu, to_numpy
from anystore.nests import map_leaves
from anystore.specs import as_dtype, is_extension

_ALIGNMENT = 64
"""What XLA, which is in JAX and TensorFlow, expects of an address."""

_SMALL = 1 << 20
"""An array of so many bytes is copied in the time that JAX takes to share it."""

_SMALL_ONE = object()
"""Stands in a batch for a small array, until all of them are copied."""


def to_library(nest: Any, library: str, *, copy: bool | None = False, device: Any = None) -> Any:
    """A batch in the arrays of another library: zero-copy, through DLPack.

    Parameters
    ----------
    nest : nest of arrays
        What `Storage.get` or `ReplayBuffer.sample` returns, or any nest of arrays of any libraries. None stays None.
    library : {"numpy", "torch", "jax", "tensorflow", "cupy"}
        Whose arrays to return.
    copy : bool or None, default False
        False: the memory is shared. True: it is not. None: it is shared where it can be. (As in the array API
        standard.) A copy goes through main memory if there is no other way.
    device : str or device object, optional
        Where the arrays are to be, as for `select_backend`; those that are elsewhere are copied there, and False for
        `copy` is None then. By default each leaf stays on the device that it is on.

    Returns
    -------
    nest of arrays
        The same nest. A leaf that is an array of the library already is returned as it is, unless `copy` is True.

    Raises
    ------
    ValueError
        If the library or its device is unknown; if memory cannot be shared and `copy` is False; if the library cannot
        hold the dtype. The message has the path of the leaf, and why.
    ImportError
        If the library is not installed.

    Notes
    -----
    Shared memory is kept as long as one of the arrays on it lives. Writing to one is seen in the others, also in JAX's
    and TensorFlow's, which take their arrays for immutable.

    On a GPU the memory is ready for the library's current stream, on which it may be read at once. TensorFlow, which
    does not say what its stream is, makes the host wait.

    Examples
    --------
    >>> import numpy as np
    >>> from anystore import to_library
    >>> to_library({"reward": np.zeros(3, np.float32)}, "numpy")["reward"]
    array([0., 0., 0.], dtype=float32)
    """
    return map_leaves(_handing_over(library, copy, device), nest)


def hand_over_batch(batch: Any, library: str, *, copy: bool | None = None, device: Any = None) -> Any:
    """What `to_library` returns, for a batch that nobody writes to any more, of few shapes.

    With None for `copy`, arrays that take less time to copy than to share are copied: to JAX on the CPU in one compiled
    call, which is compiled anew for other shapes.
    """
    handed_over = _handing_over(library, copy, device)
    if library != "jax" or copy is not None:
        return map_leaves(handed_over, batch)
    small: list[NDArray[Any]] = []

    def handed_over_but_small_ones(leaf: Any) -> Any:
        if not _is_small(leaf):
            return handed_over(leaf)
        small.append(to_numpy(leaf))
        return _SMALL_ONE

    batch = map_leaves(handed_over_but_small_ones, batch)
    if not small:
        return batch
    copies = iter(_copies_in_jax(small, device) or map(handed_over, small))
    return map_leaves(lambda leaf: next(copies) if leaf is _SMALL_ONE else leaf, batch)


def _handing_over(library: str, copy: bool | None, device: Any) -> Callable[[Any], Any]:
    """What hands a leaf over."""
    if library not in _TAKERS:
        raise ValueError(f"expected a library among {', '.join(_TAKERS)}, found {library!r}")
    try:
        importlib.import_module(library)
    except ImportError as error:
        raise ImportError(
            f"handing arrays over to {library} needs it, and it cannot be imported ({error}); install {library}"
        ) from error
    if device is not None and library == "tensorflow":
        raise ValueError("expected no device= for tensorflow, which has no backend here; use tf.device")
    there = None if device is None else select_backend(library, device)
    sharing = copy if there is None else copy or None

    def handed_over(leaf: Any) -> Any:
        if leaf is None:
            return None
        array = _hand_over(leaf, library, sharing, there)
        return array if there is None else there.move(array, array.dtype)

    return handed_over


def _copies_in_jax(arrays: list[NDArray[Any]], device: Any) -> list[Any] | None:
    """The arrays in JAX, copied by one compiled call; None if they are to go to another device than the CPU."""
    import jax

    backend = select_backend("jax", device)
    if not backend.books_elsewhere:
        return None
    with jax.ensure_compile_time_eval():
        return backend.leaves_from_bookkeeping(arrays)


def _is_small(leaf: Any) -> bool:
    """Whether JAX copies this array of main memory in less time than it takes to share it."""
    if not is_array(leaf) or library_of(leaf) not in ("numpy", "torch") or on_gpu(leaf):
        return False
    dtype = as_dtype(leaf.dtype)
    if leaf.nbytes > _SMALL or dtype.hasobject or not dtype.isnative:
        return False
    _jax_check(dtype)
    return True


def _hand_over(leaf: Any, library: str, copy: bool | None, there: Backend | None) -> Any:
    """The leaf as an array of the library: on the device `there` if it leaves main memory, else where it is."""
    if not is_array(leaf):
        raise ValueError(f"expected an array, found a {type(leaf).__name__}: {leaf!r:.80}")
    taker, own, dtype = _TAKERS[library], library_of(leaf), as_dtype(leaf.dtype)
    if own == library and not copy:
        return leaf
    taker.check_dtype(dtype)
    if own == library:
        return taker.copy(leaf)
    if dtype.hasobject:
        raise ValueError(f"expected a dtype of a fixed size, found {leaf.dtype}")
    leaves_main_memory = there is not None and there.device != "cpu" and library != "numpy" and not on_gpu(leaf)
    if not copy and not leaves_main_memory:
        try:
            why = _obstacle(leaf, library)
            if why is None:
                return taker.share(leaf)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        if copy is False:
            raise ValueError(f"{library} cannot share the memory of this array: {why}; pass copy=None or copy=True")
    if on_gpu(leaf) and library != "numpy" and own in _TAKERS:
        return taker.share(_TAKERS[own].copy(leaf))
    try:
        if there is not None and leaves_main_memory:
            # Not shared first and moved then: JAX moves it later, when its owner may have changed it.
            array = to_numpy(leaf)
            return there.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
        return taker.from_numpy(_own_copy(to_numpy(leaf)))
    except (BufferError, RuntimeError) as error:
        raise ValueError(f"{library} cannot hold {dtype}: {error}") from error


def _own_copy(array: NDArray[Any]) -> NDArray[Any]:
    """A copy that every library can share: aligned and C-contiguous."""
    memory = np.empty(array.nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    own: NDArray[Any] = np.ndarray(array.shape, array.dtype.newbyteorder("="), memory, start)
    own[...] = array
    return own


# What is found out before a library sees an array -------------------------------------------------------------------


def _obstacle(leaf: Any, library: str) -> str | None:
    """Why the library cannot share the memory of a leaf, as far as that must not be left to the library to find."""
    if library == "numpy" and on_gpu(leaf):
        return "it is in the memory of a GPU"
    if library == "cupy" and not on_gpu(leaf):
        return "it is in main memory"
    if isinstance(leaf, np.generic) and library != "numpy":
        return "it is a single number of NumPy's, which has no memory to share"
    if library == "torch" and isinstance(leaf, np.ndarray):
        if leaf.flags.carray:
            return None
        if not leaf.flags.writeable:
            return "it is read-only, and a tensor is not"
    if library_of(leaf) == "torch" and leaf.requires_grad:
        return "it requires gradients"
    if library_of(leaf) == "torch" and leaf.is_neg():
        return "it is the negative of what is in its memory"  # which DLPack leaves out
    address, strides, contiguous = _layout(leaf)
    if library != "numpy" and any(stride < 0 for stride in strides):
        return "it has negative strides"  # torch ends the process (pytorch #188023)
    if library not in ("jax", "tensorflow") or 0 in leaf.shape:
        return None
    if not contiguous:
        return "it is not C-contiguous"
    # JAX makes a copy then, and does not say so; TensorFlow ends the process.
    return f"its address is not a multiple of {_ALIGNMENT}" if address % _ALIGNMENT else None


class _Layout(NamedTuple):
    address: int
    strides: tuple[int, ...]
    contiguous: bool


def _layout(leaf: Any) -> _Layout:
    """Where the memory of a leaf starts, and how it is passed through."""
    library = library_of(leaf)
    if library == "torch":
        strides = tuple(stride * leaf.element_size() for stride in leaf.stride())
        return _Layout(leaf.data_ptr(), strides, leaf.is_contiguous())
    if on_gpu(leaf):
        interface = cuda_interface(leaf)
        if interface is not None:
            given = interface.get("strides")
            return _Layout(interface["data"][0], given or (), given is None)
        if library == "jax":  # bfloat16 and the like
            return _Layout(leaf.unsafe_buffer_pointer(), (), True)
    array = to_numpy(leaf)
    return _Layout(array.ctypes.data, array.strides, array.flags.c_contiguous)


# What takes arrays over, for each library -----------------------------------------------------------------------------


class _Taker(NamedTuple):
    """How a library takes an array."""

    share: Callable[[Any], Any]
    """On the same memory, or an exception."""
    from_numpy: Callable[[NDArray[Any]], Any]
    """From NumPy, on whatever memory."""
    copy: Callable[[Any], Any]
    """A copy of one of its own, C-contiguous and on the same device."""
    check_dtype: Callable[[np.dtype[Any]], None] = lambda dtype: None
    """Raises a ValueError for a dtype that it lacks, or would change and not say so."""


def _numpy_share(array: Any) -> Any:
    # NumPy knows no extension type in DLPack.
    return to_numpy(array) if is_extension(as_dtype(array.dtype)) else np.from_dlpack(array)


def _torch_share(array: Any) -> Any:
    import torch

    dtype = as_dtype(array.dtype)
    if type(array) is np.ndarray and is_extension(dtype):
        return torch.utils.dlpack.from_dlpack(array.view(f"i{dtype.itemsize}")).view(getattr(torch, dtype.name))
    return torch.utils.dlpack.from_dlpack(array)


def _torch_check(dtype: np.dtype[Any]) -> None:
    import torch

    if is_extension(dtype) and not isinstance(getattr(torch, dtype.name, None), torch.dtype):
        raise no_dtype("torch", dtype, "choose another dtype or another library")


def _jax_share(array: Any) -> Any:
    import jax

    if library_of(array) in ("numpy", "torch") and not on_gpu(array):
        # By DLPack it would be XLA's threads that give NumPy's memory back. For that they take the lock of the
        # interpreter, which ends the process with an abort where Python ends meanwhile (pytorch #38228).
        array = array if type(array) is np.ndarray else _numpy_share(array)
        shared = _jax_from_numpy(array)
    else:
        shared = jax.dlpack.from_dlpack(array)
    if 0 not in array.shape and shared.unsafe_buffer_pointer() != _layout(array).address:
        raise TypeError("JAX made a copy")
    return shared


def _jax_from_numpy(array: NDArray[Any]) -> Any:
    import jax

    with jax.ensure_compile_time_eval():
        return jax.device_put(array, jax.local_devices(backend="cpu")[0], may_alias=True)


def _jax_check(dtype: np.dtype[Any]) -> None:
    import jax

    native = dtype.newbyteorder("=")
    if jax.dtypes.canonicalize_dtype(native) != native:
        raise ValueError(f'JAX narrows {dtype}; call jax.config.update("jax_enable_x64", True) first')


def _tensorflow_share(array: Any) -> Any:
    import tensorflow as tf

    if as_dtype(array.dtype) == np.bool_:
        raise TypeError("TensorFlow takes no bool by DLPack")
    if on_gpu(array):
        _wait_for(array)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


def _wait_for(array: Any) -> None:
    """Wait until what its library still does to an array on a GPU is done."""
    # That TensorFlow needs this has not been seen on a GPU yet.
    library = library_of(array)
    if library == "cupy":
        with array.device:
            importlib.import_module("cupy").cuda.get_current_stream().synchronize()
    elif library == "torch":
        importlib.import_module("torch").cuda.current_stream(array.device).synchronize()
    else:
        array.block_until_ready()


def _of(library: str, path: str) -> Callable[[Any], Any]:
    """A function of a library that is imported when it is called."""

    def call(array: Any) -> Any:
        function = importlib.import_module(library)
        for name in path.split("."):
            function = getattr(function, name)
        return function(array)  # type: ignore[operator]

    return call


_TAKERS = {
    "numpy": _Taker(_numpy_share, lambda array: array, np.array),
    "torch": _Taker(_torch_share, _torch_share, lambda tensor: tensor.detach().clone().contiguous(), _torch_check),
    "jax": _Taker(_jax_share, _jax_from_numpy, _of("jax", "numpy.copy"), _jax_check),
    "tensorflow": _Taker(_tensorflow_share, _of("tensorflow", "constant"), _of("tensorflow", "identity")),
    "cupy": _Taker(_of("cupy", "from_dlpack"), _of("cupy", "asarray"), lambda array: array.copy()),
}

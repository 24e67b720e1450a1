"""The storage as a ``tf.Module`` that TensorFlow checkpoints: the place of TF-Agents' NumpyStorage and NumpyState.

Importing anystore does not import this file, which imports TensorFlow at once.
"""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from anystore.backends import select_backend
from anystore.backends.base import Array, Buffer
from anystore.backends.numpy import NumpyBackend
from anystore.convert import is_array, library_of, to_numpy
from anystore.nests import Nest, label
from anystore.rows import Rows
from anystore.specs import ArraySpec, as_count
from anystore.storage import Storage

_CHUNK = 2**24
"""The bytes of a buffer that are on the way to or from a checkpoint at a time."""


class NumpyStorage(tf.Module):  # type: ignore[misc]  # TensorFlow has no type hints
    """A fixed number of rows for nested items: `Storage` with the face of TF-Agents' class of this name.

    It takes the place of ``tf_agents.utils.numpy_storage.NumpyStorage`` (TF-Agents 0.19): the same calls store the
    same bits, and checkpoints of either class restore into the other.

    Parameters
    ----------
    data_spec : nest of ArraySpec
        What an item looks like: a nest in the sense of ``tf.nest`` with an `ArraySpec`, of anystore or of TF-Agents
        (bounded ones as well), at each leaf.
    capacity : int
        The number of rows.
    backend : str, module, array or Backend, default "numpy"
        The array library of the buffers; see `select_backend`.
    device : str or device object, optional
        Where the buffers live; see `select_backend`.
    name : str, optional
        The name of the module; as a rule the class's, in snake case.

    Raises
    ------
    ValueError
        If `data_spec` is not an ArraySpec or a nest of them, or holds a dtype that the library lacks; if the capacity
        is not positive; if there is no such backend or device.
    ImportError
        If the library is not installed.

    Notes
    -----
    The buffers are made when something is first read, written or restored. Rows that were never written hold zeros.

    A checkpoint holds the bytes of a ``.npy`` file for each leaf, under ``_np_state/buffer0`` and so on in the order
    of ``tf.nest``, whatever the backend: it restores into a storage on any other. A restore that is refused, since a
    leaf does not fit, may have brought others of them.

    Any number of threads may read at once. Writing and restoring need a lock of the caller's own against both reading
    and writing.

    Examples
    --------
    >>> import numpy as np
    >>> from anystore import ArraySpec, NumpyStorage
    >>> store = NumpyStorage({"obs": ArraySpec((2,), "float32"), "reward": ArraySpec((), "float32")}, capacity=10)
    >>> store.set(3, {"obs": np.ones(2, np.float32), "reward": 0.5})
    >>> store.get([3, 4])["reward"]
    array([0.5, 0. ], dtype=float32)
    """

    def __init__(
        self, data_spec: Any, capacity: int, *, backend: Any = "numpy", device: Any = None, name: str | None = None
    ) -> None:
        super().__init__(name=name)
        self._anystore = _Storage(data_spec, capacity, backend, device)
        self._np_state = tf.__internal__.tracking.AutoTrackable()
        for number, position in enumerate(self._anystore.tf_order()):
            setattr(self._np_state, f"buffer{number}", _SavedBuffer(self._anystore, position))

    def get(self, idx: Any) -> Any:
        """The items at `idx`.

        Parameters
        ----------
        idx : index
            An int, a slice, integers (a list, a range, an array, in any number of dimensions), a mask of the
            capacity's length, or ``...``; see `Storage`.

        Returns
        -------
        nest of arrays
            In containers of the spec's own types. Each leaf has the index's axes in front: none for an int, one for a
            slice or a mask, those of the array for an array of integers. On NumPy what an int or a slice reads are
            live views of the buffers, and a single number is a NumPy scalar; what an array reads is a copy. On
            another backend there are views where its library has them, and no scalars.

        Raises
        ------
        IndexError, TypeError
            For an index that is out of range, or not an index (None, a bool and a tuple among them).
        """
        return self._anystore.get(idx, copy=True if _is_array_of_one(idx) else None)

    def set(self, table_idx: Any, value: Any) -> None:
        """Write `value` to the rows at `table_idx`, whole or not at all.

        Parameters
        ----------
        table_idx : index
            Which rows, as in `get`. If a row is there more than once, the last of its values stays.
        value : nest
            An item or a batch: a nest like the spec, in which lists, tuples and namedtuples may stand for each other;
            a list is always a nest, never a leaf. Each leaf is broadcast to the rows and cast to the dtype of its
            spec just as NumPy does it in ``array[table_idx] = leaf``. It is copied.

        Raises
        ------
        IndexError, TypeError
            For an index that is out of range, or not an index.
        ValueError
            For a nest that is not like the spec, and for a leaf that NumPy refuses to assign; with the path of the
            leaf. Nothing has been written.
        """
        self._anystore.set(table_idx, value)

    @property
    def storage(self) -> Storage:
        """The storage behind the calls, which can do what `Storage` can: save a snapshot, above all.

        Notes
        -----
        From a checkpoint to a snapshot, and back::

            tf.train.Checkpoint(store=store).restore(checkpoint).assert_consumed()
            store.storage.save("snapshot")

            store.set(..., anystore.load("snapshot").get(..., copy=None))
            tf.train.Checkpoint(store=store).save("checkpoint")
        """
        return self._anystore


class NumpyState(tf.__internal__.tracking.AutoTrackable):  # type: ignore[misc]  # TensorFlow has no type hints
    """An object whose attributes are NumPy arrays or scalars, saved in TensorFlow's checkpoints and restored from them.

    It takes the place of ``tf_agents.utils.numpy_storage.NumpyState`` (TF-Agents 0.19).

    Raises
    ------
    NotImplementedError
        If anything but a NumPy array or scalar is assigned to an attribute.

    Notes
    -----
    A restore makes the attributes that the checkpoint has and the object lacks, and happens at once, in graph mode
    too: no restore op is needed. A scalar comes back as an array of no dimensions. Assigning stores a reference, not
    a copy.

    The object does nothing about threads: guard attributes that several of them write.

    Examples
    --------
    >>> import numpy as np
    >>> import tensorflow as tf
    >>> from anystore import NumpyState
    >>> state = NumpyState()
    >>> state.rows = np.arange(3)
    >>> checkpoint = tf.train.Checkpoint(state=state)
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, (np.ndarray, np.generic)):
            is_new = name not in vars(self)
            object.__setattr__(self, name, value)
            if is_new and name in vars(self):  # and not what the setter of a property took
                self._track_trackable(_SavedAttribute(self, name), name, overwrite=True)
        elif self._is_bookkeeping(name):
            super().__setattr__(name, value)
        else:
            raise NotImplementedError(
                f"{name}: expected a NumPy array or scalar, found a {type(value).__name__}: {value!r:.80}; "
                "a NumpyState holds nothing else, since a restore could not tell what to make of it"
            )

    def _is_bookkeeping(self, name: str) -> bool:
        """Whether it is TensorFlow that sets the attribute, to keep track of this object."""
        own = name.startswith("_self_") or name in ("_setattr_tracking", "_update_uid")
        return own or not getattr(self, "_self_setattr_tracking", True)

    def _lookup_dependency(self, name: str, cached_dependencies: Any = None) -> Any:
        found = super()._lookup_dependency(name, cached_dependencies)
        # A restore is what asks with the dependencies at hand; whatever name it asks for is made for it, but for what a
        # checkpoint keeps of its own in its root.
        if found is None and cached_dependencies is not None and name != "save_counter":
            found = self._track_trackable(_SavedAttribute(self, name), name)
        return found

    def _trackable_children(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        children = super()._trackable_children(*arguments, **options)
        # A restore asked for these and failed, or found no array to bring.
        missing = {n for n, c in children.items() if isinstance(c, _SavedAttribute) and n not in vars(self)}
        return {name: child for name, child in children.items() if name not in missing}

    def __copy__(self) -> NumpyState:
        made = type(self).__new__(type(self))
        for name, value in vars(self).items():
            if isinstance(value, (np.ndarray, np.generic)):
                NumpyState.__setattr__(made, name, value)
        return made


class _SavedAttribute(tf.train.experimental.PythonState):  # type: ignore[misc]  # TensorFlow has no type hints
    """An attribute of a NumpyState in a checkpoint."""

    def __init__(self, state: NumpyState, name: str) -> None:
        self._state = state
        self._name = name

    def serialize(self) -> bytes:
        stream = io.BytesIO()
        np.save(stream, getattr(self._state, self._name), allow_pickle=False)
        return stream.getvalue()

    def deserialize(self, string_value: bytes) -> None:
        object.__setattr__(self._state, self._name, np.load(io.BytesIO(string_value), allow_pickle=False))


class _SavedBuffer(tf.train.experimental.PythonState):  # type: ignore[misc]  # TensorFlow has no type hints
    """A buffer of a storage in a checkpoint; one that was not made yet is saved as the integer 0, as in TF-Agents."""

    def __init__(self, storage: _Storage, position: int) -> None:
        self._storage = storage
        self._position = position

    def serialize(self) -> bytes:
        stream = io.BytesIO()
        self._storage.save_buffer(self._position, stream)
        return stream.getvalue()

    def deserialize(self, string_value: bytes) -> None:
        self._storage.restore_buffer(self._position, string_value)


class _TensorflowNest(Nest):
    """A nest that takes what is a nest of the same structure to TensorFlow."""

    __slots__ = ()

    def flatten(self, value: Any) -> list[Any]:
        try:
            return super().flatten(value)
        except ValueError as error:
            pairs = _pairs(self.pack(range(len(self.specs))), value)
            try:
                return [leaf for _, leaf in sorted(pairs, key=lambda pair: pair[0])]
            except _DifferentError:
                raise error from None


class _ScalarsBackend(NumpyBackend):
    """NumPy, with NumPy scalars for the single numbers of a single row."""

    def gather(self, buffers: Sequence[NDArray[Any]], rows: Rows, copy: bool | None) -> list[Array]:
        if type(rows) is not int:
            return super().gather(buffers, rows, copy)
        leaves = [buffer[rows] for buffer in buffers]
        return [leaf.copy() for leaf in leaves] if copy else leaves

    def __reduce__(self) -> Any:
        return type(self), (self.device,)


class _Storage(Storage):
    """A Storage whose buffers are made when they are first needed, and that takes the values of TF-Agents' class."""

    _nest_class = _TensorflowNest

    def __init__(self, data_spec: Any, capacity: int, backend: Any, device: Any) -> None:
        library = select_backend(backend, device)
        if library.name == "numpy":
            library = _ScalarsBackend(library.device)
        self._attach(_checked(data_spec), as_count("capacity", capacity), library, "unsafe")
        self._made: dict[int, Buffer] = {}
        self._making = threading.Lock()

    def tf_order(self) -> Sequence[int]:
        """The position of each leaf in this storage, in the order that TensorFlow gives them."""
        order: list[int] = tf.nest.flatten(self._nest.pack(range(len(self._nest.specs))))
        return order

    def __getattr__(self, name: str) -> Any:
        if name != "_buffers":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        with self._making:
            if "_buffers" not in vars(self):
                self._buffers = self._complete(self._made)
                self._made = {}
            return vars(self)["_buffers"]

    def _complete(self, made: dict[int, Buffer]) -> list[Buffer]:
        """The buffers of all leaves: those that a restore has made, and new ones."""
        if not made:
            return self._allocate(self._capacity)
        places = range(len(self._nest.specs))
        return self._backend.together([made[place] if place in made else self._new_buffer(place) for place in places])

    def _new_buffer(self, position: int) -> Buffer:
        spec = self._nest.specs[position]
        return self._backend.allocate((self._capacity, *spec.shape), spec.dtype)

    def _existing(self) -> dict[int, Buffer]:
        """The buffers that there are, by the position of their leaf."""
        return dict(enumerate(vars(self)["_buffers"])) if "_buffers" in vars(self) else self._made

    def save_buffer(self, position: int, stream: io.BytesIO) -> None:
        """Write the buffer of a leaf to `stream`, as a ``.npy`` file."""
        existing, spec = self._existing(), self._nest.specs[position]
        if position not in existing:
            np.save(stream, np.int64(0))
            return
        shape, descr = (self._capacity, *spec.shape), np.lib.format.dtype_to_descr(spec.dtype)
        header = {"shape": shape, "fortran_order": False, "descr": descr}
        try:
            np.lib.format.write_array_header_1_0(stream, header)
        except (UnicodeEncodeError, ValueError):  # names of fields that version 1 of the format has no room for
            np.save(stream, to_numpy(existing[position]))
            return
        for rows in self._chunks(spec):
            chunk = np.ascontiguousarray(self._backend.to_host(existing[position], rows))
            stream.write(chunk.reshape(-1).view(np.uint8).data)

    def restore_buffer(self, position: int, content: bytes) -> None:
        """Bring the buffer of a leaf to what was saved of it, a ``.npy`` file.

        Raises
        ------
        ValueError
            If it is no such file, or not of the shape and dtype of the buffer; with the path of the leaf.
        """
        existing, spec, where = self._existing(), self._nest.specs[position], label(self._nest.paths[position])
        try:
            array = _read_npy(content)
        except MemoryError:
            raise
        except Exception as error:
            raise ValueError(f"{where}: the checkpoint does not hold a whole .npy file: {error}") from error
        self._track(None)  # buffers change here without a set, so that the next snapshot is to be written whole
        if array.ndim == 0:
            existing.pop(position, None)
            if len(self._selections):  # which have theirs at all times
                self._hold(self._complete(existing), self._capacity)
            else:
                self._made = existing
                vars(self).pop("_buffers", None)
            return
        if array.dtype != spec.dtype and array.dtype.kind == spec.dtype.kind == "V":
            array = _as_extension(array, spec.dtype)
        expected = (self._capacity, *spec.shape)
        if array.shape != expected or array.dtype != spec.dtype:
            raise ValueError(
                f"{where}: expected a checkpoint of shape {expected} and {spec.dtype}, found one of shape "
                f"{array.shape} and {array.dtype}; restore into a storage of the spec and the capacity that were saved"
            )
        if position not in existing:
            self._made[position] = existing[position] = self._new_buffer(position)
        for rows in self._chunks(spec):
            chunk = self._backend.bring(array[rows.start : rows.stop], spec.dtype)
            self._backend.scatter([existing[position]], rows, [chunk])

    def _chunks(self, spec: ArraySpec) -> Iterator[range]:
        step = max(_CHUNK // max(spec.nbytes, 1), 1)
        for start in range(0, self._capacity, step):
            yield range(start, min(start + step, self._capacity))

    def _admit(self, leaves: list[Any], lead: tuple[int, ...]) -> list[Any]:
        specs, backend = self._nest.specs, self._backend
        library = backend.library
        leaves = [
            _assigned(leaf, spec, path, lead, library) for leaf, spec, path in zip(leaves, specs, self._nest.paths)
        ]
        if library == "numpy":
            return leaves
        return [backend.bring(leaf, spec.dtype) for leaf, spec in zip(leaves, specs)]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._made = {}
        self._making = threading.Lock()


def _checked(data_spec: Any) -> Any:
    """The spec in plain containers.

    Raises
    ------
    ValueError
        If a leaf, as TensorFlow sees it, is not an ArraySpec.
    """
    for leaf in tf.nest.flatten(data_spec):
        if not isinstance(leaf, ArraySpec) and not any(_is_tf_agents_spec(base) for base in type(leaf).__mro__):
            raise ValueError(
                "expected an ArraySpec, of anystore or TF-Agents, or a nest of them, "
                f"found {type(leaf).__name__}: {leaf!r:.80}"
            )
    return _plain(data_spec)


def _is_tf_agents_spec(cls: type) -> bool:
    return cls.__name__ == "ArraySpec" and cls.__module__.partition(".")[0] == "tf_agents"


def _plain(node: Any) -> Any:
    """A copy of the containers, less the wrappers that a tf.Module puts around those that are assigned to it."""
    node = getattr(node, "__wrapped__", node)
    if isinstance(node, (list, tuple)):
        children = [_plain(child) for child in node]
        if hasattr(node, "_fields"):
            return type(node)(*children)
        return children if type(node).__name__ == "ListWrapper" else type(node)(children)
    if isinstance(node, dict):
        plain = copy.copy(node)
        plain.update({key: _plain(child) for key, child in node.items()})
        return plain
    return node


def _is_array_of_one(idx: Any) -> bool:
    """Whether NumPy takes an index for an array of no dimensions, which reads a copy where a number reads a view."""
    if type(idx) is int or not is_array(idx) or isinstance(idx, np.generic) or len(idx.shape):
        return False
    return isinstance(idx, np.ndarray) or not hasattr(idx, "__index__")


_NUMBERS = (np.generic, bool, int, float, complex)


class _DifferentError(Exception):
    """A value is no nest like the spec."""


def _pairs(spec: Any, value: Any) -> Iterator[tuple[int, Any]]:
    """Each leaf of `value`, after what `spec` (a nest of integers) has in its place.

    TensorFlow's nests: sequences of all kinds may stand for each other, and what holds no leaf counts for nothing.

    Raises
    ------
    _DifferentError
        If the two are not alike.
    """
    if isinstance(spec, int):
        yield spec, value
        return
    expected, found = _children(spec), _children(value)
    if isinstance(spec, Mapping) != isinstance(value, Mapping):
        raise _DifferentError
    if not all(isinstance(node, Mapping) or _names(node) for node in (spec, value)):
        expected, found = dict(enumerate(expected.values())), dict(enumerate(found.values()))
    if expected.keys() != found.keys() or (not isinstance(spec, Mapping) and list(expected) != list(found)):
        raise _DifferentError
    for key, child in expected.items():
        yield from _pairs(child, found[key])


def _children(node: Any) -> dict[Any, Any]:
    """The children that hold leaves, by key, name or position; none if `node` is a leaf."""
    if isinstance(node, Mapping):
        children = dict(node)
    elif names := _names(node):
        children = {name: getattr(node, name) for name in names}
    else:
        children = dict(enumerate(node)) if isinstance(node, (list, tuple)) else {}
    return {key: child for key, child in children.items() if tf.nest.flatten(child)}


def _names(node: Any) -> list[str]:
    """The names that a namedtuple or an instance of an attrs class gives its children, in order."""
    attributes = getattr(node, "__attrs_attrs__", ())
    return [attribute.name for attribute in attributes] or list(getattr(node, "_fields", ()))


def _assigned(leaf: Any, spec: ArraySpec, path: str, lead: tuple[int, ...], library: str) -> Any:
    """`leaf` as an array of the shape and dtype that NumPy would store it in, or of the backend's own library.

    Raises
    ------
    ValueError
        If NumPy refuses to store it; with the path of the leaf.
    """
    if not isinstance(leaf, _NUMBERS) and not is_array(leaf):
        leaf = _sole(leaf, spec, path)
        leaf = np.asarray(leaf) if hasattr(leaf, "__array__") else leaf
    found, dtype, shape = library_of(leaf), getattr(leaf, "dtype", None), tuple(getattr(leaf, "shape", ()))
    is_stored_as_it_is = dtype is not None and (dtype == spec.dtype if found == "numpy" else found == library)
    if is_stored_as_it_is and shape in (spec.shape, lead + spec.shape):
        return np.asarray(leaf) if found == "numpy" else leaf
    # What is no larger than an item goes to all rows, and is copied to them later.
    shape = (*lead, *spec.shape) if len(shape) > len(spec.shape) else spec.shape
    place = np.empty(shape or 1, spec.dtype)
    try:
        place[... if shape else 0] = to_numpy(leaf) if dtype is not None and found != "numpy" else leaf
    except MemoryError:
        raise
    except Exception as error:  # each library has others of its own
        raise ValueError(f"{label(path)}: NumPy cannot store this for {spec}: {leaf!r:.80} ({error})") from error
    return place.reshape(shape)


def _sole(leaf: Any, spec: ArraySpec, path: str) -> Any:
    """What a value has in the place of a leaf; if that is a list or tuple, the one leaf in it.

    Raises
    ------
    ValueError
        If it is a nest of another kind, with the path of the leaf.
    """
    inner = leaf
    while isinstance(inner, (list, tuple)) and len(inner) == 1:
        (inner,) = inner
    if tf.nest.is_nested(inner):
        raise ValueError(
            f"{label(path)}: expected an array for {spec}, found a {type(leaf).__name__}, which is a nest of its own: "
            f"{leaf!r:.80}; for an array of these: numpy.asarray(...)"
        )
    return inner


def _read_npy(content: bytes) -> NDArray[Any]:
    """The array in the bytes of a ``.npy`` file; where it can be, a view of them."""
    stream = io.BytesIO(content)
    if np.lib.format.read_magic(stream) != (1, 0):
        stream.seek(0)
        array: NDArray[Any] = np.load(stream, allow_pickle=False)
        return array
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    return np.ndarray(shape, dtype, content, stream.tell(), order="F" if is_fortran else "C")


def _as_extension(array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An array of a type of ml_dtypes, which ``.npy`` files keep as bare bytes, as what it was."""
    return array.view(dtype) if array.dtype.itemsize == dtype.itemsize and dtype.names is None else array

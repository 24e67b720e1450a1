"""The contract of Storage: the same index, the same value, the same meaning on every backend."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import numpy as np
import pytest

from anystore import ArraySpec, Backend, Storage, select_backend
from anystore.convert import to_numpy
from tests.items import SPEC, assert_same, batch, given_out_by, host, leaves

CAPACITY = 10

EVERY_THIRD = np.arange(CAPACITY) % 3 == 0
"""A mask."""

INDICES: dict[str, Any] = {
    "int": 3,
    "first": 0,
    "last": 9,
    "minus one": -1,
    "most negative": -10,
    "numpy int": np.int16(4),
    "numpy unsigned": np.uint64(4),
    "0-d array": np.array(5),
    "0-d negative": np.array(-2, np.int8),
    "slice": slice(2, 7),
    "slice of all": slice(None),
    "slice with a step": slice(1, 9, 3),
    "slice backwards": slice(8, 2, -2),
    "slice backwards to row 0": slice(None, None, -1),
    "slice backwards of one": slice(0, None, -1),
    "slice of negatives": slice(-4, -1),
    "slice past the ends": slice(-100, 100),
    "slice past the end, backwards": slice(100, 5, -1),
    "slice of none": slice(7, 3),
    "slice backwards of none": slice(-11, None, -1),
    "slice from the end of none": slice(50, 60),
    "slice of numpy ints": slice(np.int64(1), np.int64(4)),
    "list": [1, 5, 2],
    "list with negatives": [-1, 0, -10],
    "list of one": [3],
    "empty list": [],
    "nested empty list": [[], []],
    "nested list": [[1, 2], [3, 4]],
    "range": range(2, 8, 2),
    "range backwards": range(5, 0, -1),
    "int64 array": np.array([4, 0, 9]),
    "int32 array": np.array([4, 0, -9], np.int32),
    "int8 array": np.array([4, -1], np.int8),
    "uint8 array": np.array([1, 0, 1], np.uint8),
    "uint64 array": np.array([1, 9], np.uint64),
    "empty array": np.array([], np.int64),
    "2-d array": np.array([[0, 1, 2], [-1, -2, -3]]),
    "3-d array": np.arange(8).reshape(2, 2, 2),
    "2-d array of none": np.zeros((2, 0), np.int64),
    "strided array": np.arange(10)[::-3],
    "transposed array": np.arange(6).reshape(2, 3).T,
    "mask": EVERY_THIRD,
    "mask of none": np.zeros(CAPACITY, bool),
    "mask of all": np.ones(CAPACITY, bool),
    "list as a mask": EVERY_THIRD.tolist(),
    "ellipsis": ...,
}

NO_INDICES: dict[str, tuple[Any, type[Exception], str]] = {
    "past the end": (10, IndexError, "row 10 is out of range for a capacity of 10"),
    "before the start": (-11, IndexError, "row -11 is out of range for a capacity of 10"),
    "huge int": (2**70, IndexError, f"row {2**70} is out of range for a capacity of 10"),
    "numpy int past the end": (np.int64(10), IndexError, "row 10 is out of range"),
    "0-d past the end": (np.array(10), IndexError, "row 10 is out of range"),
    "list past the end": ([1, 10], IndexError, "row 10 is out of range for a capacity of 10"),
    "list before the start": ([1, -11], IndexError, "row -11 is out of range for a capacity of 10"),
    "endless range": (range(2**70), IndexError, f"row {2**70 - 1} is out of range for a capacity of 10"),
    "list of a huge int": ([1, 2**70], IndexError, f"row {2**70} is out of range for a capacity of 10"),
    "range past the end": (range(5, 15), IndexError, "row 14 is out of range"),
    "array past the end": (np.array([[0, 99]]), IndexError, "row 99 is out of range"),
    "unsigned past int64": (np.array([2**64 - 1], np.uint64), IndexError, f"row {2**64 - 1} is out of range"),
    "short mask": (np.ones(9, bool), IndexError, r"a mask of shape \(10,\), one for each row, found one of shape \(9,"),
    "long list as a mask": ([True] * 11, IndexError, r"found one of shape \(11,\)"),
    "2-d mask": (np.ones((10, 1), bool), IndexError, r"found one of shape \(10, 1\)"),
    "0-d mask": (np.array(True), IndexError, r"found one of shape \(\)"),
    "float array": (np.array([1.0]), IndexError, "found an array of float64"),
    "list of floats": ([1.0, 2.0], IndexError, "found an array of float64"),
    "list of integers and bools": ([3, True], TypeError, r"found a list of integers and bools: \[3, True\]"),
    "nested list of integers and bools": ([[3, True]], TypeError, r"found a list of integers and bools: \[\[3, T"),
    "list of strings": (["a"], IndexError, "found an array of <U1"),
    "float": (1.0, TypeError, "an index is an int, a slice, integers .* found a float: 1.0"),
    "numpy float": (np.float64(1.0), TypeError, "found a float64"),
    "bool": (True, TypeError, "found a bool: True"),
    "numpy bool": (np.True_, TypeError, "found a bool"),
    "none": (None, TypeError, "found a NoneType: None"),
    "tuple": ((1, 2), TypeError, "found a tuple"),
    "empty tuple": ((), TypeError, "found a tuple"),
    "string": ("obs", TypeError, "found a str: 'obs'"),
    "bytearray": (bytearray(b"\1\2"), TypeError, "found a bytearray"),
    "dict": ({}, TypeError, "found a dict"),
    "ragged list": ([[1], [2, 3]], TypeError, "found a list that is none of these"),
    "slice of floats": (slice(0.0, 2.0), TypeError, "expected a slice of integers"),
    "slice without a step": (slice(0, 5, 0), ValueError, "slice step cannot be zero"),
}


def stamps_of(index: Any) -> Any:
    """The stamps that a storage with stamp r in row r holds at `index`, by NumPy's own indexing."""
    if isinstance(index, (list, range)):
        index = np.asarray(index)
        index = index if index.size else index.astype(np.int64)
    return np.arange(CAPACITY)[index]


def foreign_arrays(library: str, array: np.ndarray[Any, Any]) -> Any:
    """`array` as one of another library."""
    if library == "torch":
        return pytest.importorskip("torch").from_numpy(np.array(array))
    if library == "jax":
        return pytest.importorskip("jax.numpy").asarray(array)
    if library == "array_api_strict":
        strict = pytest.importorskip("array_api_strict")
        return strict.asarray(array, device=strict.Device("device1"))
    return array.tolist() if library == "lists" else array


LIBRARIES = ["numpy", "lists", "torch", "jax", "array_api_strict"]


class StorageContract:
    """Subclassed per backend: `backend` and `device` say which."""

    backend: str
    device: str | None = None
    views = True
    """Whether the backend can give views of int and slice rows."""
    backward_views = True
    """Whether it can give views of slices that count down."""

    def make(self, spec: Any = SPEC, capacity: int = CAPACITY, **options: Any) -> Storage:
        return Storage(spec, capacity, backend=self.backend, device=self.device, **options)

    @pytest.fixture
    def store(self) -> Storage:
        """A storage with stamp r in row r."""
        store = self.make()
        store.set(..., batch(np.arange(CAPACITY)))
        return store

    def wipe(self, store: Storage, nest: Any) -> None:
        """Write zeros to every leaf."""
        for leaf in leaves(nest):
            leaf[...] = store.backend.xp.zeros_like(leaf)

    # Reading ------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
    def test_reads_the_rows_that_an_index_means(self, store: Storage, index: Any) -> None:
        assert_same(store.get(index), batch(stamps_of(index)))

    @pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
    def test_reads_the_same_rows_without_a_copy_where_it_can(self, store: Storage, index: Any) -> None:
        assert_same(store.get(index, copy=None), batch(stamps_of(index)))

    @pytest.mark.parametrize(("index", "error", "text"), NO_INDICES.values(), ids=NO_INDICES)
    def test_refuses_what_is_no_index(self, store: Storage, index: Any, error: type[Exception], text: str) -> None:
        with pytest.raises(error, match=text):
            store.get(index)
        with pytest.raises(error, match=text):
            store.set(index, batch(0))
        assert_same(store.get(...), batch(np.arange(CAPACITY)))

    @pytest.mark.parametrize("library", LIBRARIES)
    @pytest.mark.parametrize("rows", [[1, 5, 2], [[0], [-1]], 4, EVERY_THIRD.tolist()], ids=str)
    def test_takes_rows_of_any_library(self, store: Storage, library: str, rows: Any) -> None:
        index = foreign_arrays(library, np.asarray(rows))
        assert_same(store.get(index), batch(stamps_of(np.asarray(rows))))

    @pytest.mark.parametrize("library", LIBRARIES)
    def test_refuses_rows_of_any_library(self, store: Storage, library: str) -> None:
        with pytest.raises(IndexError, match="row 10 is out of range"):
            store.get(foreign_arrays(library, np.array([0, 10])))
        with pytest.raises(IndexError, match="found an array of float"):
            store.get(foreign_arrays(library, np.array([0.0])))

    def test_takes_rows_of_its_own_library(self, store: Storage) -> None:
        index = store.backend.from_numpy(np.array([3, -1], np.int32))
        assert_same(store.get(index), batch([3, 9]))
        store.set(index, batch([20, 21]))
        assert_same(store.get([3, 9]), batch([20, 21]))

    def test_gives_arrays_of_its_library_on_its_device(self, store: Storage) -> None:
        for index in (3, slice(2), [1]):
            for leaf in leaves(store.get(index)):
                assert select_backend(leaf) is given_out_by(store.backend)

    @pytest.mark.parametrize(
        "rows",
        [3, range(2, 7), range(10), range(4, 4), range(8, 2, -2), np.array([4, 0, 9]), np.zeros(0, int)],
        ids=str,
    )
    def test_brings_rows_to_main_memory(self, store: Storage, rows: Any) -> None:
        """As snapshots and stats read them."""
        found = [store.backend.to_host(buffer, rows) for buffer in store._buffers]
        for leaf in found:
            assert type(leaf) is np.ndarray
        for leaf, expected in zip(found, leaves(batch(rows)), strict=True):
            np.testing.assert_array_equal(leaf, expected, strict=True)

    # Writing ------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
    def test_writes_the_rows_that_an_index_means(self, store: Storage, index: Any) -> None:
        model = np.arange(CAPACITY)
        rows = stamps_of(index)
        model[rows] = rows + 100
        store.set(index, batch(rows + 100))
        assert_same(store.get(...), batch(model))

    @pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
    def test_writes_one_item_to_all_rows(self, store: Storage, index: Any) -> None:
        model = np.arange(CAPACITY)
        model[stamps_of(index)] = 77
        store.set(index, batch(77))
        assert_same(store.get(...), batch(model))

    def test_writes_a_batch_with_one_leaf_for_all_rows(self, store: Storage) -> None:
        value = batch([5, 5, 5])
        value["obs"]["image"] = value["obs"]["image"][0]
        store.set([1, 1, 4], value)
        assert_same(store.get([1, 4]), batch([5, 5]))

    @pytest.mark.parametrize(
        "rows",
        [
            np.array([3, 3]),
            np.array([3, 5, 3, 5, 3]),
            np.array([[7, 7], [0, 7]]),
            np.array([[1, 2], [3, 2], [1, 2]]).T,
            np.array([1, 2, 3, 1])[::-1],
            np.array([-1, 9, 0, -10]),
            np.tile(np.arange(10), 500),
        ],
        ids=lambda rows: str(rows.shape),
    )
    def test_of_several_values_for_a_row_the_last_stays(self, store: Storage, rows: Any) -> None:
        stamps = 50 + np.arange(rows.size).reshape(rows.shape)
        model = np.arange(CAPACITY)
        for row, stamp in zip(rows.reshape(-1), stamps.reshape(-1), strict=True):
            model[row] = stamp
        store.set(rows, batch(stamps))
        assert_same(store.get(...), batch(model))

    def test_last_stays_whatever_the_layout_of_the_value(self, store: Storage) -> None:
        rows, stamps = np.array([[1, 2, 1], [2, 1, 2]]), np.arange(6).reshape(2, 3)
        value = batch(stamps)
        value["obs"]["image"] = np.asfortranarray(value["obs"]["image"])
        value["action"][0] = np.ascontiguousarray(value["action"][0][::-1])[::-1]
        store.set(rows, value)
        assert_same(store.get([1, 2]), batch([4, 5]))

    @pytest.mark.parametrize("library", LIBRARIES)
    @pytest.mark.parametrize("index", [2, slice(0, 3), [4, 1, 4]], ids=str)
    def test_takes_values_of_any_library(self, store: Storage, library: str, index: Any) -> None:
        stamps = np.asarray(7 if index == 2 else [7, 8, 9])
        spec = {"image": ArraySpec((3, 2), "uint8"), "count": ArraySpec((), "int32"), "x": ArraySpec((2,), "float32")}
        value = {
            "image": (stamps[..., None, None] + np.zeros((3, 2), np.int64)).astype(np.uint8),
            "count": stamps.astype(np.int32),
            "x": (stamps[..., None] + np.zeros(2)).astype(np.float32),
        }
        store = self.make(spec)
        store.set(index, {key: foreign_arrays(library, leaf) for key, leaf in value.items()})
        model = {key: np.zeros((CAPACITY, *spec[key].shape), spec[key].dtype) for key in spec}
        for key, leaf in value.items():
            model[key][index] = leaf
        assert_same(store.get(...), model)

    def test_takes_values_of_its_own_library(self, store: Storage) -> None:
        store.set(slice(0, 5), store.get(slice(5, 10)))
        assert_same(store.get(...), batch([5, 6, 7, 8, 9, 5, 6, 7, 8, 9]))

    def test_keeps_no_hold_of_the_value(self, store: Storage) -> None:
        value = batch([70, 71])
        for index in (slice(0, 2), [4, 5]):
            store.set(index, value)
        for leaf in leaves(value):
            leaf[...] = 0
        assert_same(store.get([0, 1, 4, 5]), batch([70, 71, 70, 71]))

    def test_takes_a_view_of_the_rows_that_it_writes(self, store: Storage) -> None:
        store.set(slice(1, 10), store.get(slice(0, 9), copy=None))
        assert_same(store.get(...), batch([0, 0, 1, 2, 3, 4, 5, 6, 7, 8]))
        store.set([5, 4, 5], store.get(slice(4, 7), copy=None))
        assert_same(store.get(...), batch([0, 0, 1, 2, 4, 5, 5, 6, 7, 8]))

    def test_takes_its_own_buffers(self, store: Storage) -> None:
        store.set(..., store.buffers)
        store.set(np.arange(CAPACITY)[::-1], store.buffers)
        assert_same(store.get(...), batch(np.arange(CAPACITY)[::-1]))

    def test_takes_views_of_one_leaf_for_another(self) -> None:
        store = self.make({"a": ArraySpec((), "int32"), "b": ArraySpec((), "int32")})
        store.set(..., {"a": np.arange(CAPACITY, dtype=np.int32), "b": np.arange(CAPACITY, dtype=np.int32) + 50})
        for index in (slice(0, 3), 3, [4, 5]):
            live = store.get(index, copy=None)
            store.set(index, {"a": live["b"], "b": live["a"]})
        swapped = np.arange(CAPACITY) < 6
        first, second = np.arange(CAPACITY, dtype=np.int32), np.arange(CAPACITY, dtype=np.int32) + 50
        assert_same(store.get(...), {"a": np.where(swapped, second, first), "b": np.where(swapped, first, second)})

    def test_takes_rows_that_are_a_view_of_its_own_buffers(self) -> None:
        """As the rows of a linked list are, which a write may change while it goes on."""
        store = self.make({"next": ArraySpec((), "int32"), "value": ArraySpec((), "int32")})
        start = {"next": np.arange(CAPACITY, dtype=np.int32), "value": np.zeros(CAPACITY, np.int32)}
        for make in (lambda: store.get(slice(0, 3), copy=None)["next"], lambda: store.buffers["next"][:3, ...]):
            store.set(..., start)
            store.set(make(), {"next": np.array([5, 600, 7], np.int32), "value": np.array([1, 2, 3], np.int32)})
            assert to_numpy(store.get(...)["next"])[:4].tolist() == [5, 600, 7, 3]
            assert to_numpy(store.get(...)["value"]).tolist() == [1, 2, 3] + [0] * 7

    def test_fills_the_very_array_that_names_the_rows(self) -> None:
        store = self.make({"a": ArraySpec((), "int32"), "b": ArraySpec((), "int32")})
        store.set(..., {"a": np.arange(CAPACITY, dtype=np.int32) + 2**30, "b": np.arange(CAPACITY, dtype=np.int32)})
        index = store.backend.from_numpy(np.array([1, 2, 3], np.int32))
        if store.backend.has_views:
            found = store.get(index, out={"a": index, "b": store.backend.from_numpy(np.zeros(3, np.int32))})
            assert to_numpy(found["a"]).tolist() == [2**30 + 1, 2**30 + 2, 2**30 + 3]
            assert to_numpy(found["b"]).tolist() == [1, 2, 3]

    def test_takes_lists_of_nothing(self) -> None:
        store = self.make({"a": ArraySpec((2,), "int32"), "b": ArraySpec((), "bool"), "c": ArraySpec((0,), "uint8")})
        store.set([], {"a": np.zeros((0, 2), np.int32), "b": [], "c": []})
        store.set(3, {"a": [1, 2], "b": True, "c": []})
        assert to_numpy(store.get(3)["a"]).tolist() == [1, 2]

    # Refusing -----------------------------------------------------------------------------------------------------

    def refuse(self, store: Storage, index: Any, value: Any, error: type[Exception], text: str) -> None:
        with pytest.raises(error, match=text):
            store.set(index, value)
        assert_same(store.get(...), batch(np.arange(CAPACITY)))

    @pytest.mark.parametrize("index", [3, slice(0, 4), [1, 2, 1, 3]], ids=str)
    def test_refuses_a_wrong_shape_and_writes_nothing(self, store: Storage, index: Any) -> None:
        value = batch(50 if index == 3 else [50, 51, 52, 53])
        value["obs"]["pose"] = value["obs"]["pose"]._replace(position=np.zeros((4, 5), np.float32))
        lead = "" if index == 3 else "4, "
        expected = f"obs/pose/position: expected shape ({lead}4{'' if lead else ','}), found (4, 5)"
        self.refuse(store, index, value, ValueError, f"^{re.escape(expected)}$")

    def test_broadcasts_nothing_else(self, store: Storage) -> None:
        self.refuse(store, slice(0, 2), batch([1]), ValueError, r"expected shape \(2,\), found \(1,\)")
        self.refuse(store, [3], batch([[1]]), ValueError, r"action/0: expected shape \(1,\), found \(1, 1\)")
        self.refuse(store, 3, batch([1]), ValueError, r"expected shape \(\), found \(1,\)")

    def test_refuses_a_wrong_dtype_and_writes_nothing(self, store: Storage) -> None:
        value = batch(50)
        value["obs"]["image"] = value["obs"]["image"].astype(np.float32)
        text = "^obs/image: expected uint8, found float32, which casting='same_kind' refuses; convert the value"
        self.refuse(store, 3, value, TypeError, text)

    def test_refuses_the_shape_of_one_leaf_before_the_dtype_of_another(self, store: Storage) -> None:
        value = batch(50)
        value["action"][0] = np.float64(1)
        value["obs"]["image"] = np.zeros(3, np.uint8)
        self.refuse(store, 3, value, ValueError, "^obs/image: expected shape")

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            (lambda value: value.pop("action"), r"^the item: missing \['action'\]; expected \['action', 'obs'\]$"),
            (lambda value: value.update(extra=1), r"^the item: unexpected \['extra'\]; expected \['action', 'obs'\]$"),
            (lambda value: value["obs"].pop("pose"), r"^obs: missing \['pose'\]; expected \['image', 'pose'\]$"),
            (lambda value: value["action"].append(1), r"^action: unexpected \[2\]; expected \[0, 1\]$"),
            (lambda value: value["action"].pop(), r"^action: missing \[1\]; expected \[0, 1\]$"),
            (lambda value: value.update(action=(1, (2,))), "^action: expected a list, found a tuple$"),
            (lambda value: value["obs"].update(pose=(1, 2)), "^obs/pose: expected a Pose, found a tuple$"),
            (lambda value: value.update(obs=None), "^obs: expected a dict, found a NoneType$"),
            (lambda value: (value.pop("action"), value["obs"].pop("image")), "(?s)missing.*obs: missing"),
        ],
        ids=[
            "missing",
            "unexpected",
            "missing below",
            "too long",
            "too short",
            "tuple",
            "no namedtuple",
            "none",
            "two places",
        ],
    )
    def test_refuses_another_structure_and_writes_nothing(self, store: Storage, change: Any, text: str) -> None:
        value = batch(50)
        change(value)
        self.refuse(store, 3, value, ValueError, text)

    @pytest.mark.parametrize(
        "found", [None, "three", {"a": 1}, object(), [object()]], ids=["none", "text", "dict", "object", "objects"]
    )
    def test_refuses_what_is_no_array(self, store: Storage, found: Any) -> None:
        value = batch(50)
        value["obs"]["image"] = found
        self.refuse(store, 3, value, (TypeError, ValueError), "^obs/image: expected ")

    @pytest.mark.parametrize("number", [256, -1, 2**40, 2**70, [[0, 0], [0, 0], [0, 256]]], ids=str)
    def test_refuses_a_python_int_that_does_not_fit(self, store: Storage, number: Any) -> None:
        store, value = self.make({"a": ArraySpec((), "float32"), "b": ArraySpec((), "uint8")}), {"a": 1.0, "b": number}
        if isinstance(number, list):
            store, value["b"] = self.make({"a": ArraySpec((), "float32"), "b": ArraySpec((3, 2), "uint8")}), number
        with pytest.raises(OverflowError, match="^b: expected integers that fit uint8, found"):
            store.set(3, value)
        assert not any(to_numpy(leaf).any() for leaf in leaves(store.get(...)))

    @pytest.mark.parametrize("number", [300, -1, 2**40, 2**70], ids=str)
    @pytest.mark.filterwarnings("ignore")
    def test_no_filter_of_warnings_lets_an_int_through(self, number: int) -> None:
        store = self.make({"a": ArraySpec((), "uint8")})
        for value in (number, [[number]], [number]):
            with pytest.raises((OverflowError, ValueError), match="^a: expected "):
                store.set(0, {"a": value})
        assert int(to_numpy(store.get(0)["a"])) == 0

    def test_an_array_that_is_not_what_it_says_is_refused_by_its_path(self, store: Storage) -> None:
        class Broken:
            shape, dtype = (3, 2), np.dtype("uint8")

            def __init__(self, content: Any) -> None:
                self.content = content

            def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
                if isinstance(self.content, Exception):
                    raise self.content
                return self.content

        for content, text in (
            (
                np.zeros((3, 3), np.uint8),
                r"^obs/image: the array says that its shape is \(3, 2\), and is read as \(3, 3\)$",
            ),
            (RuntimeError("gone"), "^obs/image: an array of type Broken cannot be read into NumPy: gone$"),
        ):
            value = batch(50)
            value["obs"]["image"] = Broken(content)
            self.refuse(store, 3, value, (TypeError, ValueError), text)

    def test_refuses_none_in_a_batch_that_is_too_long(self, store: Storage) -> None:
        self.refuse(store, slice(8, 20), batch(np.arange(12)), ValueError, r"expected shape \(2,\), found \(12,\)")

    # dtypes -------------------------------------------------------------------------------------------------------

    dtypes = ("bool", "uint8", "int8", "int16", "int32", "int64", "float32", "float64")
    """Those that the backend can store."""
    no_dtypes: tuple[str, ...] = ()
    """Those that it cannot."""

    def values(self, dtype: str) -> Any:
        dtype = ArraySpec((), dtype).dtype
        if dtype.kind == "b":
            return np.arange(CAPACITY * 2).reshape(CAPACITY, 2) % 3 == 0
        return (np.arange(CAPACITY * 2).reshape(CAPACITY, 2) - (5 if dtype.kind != "u" else 0)).astype(dtype)

    def test_stores_each_dtype_bit_by_bit(self) -> None:
        for name in self.dtypes:
            store = self.make(ArraySpec((2,), name))
            values = self.values(name)
            store.set(np.arange(CAPACITY), values)
            store.set(3, values[3])
            store.set(slice(4, 6), values[4:6])
            found = to_numpy(store.get(np.arange(CAPACITY)))
            assert found.dtype == values.dtype
            assert found.tobytes() == values.tobytes()
            assert to_numpy(store.get(slice(2, 4))).tobytes() == values[2:4].tobytes()
            assert to_numpy(store.get(7)).tobytes() == values[7].tobytes()
            twin = pickle.loads(pickle.dumps(store))
            assert twin.data_spec == store.data_spec
            assert to_numpy(twin.get(...)).tobytes() == values.tobytes()

    def test_refuses_a_dtype_that_the_library_lacks(self) -> None:
        for name in self.no_dtypes:
            dtype = re.escape(str(ArraySpec((), name).dtype))
            with pytest.raises(ValueError, match=f"^a/b: .* has no {dtype}; (choose|call)"):
                self.make({"a": {"b": ArraySpec((), name)}})

    @pytest.mark.parametrize(
        ("found", "expected", "casting", "allowed"),
        [
            ("float64", "float32", "same_kind", True),
            ("int32", "int16", "same_kind", True),
            ("int32", "float32", "same_kind", True),
            ("bool", "int32", "same_kind", True),
            ("float32", "int32", "same_kind", False),
            ("int32", "bool", "same_kind", False),
            ("int16", "uint8", "same_kind", False),
            ("float32", "int32", "unsafe", True),
            ("int16", "uint8", "unsafe", True),
            ("float64", "float32", "safe", False),
            ("uint8", "int16", "safe", True),
            ("uint8", "int16", "no", False),
            ("int16", "int16", "no", True),
        ],
    )
    def test_casts_as_numpy_does(self, found: str, expected: str, casting: Any, allowed: bool) -> None:
        store = self.make({"x": ArraySpec((3,), expected)}, casting=casting)
        value = np.array([1, 0, 3]).astype(found)
        if not allowed:
            with pytest.raises(TypeError, match=f"^x: expected {expected}, found {found}, which casting='{casting}'"):
                store.set(0, {"x": value})
            return
        store.set(0, {"x": value})
        store.set([1, 2], {"x": np.stack([value, value])})
        assert_same(store.get([0, 1, 2])["x"], np.stack([value] * 3).astype(expected))

    @pytest.mark.parametrize(
        ("number", "dtype"),
        [
            (1, "uint8"),
            (1, "float32"),
            (True, "uint8"),
            (True, "float32"),
            (1.5, "float32"),
            (True, "bool"),
            (-1, "int8"),
        ],
    )
    def test_python_numbers_take_the_dtype_of_the_leaf(self, number: Any, dtype: str) -> None:
        for casting in ("no", "safe", "same_kind", "unsafe"):
            store = self.make({"x": ArraySpec((), dtype), "y": ArraySpec((2,), dtype)}, casting=casting)
            store.set(1, {"x": number, "y": [number, number]})
            store.set([2, 3], {"x": [number, number], "y": [[number, number]] * 2})
            expected = np.full(3, number, dtype)
            assert_same(store.get([1, 2, 3]), {"x": expected, "y": np.stack([expected, expected], axis=1)})

    @pytest.mark.parametrize(("number", "dtype"), [(1.5, "int32"), (1, "bool"), (1.0, "bool")])
    def test_python_numbers_lose_no_kind(self, number: Any, dtype: str) -> None:
        store = self.make({"x": ArraySpec((), dtype)})
        with pytest.raises(TypeError, match=f"^x: expected {dtype}, found "):
            store.set(1, {"x": number})

    # Aliasing -----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("copy", [True, None])
    @pytest.mark.parametrize("index", [3, slice(2, 5), slice(None), slice(5, 2, -1), [3, 2], ...], ids=str)
    def test_what_was_copied_stays_as_it_was(self, store: Storage, index: Any, copy: bool | None) -> None:
        found = store.get(index, copy=copy)
        if copy is None:  # then only what is no view
            index = [3, 2]
            found = store.get(index, copy=copy)
        store.set(..., batch(99))
        assert_same(found, batch(stamps_of(np.arange(CAPACITY) if index is ... else index)))

    def test_a_copy_can_be_written_to_without_harm(self, store: Storage) -> None:
        for index in (3, slice(2, 5), [3, 2]):
            if store.backend.has_views:
                self.wipe(store, store.get(index))
        assert_same(store.get(...), batch(np.arange(CAPACITY)))

    @pytest.mark.parametrize("index", [3, slice(2, 5), slice(0, 10, 3), slice(8, 2, -2), ...], ids=str)
    def test_views_are_live(self, store: Storage, index: Any) -> None:
        backwards = isinstance(index, slice) and index.step == -2
        if not self.views or (backwards and not self.backward_views):
            with pytest.raises(ValueError, match="view.* copy=False cannot be had; pass copy=None or copy=True"):
                store.get(index, copy=False)
            return
        for live in (False, None):
            view = store.get(index, copy=live)
            store.set(index, batch(33))
            assert_same(view, batch(np.full_like(stamps_of(index), 33)))
            self.wipe(store, view)
            assert not any(to_numpy(leaf).any() for leaf in leaves(store.get(index)))

    @pytest.mark.parametrize("index", [[1, 2], np.array([[0]]), EVERY_THIRD, range(3)], ids=str)
    def test_an_array_of_rows_has_no_view(self, store: Storage, index: Any) -> None:
        with pytest.raises(ValueError, match="copy=False cannot be had; pass copy=None or copy=True"):
            store.get(index, copy=False)

    def test_buffers_are_the_live_ones(self, store: Storage) -> None:
        assert_same(store.buffers, batch(np.arange(CAPACITY)))
        store.set(3, batch(60))
        assert_same(store.buffers, batch([0, 1, 2, 60, 4, 5, 6, 7, 8, 9]))
        if self.views:
            self.wipe(store, store.buffers)
            assert not any(to_numpy(leaf).any() for leaf in leaves(store.get(...)))

    # out= ---------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
    def test_fills_out(self, store: Storage, index: Any) -> None:
        out = self.make().get(index)
        if not store.backend.has_views:
            with pytest.raises(ValueError, match="out="):
                store.get(index, out=out)
            return
        assert store.get(index, out=out) is out
        assert_same(out, batch(stamps_of(index)))

    def test_refuses_an_out_that_does_not_fit(self, store: Storage) -> None:
        good = store.get([1, 2])
        if not store.backend.mutable:
            with pytest.raises(ValueError, match="^arrays of .* cannot be written to, so out= is not taken"):
                store.get([1, 2], out=good)
            return
        for change, text in (
            ({"image": store.get([1])["obs"]["image"]}, r"^obs/image: expected shape \(2, 3, 2\) in out=, found \(1,"),
            ({"image": store.get([1, 2])["action"][0]}, r"^obs/image: expected shape \(2, 3, 2\) in out=, found \(2,"),
            (
                {"image": [0]},
                "^obs/image: expected an array of .* that can be written to in out=, found a list; a read-",
            ),
            ({"extra": 1}, r"^obs: unexpected \['extra'\]"),
        ):
            with pytest.raises(ValueError, match=text):
                store.get([1, 2], out={**good, "obs": {**good["obs"], **change}})
        other = self.make({**SPEC, "action": [ArraySpec((), "int16"), SPEC["action"][1]]})
        with pytest.raises(ValueError, match="^action/0: expected int32 in out=, found .*int16"):
            store.get([1, 2], out=other.get([1, 2]))
        with pytest.raises(ValueError, match="out= is filled with a copy"):
            store.get([1, 2], out=good, copy=False)
        assert_same(good, batch([1, 2]))

    # The storage as a whole ---------------------------------------------------------------------------------------

    def test_starts_with_zeros(self) -> None:
        assert not any(to_numpy(leaf).any() for leaf in leaves(self.make().get(...)))

    def test_capacity_of_one(self) -> None:
        store = self.make(capacity=1)
        store.set(-1, batch(5))
        assert_same(store.get([0, -1, 0]), batch([5, 5, 5]))
        assert_same(store.get([True]), batch([5]))
        with pytest.raises(IndexError, match="row 1 is out of range for a capacity of 1"):
            store.get(1)

    def test_a_single_leaf_is_a_nest(self) -> None:
        store = self.make(ArraySpec((2,), "int32"))
        store.set([4, 5], np.array([[1, 2], [3, 4]], np.int32))
        assert to_numpy(store.get(5)).tolist() == [3, 4]
        with pytest.raises(ValueError, match=r"^the item: expected shape \(2,\), found \(3,\)$"):
            store.set(0, np.zeros(3, np.int32))

    def test_tells_what_it_is(self, store: Storage) -> None:
        assert len(store) == store.capacity == CAPACITY
        assert store.data_spec == SPEC
        assert store.nbytes == sum(leaf.nbytes for leaf in leaves(host(store.buffers)))
        assert isinstance(store.backend, Backend)
        assert store.backend.name == self.backend
        assert store.device == (self.device or store.backend.device)
        lines = repr(store).splitlines()
        mapped = "" if store.directory is None else f", directory='{store.directory}', mode='r+'"
        assert lines[0] == f"Storage(capacity=10, backend='{self.backend}', device='{store.device}'{mapped})"
        assert lines[3].split() == ["obs/image", "(3,", "2)", "uint8", "60", "bytes"]
        assert lines[-1].split() == ["total", str(store.nbytes), "bytes"]

    def test_selects_a_subtree(self, store: Storage) -> None:
        part = store.select("obs")
        assert_same(part.get([2, 3]), batch([2, 3])["obs"])
        part.set(3, batch(40)["obs"])
        assert_same(store.get(3)["obs"], batch(40)["obs"])
        assert_same(store.get(3)["action"], batch(3)["action"])
        store.set(4, batch(41))
        assert_same(part.get(4), batch(41)["obs"])
        assert part.nbytes < store.nbytes

    def test_selects_leaves(self, store: Storage) -> None:
        leaf = store.select("obs/pose/position")
        assert_same(leaf.get(2), batch(2)["obs"]["pose"].position)
        several = store.select("action/0", "obs/pose")
        assert_same(several.get(2), {"action/0": batch(2)["action"][0], "obs/pose": batch(2)["obs"]["pose"]})
        nested = several.select("obs/pose").select("valid")
        nested.set(slice(None), np.ones(CAPACITY, bool))
        assert to_numpy(store.get(...)["obs"]["pose"].valid).all()

    def test_refuses_paths_that_are_not_there(self, store: Storage) -> None:
        with pytest.raises(
            ValueError, match="'obs/imag' is not in the spec; there are action/0, action/1/0, obs/image"
        ):
            store.select("obs/imag")
        with pytest.raises(ValueError, match="'obs/image/0' is not in the spec"):
            store.select("obs/image/0")
        with pytest.raises(ValueError, match="expected paths that do not overlap, found obs, obs/image"):
            store.select("obs", "obs/image")
        with pytest.raises(ValueError, match="expected paths that do not overlap"):
            store.select("obs", "obs")
        with pytest.raises(ValueError, match="expected the path of a leaf or a subtree"):
            store.select()

    @pytest.mark.parametrize("capacity", [1, 7, 10, 25])
    def test_resizes(self, store: Storage, capacity: int) -> None:
        part = store.select("action/0")
        store.resize(capacity)
        assert len(store) == len(part) == capacity
        kept = min(capacity, CAPACITY)
        assert_same(store.get(range(kept)), batch(np.arange(kept)))
        assert not any(to_numpy(leaf).any() for leaf in leaves(store.get(slice(kept, None))))
        store.set(-1, batch(90))
        assert_same(part.get(capacity - 1), batch(90)["action"][0])
        with pytest.raises(IndexError, match=f"capacity of {capacity}"):
            store.get(capacity)
        with pytest.raises(ValueError, match="resize that one"):
            part.resize(3)

    @pytest.mark.parametrize(
        "again", [lambda store: pickle.loads(pickle.dumps(store)), copy.deepcopy], ids=["pickle", "deepcopy"]
    )
    def test_pickles_and_copies(self, store: Storage, again: Any) -> None:
        twin = again(store)
        assert twin.backend is store.backend
        assert twin.casting == store.casting
        assert twin.data_spec == store.data_spec
        twin.set(0, batch(50))
        assert_same(store.get(...), batch(np.arange(CAPACITY)))
        assert_same(twin.get(...), batch([50, 1, 2, 3, 4, 5, 6, 7, 8, 9]))
        part = again(store.select("obs"))
        assert_same(part.get(3), batch(3)["obs"])

    def test_like_takes_the_spec_of_an_item(self, store: Storage) -> None:
        for item in (batch(3), store.get(3)):
            twin = Storage.like(item, 5, backend=self.backend, device=self.device)
            assert twin.data_spec == store.data_spec
            twin.set(0, item)
            assert_same(twin.get(0), batch(3))

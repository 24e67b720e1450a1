"""NumpyStorage and NumpyState with TensorFlow alone; test_tf_agents.py holds them against TF-Agents' classes."""

from __future__ import annotations

import copy
import io
import itertools
import re
import threading
import tracemalloc
import warnings
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("tensorflow")

import tensorflow as tf

import anystore.tf
from anystore import ArraySpec, NumpyState, NumpyStorage, Storage, available_backends
from anystore.convert import to_numpy
from tests import stand_in
from tests.items import SPEC, assert_same, batch, host

CAPACITY = 10
USABLE = [info.name for info in available_backends() if info.usable]


class Point(NamedTuple):
    x: Any
    y: Any


class Pair(NamedTuple):
    first: Any
    second: Any


OBS, STEP = ArraySpec((3,), "float32"), ArraySpec((), "int64")
PLAIN = {"obs": OBS, "step": STEP}

Mode = Callable[[Callable[[], None]], None]
"""What runs a function in eager or in graph mode."""


ON_A_STAND_IN = "cupy on a stand-in"


@pytest.fixture(params=[*USABLE, ON_A_STAND_IN])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    if request.param == "jax":
        import jax

        with jax.enable_x64(True):
            yield "jax"
    elif request.param == ON_A_STAND_IN:
        with stand_in.installed(monkeypatch):
            yield "cupy"
    else:
        yield request.param


def filled(data_spec: Any = SPEC, **options: Any) -> NumpyStorage:
    """A storage in which the stamp of row n is n."""
    storage = NumpyStorage(data_spec, CAPACITY, **options)
    storage.set(slice(None), batch(np.arange(CAPACITY)))
    return storage


def saved(path: Path, **objects: Any) -> str:
    prefix: str = tf.train.Checkpoint(**objects).write(str(path / "checkpoint"))
    return prefix


def contents(prefix: str) -> dict[str, bytes]:
    """What a checkpoint holds of the state of Python objects, by its key."""
    reader = tf.train.load_checkpoint(prefix)
    return {key: reader.get_tensor(key) for key in reader.get_variable_to_shape_map() if key.endswith("py_state")}


def key(number: int) -> str:
    return f"storage/_np_state/buffer{number}/.ATTRIBUTES/py_state"


def npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


class Written(tf.train.experimental.PythonState):  # type: ignore[misc]
    """Any bytes at all in a checkpoint."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content

    def deserialize(self, string_value: bytes) -> None:
        self.content = string_value


def forged(path: Path, *arrays: Any) -> str:
    """A checkpoint of a storage, with these arrays (or bytes) for its buffers."""
    storage, state = tf.Module(), tf.Module()
    for number, array in enumerate(arrays):
        setattr(state, f"buffer{number}", Written(array if isinstance(array, bytes) else npy(array)))
    storage._np_state = state
    return saved(path, storage=storage)


# Storing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [3, -1, np.uint8(2), slice(1, 9, 3), ..., [4, 0, -1], np.array([[1, 2], [3, 3]])])
def test_what_was_set_is_what_is_got_on_every_backend(backend: str, index: Any) -> None:
    storage = filled(backend=backend)
    assert_same(storage.get(index), batch(np.arange(CAPACITY)[index]))


@pytest.mark.parametrize("index", [tf.constant(3), tf.constant([[4, -1]]), tf.Variable([2, 2])])
def test_an_index_may_be_a_tensor(index: Any) -> None:
    assert_same(filled().get(index), filled().get(index.numpy()))


@pytest.mark.parametrize("index", [2, slice(2, 4), [5, 1], np.arange(CAPACITY) % 2 == 0])
def test_set_writes_the_rows_and_no_others(backend: str, index: Any) -> None:
    storage = filled(backend=backend)
    stamps = np.arange(CAPACITY)
    stamps[index] = stamps[index] + 100
    storage.set(index, batch(stamps[index]))
    assert_same(storage.get(...), batch(stamps))


def test_rows_that_were_never_written_hold_zeros() -> None:
    storage = NumpyStorage(PLAIN, CAPACITY)
    assert_same(storage.get(3), {"obs": np.zeros(3, np.float32), "step": np.int64(0)})


def test_an_int_and_a_slice_read_live_views() -> None:
    storage = NumpyStorage(PLAIN, CAPACITY)
    row, rows = storage.get(np.int64(3)), storage.get(slice(2, 5))
    row["obs"][:] = 7
    rows["step"][:] = 8
    np.testing.assert_array_equal(storage.get(3)["obs"], [7, 7, 7])
    np.testing.assert_array_equal(storage.get(slice(1, 6))["step"], [0, 8, 8, 8, 0])
    storage.set(3, {"obs": np.ones(3), "step": 1})
    np.testing.assert_array_equal(row["obs"], [1, 1, 1])


@pytest.mark.parametrize("index", [[3], np.array([3]), np.array(3), np.arange(CAPACITY) == 3])
def test_an_array_reads_a_copy(index: Any) -> None:
    storage = NumpyStorage(PLAIN, CAPACITY)
    storage.get(index)["obs"][...] = 7
    np.testing.assert_array_equal(storage.get(3)["obs"], [0, 0, 0])


@pytest.mark.parametrize("index", [3, np.int32(-3), np.array(3)])
def test_a_single_number_is_a_numpy_scalar(index: Any) -> None:
    item = NumpyStorage(PLAIN, CAPACITY).get(index)
    assert type(item["step"]) is np.int64
    assert type(item["obs"]) is np.ndarray


@pytest.mark.parametrize(
    ("index", "error"),
    [(None, TypeError), (True, TypeError), ((1, 2), TypeError), (1.0, TypeError), (10, IndexError), (-11, IndexError)],
)
def test_what_is_no_index_is_refused(index: Any, error: type[Exception]) -> None:
    storage = filled()
    with pytest.raises(error):
        storage.get(index)
    with pytest.raises(error):
        storage.set(index, batch(0))
    assert_same(storage.get(...), batch(np.arange(CAPACITY)))


@pytest.mark.parametrize(
    "data_spec",
    [
        ArraySpec((2,), "float32"),
        {"b": ArraySpec((), "int8"), "a": {"c": ArraySpec((2,), "uint8")}},
        OrderedDict(b=ArraySpec((), "int8"), a=ArraySpec((2,), "uint8")),
        defaultdict(list, a=ArraySpec((), "int8")),
        [ArraySpec((), "int8"), (ArraySpec((), "bool"), [ArraySpec((1,), "int8")])],
        Point(ArraySpec((), "int8"), {"z": Point(ArraySpec((), "int8"), ())}),
    ],
    ids=lambda data_spec: type(data_spec).__name__,
)
def test_items_are_in_containers_of_the_spec_and_no_other(data_spec: Any) -> None:
    storage = NumpyStorage(data_spec, CAPACITY)
    expected = tf.nest.map_structure(lambda spec: np.zeros((4, *spec.shape), spec.dtype), data_spec)
    assert_same(storage.get([0, 1, 2, 3]), expected)


def test_a_spec_that_a_module_wrapped_is_read_as_what_it_was_and_left_alone() -> None:
    data_spec = {"a": [ArraySpec((), "int8")], "b": {"c": (ArraySpec((), "int8"), {"d": ArraySpec((), "int8")})}}
    owner = tf.Module()
    owner.data_spec = copy.deepcopy(data_spec)
    assert type(owner.data_spec) is not dict
    item = NumpyStorage(owner.data_spec, CAPACITY).get(0)
    assert_same(item, {"a": [np.int8(0)], "b": {"c": (np.int8(0), {"d": np.int8(0)})}})
    NumpyStorage(data_spec, CAPACITY).get(0)
    assert type(data_spec["b"]) is dict


def test_a_value_that_a_module_wrapped_is_stored() -> None:
    owner = tf.Module()
    owner.value = {"obs": np.ones(3, np.float32), "step": np.int64(4)}
    storage = NumpyStorage(PLAIN, CAPACITY)
    storage.set(1, owner.value)
    assert_same(storage.get(1), {"obs": np.ones(3, np.float32), "step": np.int64(4)})


LEAVES: dict[str, tuple[Any, Any]] = {
    "a number": (3, 7),
    "a float, cut off": (3, 7.9),
    "a bool": (3, True),
    "no leading axis": (slice(2, 5), np.arange(3)),
    "a row for several": ([5, 1, 5], np.arange(3)),
    "a column": ([5, 1], np.array([[1], [2]])),
    "a number for several": (..., 7),
    "axes of one in front": (3, np.arange(3).reshape(1, 1, 3)),
    "a wide dtype": (3, np.array([1.9, -1.9, 300.0])),
    "another byte order": (slice(0, 2), np.arange(6).reshape(2, 3).astype(">i4")),
    "a large array for a few rows": ([[0, 1], [2, 3]], np.arange(12.0).reshape(2, 2, 3)),
    "strings of digits": (3, np.array(["1", "22", "3"])),
    "an object": (3, np.array([1, 2.5, True], object)),
    "a view, backwards": (3, np.arange(3)[::-1]),
    "no row": ([], np.zeros((0, 3))),
}


@pytest.mark.parametrize("name", LEAVES)
@pytest.mark.parametrize("dtype", ["int32", "float64", "complex64", "bool"])
def test_a_leaf_is_broadcast_and_cast_as_numpy_does_it(backend: str, name: str, dtype: str) -> None:
    index, leaf = LEAVES[name]
    expected = np.zeros((CAPACITY, 3), dtype)
    expected[index] = leaf
    storage = NumpyStorage({"leaf": ArraySpec((3,), dtype)}, CAPACITY, backend=backend)
    storage.set(index, {"leaf": leaf})
    np.testing.assert_array_equal(to_numpy(storage.get(...)["leaf"]), expected)


def test_a_leaf_may_be_an_array_of_the_backend_or_a_tensor(backend: str) -> None:
    storage = NumpyStorage(PLAIN, CAPACITY, backend=backend)
    ones = Storage({"leaf": ArraySpec((3,), "float32")}, 1, backend=backend)
    ones.set(0, {"leaf": np.ones(3, np.float32)})
    storage.set(2, {"obs": ones.get(0)["leaf"], "step": tf.constant(5)})
    storage.set([3, 4], {"obs": tf.Variable([1.0, 1.0, 1.0]), "step": tf.constant([6, 7], tf.int16)})
    expected = {"obs": np.ones((3, 3), np.float32), "step": np.array([5, 6, 7])}
    assert_same(storage.get(slice(2, 5)), expected)


def test_an_integer_out_of_range_ends_as_this_numpy_has_it() -> None:
    storage, expected = NumpyStorage(ArraySpec((), "uint8"), CAPACITY), np.zeros(CAPACITY, np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            expected[3] = 300
        except OverflowError:
            with pytest.raises(
                ValueError, match=re.escape("the item: NumPy cannot store this for ArraySpec((), 'uint8'")
            ):
                storage.set(3, 300)
        else:
            storage.set(3, 300)
    np.testing.assert_array_equal(storage.get(...), expected)


@pytest.mark.parametrize(
    ("data_spec", "value"),
    [
        ((OBS, STEP), [np.ones(3), 4]),
        ([OBS, STEP], (np.ones(3), 4)),
        ([OBS, STEP], Point(np.ones(3), 4)),
        (Point(OBS, STEP), (np.ones(3), 4)),
        (Point(OBS, STEP), [np.ones(3), 4]),
        ({"b": OBS, "c": STEP}, OrderedDict(c=4, b=np.ones(3))),
        (OrderedDict(c=STEP, b=OBS), {"b": np.ones(3), "c": 4}),
        ({"b": OBS, "c": STEP}, UserDict(c=4, b=np.ones(3))),
        ({"b": OBS, "c": STEP}, {"b": [np.ones(3)], "c": ([4],)}),
        ({"b": OBS, "c": STEP, "d": ()}, {"a": [], "b": np.ones(3), "c": 4}),
        ((OBS, (), STEP), [np.ones(3), 4, {}]),
    ],
)
def test_nests_that_tensorflow_takes_for_each_other_are_stored_whole(data_spec: Any, value: Any) -> None:
    storage = NumpyStorage(data_spec, CAPACITY)
    storage.set(2, value)
    obs, step = sorted(tf.nest.flatten(storage.get(2)), key=np.ndim, reverse=True)
    np.testing.assert_array_equal(obs, [1, 1, 1])
    assert step == 4


@pytest.mark.parametrize(
    ("data_spec", "value", "message"),
    [
        (PLAIN, {"obs": np.ones(3)}, "the item: missing ['step']; expected ['obs', 'step']"),
        (PLAIN, {"obs": np.ones(3), "step": 1, "done": 1}, "the item: unexpected ['done']"),
        (PLAIN, [np.ones(3), 1], "the item: expected a dict, found a list"),
        (PLAIN, {"obs": np.ones(3), "stop": 1}, "the item: missing ['step'], unexpected ['stop']"),
        ({"in": PLAIN}, {"in": np.ones(3)}, "in: expected a dict, found a ndarray"),
        ([OBS, STEP], [np.ones(3)], "the item: missing [1]"),
        ([OBS, [STEP]], [np.ones(3), 1, 2], "the item: unexpected [2]"),
        ([OBS, STEP], {0: np.ones(3), 1: 1}, "the item: expected a list, found a dict"),
        (Point(OBS, STEP), Pair(np.ones(3), 1), "the item: expected a Point, found a Pair"),
        (
            PLAIN,
            {"obs": [1.0, 2.0, 3.0], "step": 1},
            "obs: expected an array for ArraySpec((3,), 'float32'), found a list",
        ),
        (
            PLAIN,
            {"obs": np.ones(3), "step": {"a": 1}},
            f"step: expected an array for {STEP}, found a dict",
        ),
        (PLAIN, {"obs": np.ones(3), "step": []}, f"step: expected an array for {STEP}, found a list"),
        (
            PLAIN,
            {"obs": np.ones(3), "step": range(2)},
            f"step: expected an array for {STEP}, found a range",
        ),
        (PLAIN, {"obs": np.ones(3), "step": np.ones(2)}, f"step: NumPy cannot store this for {STEP}"),
        (PLAIN, {"obs": np.ones(4), "step": 1}, f"obs: NumPy cannot store this for {OBS}"),
        (PLAIN, {"obs": np.ones(3), "step": "one"}, f"step: NumPy cannot store this for {STEP}: 'one'"),
        (PLAIN, {"obs": np.ones(3), "step": None}, f"step: NumPy cannot store this for {STEP}: None"),
        (PLAIN, {"obs": np.ones(3), "step": 2**63}, f"step: NumPy cannot store this for {STEP}"),
        (
            PLAIN,
            {"obs": np.ones(3), "step": float("nan")},
            f"step: NumPy cannot store this for {STEP}: nan",
        ),
    ],
)
def test_what_cannot_be_stored_whole_is_refused_by_its_path(data_spec: Any, value: Any, message: str) -> None:
    storage = NumpyStorage(data_spec, CAPACITY)
    with pytest.raises(ValueError, match=re.escape(message)):
        storage.set(2, value)
    assert not any(np.any(leaf) for leaf in tf.nest.flatten(storage.get(...)))


def test_a_symbolic_tensor_is_refused_by_its_path() -> None:
    storage = NumpyStorage(PLAIN, CAPACITY)

    @tf.function  # type: ignore[untyped-decorator]
    def store(step: Any) -> None:
        storage.set(0, {"obs": np.ones(3), "step": step})

    with pytest.raises(ValueError, match="step: NumPy cannot store this"):
        store(tf.constant(1))
    assert not storage.get(0)["obs"].any()


@pytest.mark.parametrize(
    "data_spec", ["text", 3, None, np.zeros(3), {"a": OBS, "b": 1.0}, [tf.TensorSpec((3,))], [tf.zeros(3)]]
)
def test_what_is_no_nest_of_array_specs_is_refused(data_spec: Any) -> None:
    with pytest.raises(ValueError, match="expected an ArraySpec, of anystore or TF-Agents, or a nest of them, found"):
        NumpyStorage(data_spec, CAPACITY)


def test_a_nest_without_leaves_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a nest with at least one ArraySpec"):
        NumpyStorage({}, CAPACITY)


@pytest.mark.parametrize("capacity", [0, -1, 1.5, True, None])
def test_a_capacity_that_is_none_is_refused_at_once(capacity: Any) -> None:
    with pytest.raises(ValueError, match="expected capacity to be an int of 1 or more"):
        NumpyStorage(PLAIN, capacity)


def test_a_backend_or_device_that_is_none_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="unknown backend 'nunpy'"):
        NumpyStorage(PLAIN, CAPACITY, backend="nunpy")
    with pytest.raises(ValueError, match="NumPy has no device 'cuda'"):
        NumpyStorage(PLAIN, CAPACITY, device="cuda")


def test_many_threads_that_read_first_read_the_same_buffers() -> None:
    for _ in range(20):
        storage, barrier, rows = NumpyStorage(PLAIN, CAPACITY), threading.Barrier(8), list[Any]()

        def read(storage: NumpyStorage = storage, barrier: threading.Barrier = barrier, rows: list[Any] = rows) -> None:
            barrier.wait()
            rows.append(storage.get(0))

        threads = [threading.Thread(target=read) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        storage.set(0, {"obs": np.ones(3), "step": 1})
        assert all(row["obs"].all() for row in rows)


def test_a_copy_has_the_items_and_memory_of_its_own(backend: str) -> None:
    storage = filled(backend=backend)
    other = copy.deepcopy(storage)
    storage.set(..., batch(77))
    assert_same(other.get(...), batch(np.arange(CAPACITY)))
    assert [type(leaf) for leaf in tf.nest.flatten(other.get(0))] == [type(x) for x in tf.nest.flatten(storage.get(0))]


def test_a_copy_takes_the_values_that_the_storage_takes() -> None:
    storage = NumpyStorage({"pair": (ArraySpec((), "int32"), ArraySpec((), "int32"))}, CAPACITY)
    storage.set(1, {"pair": [1, 2]})
    other = copy.deepcopy(storage)
    other.set(2, {"pair": [3, 4]})
    assert other.get(2) == {"pair": (3, 4)}


# tf.Module ----------------------------------------------------------------------------------------------------------


class Encoder(NumpyStorage):
    """A subclass with a variable of its own."""

    def __init__(self) -> None:
        super().__init__(PLAIN, CAPACITY, name="encoder")
        self.inner = tf.Module(name="inner")
        self.inner.bias = tf.Variable(2.0, trainable=False)

    @tf.Module.with_name_scope
    def scaled(self, idx: Any) -> Any:
        if not hasattr(self, "scale"):
            self.scale = tf.Variable(3.0, name="scale")
        return self.scale * self.get(idx)["obs"] + self.inner.bias


def test_a_module_has_a_name_and_a_name_scope() -> None:
    assert NumpyStorage(PLAIN, CAPACITY).name == "numpy_storage"
    storage = NumpyStorage(PLAIN, CAPACITY, name="replay")
    assert storage.name == "replay"
    assert storage.name_scope.name == "replay/"
    with pytest.raises(ValueError, match="not a valid module name"):
        NumpyStorage(PLAIN, CAPACITY, name="no name")


def test_a_method_with_the_name_scope_names_its_variables_under_the_module() -> None:
    encoder = Encoder()
    np.testing.assert_array_equal(encoder.scaled(0), [2, 2, 2])
    assert encoder.scale.name == "encoder/scale:0"


def test_variables_and_modules_hung_on_a_storage_are_found() -> None:
    encoder = Encoder()
    encoder.get(0)
    assert encoder.variables == (encoder.inner.bias,)
    assert encoder.trainable_variables == ()
    assert encoder.submodules == (encoder.inner,)
    encoder.layers = {"a": [tf.Variable(1.0)]}
    assert encoder.trainable_variables == (encoder.layers["a"][0],)
    storage = NumpyStorage(PLAIN, CAPACITY)
    owner = tf.Module()
    owner.storage = storage
    assert owner.submodules == (storage,)
    assert storage.variables == storage.submodules == ()


def test_an_attribute_is_tracked_replaced_and_deleted(tmp_path: Path) -> None:
    storage = NumpyStorage(PLAIN, CAPACITY)

    def keys() -> set[str]:
        prefix = saved(tmp_path, storage=storage)
        return {key for key in tf.train.load_checkpoint(prefix).get_variable_to_shape_map() if "_np_state" not in key}

    value = "storage/extra/.ATTRIBUTES/VARIABLE_VALUE"
    bare = keys()
    storage.extra = tf.Variable(1.0)
    assert keys() == bare | {value}
    storage.extra = tf.Variable(2.0)
    prefix = saved(tmp_path, storage=storage)
    assert tf.train.load_checkpoint(prefix).get_tensor(value) == 2
    storage.extra.assign(3.0)
    tf.train.Checkpoint(storage=storage).read(prefix).assert_consumed()
    assert storage.extra.numpy() == 2
    del storage.extra
    assert keys() == bare


# Checkpoints of a storage -------------------------------------------------------------------------------------------


def test_nothing_is_allocated_before_the_first_get_or_set(tmp_path: Path) -> None:
    for use in [lambda storage: storage.get(0), lambda storage: storage.set(0, {"obs": np.zeros(3), "step": 0})]:
        storage = NumpyStorage(PLAIN, CAPACITY)
        before = contents(saved(tmp_path, storage=storage))
        assert before == {key(0): npy(np.int64(0)), key(1): npy(np.int64(0))}
        use(storage)
        after = contents(saved(tmp_path, storage=storage))
        assert after == {key(0): npy(np.zeros((CAPACITY, 3), np.float32)), key(1): npy(np.zeros(CAPACITY, np.int64))}


def test_a_checkpoint_holds_the_same_bytes_whatever_the_backend(backend: str, tmp_path: Path) -> None:
    found = contents(saved(tmp_path, storage=filled(backend=backend)))
    rows = tf.nest.flatten(batch(np.arange(CAPACITY)))
    assert found == {key(number): npy(np.asarray(array)) for number, array in enumerate(rows)}


def test_the_buffers_are_numbered_in_the_order_of_tensorflow(tmp_path: Path) -> None:
    data_spec = OrderedDict(z=ArraySpec((), "int8"), a=Point(ArraySpec((), "int16"), ArraySpec((), "int32")))
    storage = NumpyStorage(data_spec, 2)
    storage.set(..., OrderedDict(z=1, a=Point(2, 3)))
    expected = [np.full(2, 2, np.int16), np.full(2, 3, np.int32), np.full(2, 1, np.int8)]
    prefix = saved(tmp_path, storage=storage)
    assert contents(prefix) == {key(number): npy(array) for number, array in enumerate(expected)}
    other = NumpyStorage(data_spec, 2)
    tf.train.Checkpoint(storage=other).read(prefix).assert_consumed()
    assert_same(other.get(...), storage.get(...))


@pytest.mark.parametrize(("source", "target"), list(itertools.product(USABLE, USABLE)))
def test_a_checkpoint_of_one_backend_restores_on_any_other(source: str, target: str, tmp_path: Path) -> None:
    data_spec = {"a": ArraySpec((2, 3), "float32"), "b": ArraySpec((), "int32"), "c": ArraySpec((), "bool")}
    storage = NumpyStorage(data_spec, CAPACITY, backend=source)
    rng = np.random.default_rng(0)
    value = {"a": rng.random((10, 2, 3), np.float32), "b": rng.integers(0, 9, 10, np.int32), "c": rng.random(10) < 0.5}
    storage.set(..., value)
    prefix = saved(tmp_path, storage=storage)
    fresh, used = (NumpyStorage(data_spec, CAPACITY, backend=target) for _ in range(2))
    used.set(..., {"a": 1, "b": 2, "c": True})
    for other in fresh, used:
        tf.train.Checkpoint(storage=other).read(prefix).assert_consumed()
        assert_same(host(other.get(...)), value)


def test_leaves_larger_than_a_chunk_are_saved_and_restored(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anystore.tf, "_CHUNK", 40)
    prefix = saved(tmp_path, storage=filled(backend=backend))
    rows = tf.nest.flatten(batch(np.arange(CAPACITY)))
    assert contents(prefix) == {key(number): npy(np.asarray(array)) for number, array in enumerate(rows)}
    other = NumpyStorage(SPEC, CAPACITY, backend=backend)
    tf.train.Checkpoint(storage=other).read(prefix).assert_consumed()
    assert_same(other.get(...), batch(np.arange(CAPACITY)))


def test_an_unallocated_storage_restores_as_one(backend: str, tmp_path: Path) -> None:
    unallocated = {key(0): npy(np.int64(0)), key(1): npy(np.int64(0))}
    prefix = saved(tmp_path, storage=NumpyStorage(PLAIN, CAPACITY))
    fresh, used = (NumpyStorage(PLAIN, CAPACITY, backend=backend) for _ in range(2))
    used.set(..., {"obs": 1, "step": 2})
    for storage in fresh, used:
        tf.train.Checkpoint(storage=storage).read(prefix).assert_consumed()
        assert contents(saved(tmp_path, storage=storage)) == unallocated
        assert_same(host(storage.get(0)), {"obs": np.zeros(3, np.float32), "step": np.int64(0)})


def test_a_storage_allocated_in_part_restores_as_one(backend: str, tmp_path: Path) -> None:
    steps = np.arange(CAPACITY)
    prefix = forged(tmp_path, np.int64(0), steps)
    fresh, used = (NumpyStorage(PLAIN, CAPACITY, backend=backend) for _ in range(2))
    used.set(..., {"obs": 1, "step": 2})
    for storage in fresh, used:
        tf.train.Checkpoint(storage=storage).read(prefix).assert_consumed()
        assert contents(saved(tmp_path, storage=storage)) == {key(0): npy(np.int64(0)), key(1): npy(steps)}
        assert_same(host(storage.get(...)), {"obs": np.zeros((CAPACITY, 3), np.float32), "step": steps})
        storage.set(0, {"obs": 1, "step": 5})
        assert_same(host(storage.get(0)), {"obs": np.ones(3, np.float32), "step": np.int64(5)})


def test_a_restore_before_the_first_get_brings_the_buffers(tmp_path: Path) -> None:
    owner = tf.Module()
    owner.storage = filled()
    prefix = saved(tmp_path, owner=owner)
    other = tf.Module()
    status = tf.train.Checkpoint(owner=other).read(prefix)
    other.storage = NumpyStorage(SPEC, CAPACITY)
    status.assert_consumed()
    assert_same(other.storage.get(...), batch(np.arange(CAPACITY)))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            (np.zeros((9, 3), np.float32), np.zeros(9, np.int64)),
            "obs: expected a checkpoint of shape (10, 3) and float32, found one of shape (9, 3) and float32",
        ),
        (
            (np.zeros((10, 3), np.float32), np.zeros(10, np.int32)),
            "step: expected a checkpoint of shape (10,) and int64, found one of shape (10,) and int32",
        ),
        (
            (np.zeros((10, 3), np.float32), np.zeros((10, 1), np.int64)),
            "step: expected a checkpoint of shape (10,) and int64, found one of shape (10, 1) and int64",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_the_path(
    arrays: tuple[Any, ...], message: str, tmp_path: Path
) -> None:
    storage = NumpyStorage(PLAIN, CAPACITY)
    with pytest.raises(ValueError, match=re.escape(message)):
        tf.train.Checkpoint(storage=storage).read(forged(tmp_path, *arrays))


def test_a_checkpoint_with_more_leaves_is_not_consumed(tmp_path: Path) -> None:
    prefix = forged(tmp_path, np.zeros((10, 3), np.float32), np.zeros(10, np.int64), np.zeros(10))
    status = tf.train.Checkpoint(storage=NumpyStorage(PLAIN, CAPACITY)).read(prefix)
    with pytest.raises(AssertionError, match="Unresolved object in checkpoint"):
        status.assert_consumed()


def test_a_file_in_fortran_order_or_of_another_version_is_read(tmp_path: Path) -> None:
    obs, steps = np.arange(30, dtype=np.float32).reshape(10, 3), np.arange(10)
    stream = io.BytesIO()
    np.lib.format.write_array(stream, steps, version=(2, 0))
    storage = NumpyStorage(PLAIN, CAPACITY)
    prefix = forged(tmp_path, np.asfortranarray(obs), stream.getvalue())
    tf.train.Checkpoint(storage=storage).read(prefix).assert_consumed()
    assert_same(storage.get(...), {"obs": obs, "step": steps})


def test_extension_dtypes_and_records_survive(tmp_path: Path) -> None:
    record = np.dtype([("a", "i4"), ("b", "f8", 2)])
    data_spec = {"half": ArraySpec((2,), "bfloat16"), "record": ArraySpec((), record), "name": ArraySpec((), "U3")}
    storage, other = NumpyStorage(data_spec, 4), NumpyStorage(data_spec, 4)
    storage.set(1, {"half": np.array([1.5, -2]), "record": np.array((3, [4, 5]), record), "name": "abcd"})
    prefix = saved(tmp_path, storage=storage)
    tf.train.Checkpoint(storage=other).read(prefix).assert_consumed()
    assert_same(other.get(...), storage.get(...))
    assert storage.get(1)["name"] == "abc"
    np.testing.assert_array_equal(storage.get(1)["half"].astype(float), [1.5, -2])


def test_saving_holds_the_copy_of_one_leaf_at_a_time(tmp_path: Path) -> None:
    nbytes = 8 * 2**20
    storage = NumpyStorage([ArraySpec((2**17,), "float64") for _ in range(4)], 8)
    storage.set(..., [1.0, 2.0, 3.0, 4.0])
    checkpoint = tf.train.Checkpoint(storage=storage)
    checkpoint.write(str(tmp_path / "first"))
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        checkpoint.write(str(tmp_path / "second"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # What TensorFlow itself allocates is not traced. The stream grows by an eighth more than it needs.
    assert nbytes < peak - before < 1.25 * nbytes


def test_a_storage_is_saved_and_restored_in_graph_mode(tmp_path: Path) -> None:
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        storage, other = filled(), NumpyStorage(SPEC, CAPACITY)
        checkpoint = tf.compat.v1.train.Checkpoint(storage=storage)
        session.run(tf.compat.v1.global_variables_initializer())
        first = checkpoint.write(str(tmp_path / "first"), session=session)
        storage.set(..., batch(77))
        second = checkpoint.write(str(tmp_path / "second"), session=session)
        for prefix, stamps in (first, np.arange(CAPACITY)), (second, np.full(CAPACITY, 77)):
            # No restore op is run.
            tf.compat.v1.train.Checkpoint(storage=other).restore(prefix)
            assert_same(other.get(...), batch(stamps))


def test_a_checkpoint_manager_keeps_a_storage(tmp_path: Path) -> None:
    storage = filled()
    manager = tf.train.CheckpointManager(tf.train.Checkpoint(storage=storage), str(tmp_path), max_to_keep=1)
    manager.save()
    storage.set(..., batch(77))
    manager.save()
    storage.set(..., batch(78))
    manager.restore_or_initialize()
    assert_same(storage.get(...), batch(np.full(CAPACITY, 77)))


@pytest.mark.parametrize("backend", USABLE)
def test_a_checkpoint_leads_to_a_snapshot_and_back(backend: str, tmp_path: Path) -> None:
    prefix = saved(tmp_path / "checkpoint", storage=filled())
    store = NumpyStorage(SPEC, CAPACITY, backend=backend, device="cpu")
    tf.train.Checkpoint(storage=store).read(prefix).assert_consumed()
    store.storage.save(tmp_path / "snapshot")

    back = NumpyStorage(SPEC, CAPACITY)
    back.set(..., anystore.load(tmp_path / "snapshot").get(..., copy=None))
    assert contents(saved(tmp_path / "again", storage=back)) == contents(prefix)


@pytest.mark.parametrize("backend", USABLE)
def test_a_restore_is_no_write_that_a_snapshot_misses(backend: str, tmp_path: Path) -> None:
    store = filled(backend=backend)
    prefix = saved(tmp_path / "checkpoint", storage=store)
    store.set(..., batch(77))
    store.storage.save(tmp_path / "snapshot")
    tf.train.Checkpoint(storage=store).read(prefix).assert_consumed()
    store.storage.save(tmp_path / "snapshot")
    assert_same(anystore.load(tmp_path / "snapshot", like=SPEC).get(...), batch(np.arange(CAPACITY)))


# NumpyState ---------------------------------------------------------------------------------------------------------


class Counter(NumpyState):
    """A subclass that calls no constructor of its base, as TF-Agents' metrics do not."""

    def __init__(self, length: int) -> None:
        self._count = np.int64(0)
        self.values = np.zeros(length)

    def add(self, value: float) -> None:
        self.values[self._count] = value
        self._count += 1

    @property
    def total(self) -> Any:
        return self.values[: self._count].sum()


def in_eager_mode(run: Callable[[], None]) -> None:
    run()


def in_graph_mode(run: Callable[[], None]) -> None:
    with tf.Graph().as_default(), tf.compat.v1.Session().as_default():
        run()


@pytest.fixture(params=[in_eager_mode, in_graph_mode])
def mode(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_attributes_are_saved_restored_and_made_again(mode: Mode, tmp_path: Path) -> None:
    def run() -> None:
        state = NumpyState()
        checkpoint = tf.compat.v1.train.Checkpoint(state=state)
        state.rows = np.arange(6).reshape(2, 3)
        state.count = np.int64(5)
        prefix = checkpoint.save(str(tmp_path / "checkpoint"))
        state.rows[:] = 0
        state.count += 1
        checkpoint.restore(prefix).assert_consumed()
        np.testing.assert_array_equal(state.rows, np.arange(6).reshape(2, 3))
        assert state.count == 5
        assert state.count.dtype == np.int64
        empty = NumpyState()
        tf.compat.v1.train.Checkpoint(state=empty).restore(prefix).assert_consumed()
        np.testing.assert_array_equal(empty.rows, np.arange(6).reshape(2, 3))
        # What a restore has made is saved again.
        empty.rows[:] = 7
        prefix = tf.compat.v1.train.Checkpoint(state=empty).save(str(tmp_path / "again"))
        checkpoint.restore(prefix).assert_consumed()
        np.testing.assert_array_equal(state.rows, np.full((2, 3), 7))

    mode(run)


def test_every_save_sees_the_attributes_of_the_moment(mode: Mode, tmp_path: Path) -> None:
    def run() -> None:
        state = NumpyState()
        checkpoint = tf.compat.v1.train.Checkpoint(state=state)
        state.a = np.zeros(2)
        checkpoint.save(str(tmp_path / "one"))
        state.a = np.ones(3)
        prefix = checkpoint.save(str(tmp_path / "two"))
        assert contents(prefix) == {"state/a/.ATTRIBUTES/py_state": npy(np.ones(3))}

    mode(run)


@pytest.mark.parametrize("value", [1, 1.0, "text", None, [np.zeros(2)], {"a": np.zeros(2)}, tf.Variable(1.0)])
def test_what_is_no_array_is_refused(value: Any) -> None:
    state = NumpyState()
    with pytest.raises(NotImplementedError, match="rows: expected a NumPy array or scalar, found a "):
        state.rows = value
    assert not hasattr(state, "rows")


def test_an_attribute_is_the_very_array_that_was_assigned() -> None:
    state, array = NumpyState(), np.zeros(3)
    state.rows = array
    assert state.rows is array
    with pytest.raises(AttributeError):
        state.columns  # noqa: B018


def test_a_deleted_attribute_is_saved_no_more(tmp_path: Path) -> None:
    state = NumpyState()
    state.a, state.b = np.zeros(1), np.zeros(2)
    del state.a
    assert not hasattr(state, "a")
    assert contents(saved(tmp_path, state=state)).keys() == {"state/b/.ATTRIBUTES/py_state"}
    state.a = np.ones(1)
    assert len(contents(saved(tmp_path, state=state))) == 2


def test_a_subclass_is_saved_and_restored(tmp_path: Path) -> None:
    counter, other = Counter(4), Counter(4)
    for value in (1.0, 2.5):
        counter.add(value)
    prefix = saved(tmp_path, counter=counter)
    tf.train.Checkpoint(counter=other).read(prefix).assert_consumed()
    other.add(3.0)
    assert other.total == 6.5
    assert counter.total == 3.5


def test_a_state_in_a_module_is_saved_and_is_no_module(tmp_path: Path) -> None:
    owner = tf.Module()
    owner.state = NumpyState()
    owner.state.a = np.zeros(1)
    assert owner.submodules == ()
    assert contents(saved(tmp_path, owner=owner)).keys() == {"owner/state/a/.ATTRIBUTES/py_state"}


def test_a_copied_state_is_saved_by_itself(tmp_path: Path) -> None:
    state = NumpyState()
    state.a = np.zeros(2)
    other = copy.deepcopy(state)
    state.a[:] = 1
    assert contents(saved(tmp_path, state=other)) == {"state/a/.ATTRIBUTES/py_state": npy(np.zeros(2))}


def test_a_storage_takes_the_specs_of_tensorflow() -> None:
    spec = {"a": tf.TensorSpec((2, 3), tf.bfloat16, "a"), "b": [tf.TensorSpec((), tf.bool)]}
    assert Storage(spec, 4).data_spec == {"a": ArraySpec((2, 3), "bfloat16"), "b": [ArraySpec((), "bool")]}
    for unknown in (tf.TensorSpec((None, 2)), tf.TensorSpec(None), tf.TensorSpec((), tf.string)):
        with pytest.raises(ValueError, match="^a/b: "):
            Storage({"a": {"b": unknown}}, 4)


def test_a_storage_takes_tensors() -> None:
    store = Storage({"a": ArraySpec((2,), "float32")}, 4)
    store.set(tf.constant([1, -1]), {"a": tf.constant([[1.0, 2.0], [3.0, 4.0]])})
    assert store.get(tf.constant(3))["a"].tolist() == [3.0, 4.0]
    with pytest.raises(TypeError, match="^a: expected float32, found complex64"):
        store.set(0, {"a": tf.zeros(2, tf.complex64)})


@pytest.mark.parametrize("backend", ["numpy", "jax"])
def test_a_selection_follows_where_a_restore_makes_and_unmakes_leaves(tmp_path: Path, backend: str) -> None:
    """A checkpoint of a storage that has one buffer and has not made the other yet."""
    pytest.importorskip(backend)
    spec = {"a": ArraySpec((), "float32"), "b": ArraySpec((), "int32")}

    def checkpoint(storage: NumpyStorage, name: str) -> str:
        return tf.train.Checkpoint(storage=storage).save(str(tmp_path / name))

    def restore(storage: NumpyStorage, saved: str) -> None:
        tf.train.Checkpoint(storage=storage).restore(saved).expect_partial()

    one = NumpyStorage({"a": spec["a"]}, 3, backend=backend)
    one.set(0, {"a": 7.0})
    half = NumpyStorage(spec, 3, backend=backend)
    restore(half, checkpoint(one, "one"))
    store = NumpyStorage(spec, 3, backend=backend)
    store.set(1, {"a": 1.0, "b": 1})
    selection = store.storage.select("a")
    restore(store, checkpoint(half, "half"))
    store.set(2, {"a": 5.0, "b": 5})
    assert np.asarray(selection.get(...)).tolist() == [7.0, 0.0, 5.0]
    selection.set(1, 6.0)
    assert np.asarray(store.get(...)["a"]).tolist() == [7.0, 6.0, 5.0]
    assert np.asarray(store.get(...)["b"]).tolist() == [0, 0, 5]


@pytest.mark.parametrize("backend", USABLE)
def test_a_selection_of_a_leaf_that_a_restore_unmakes_goes_on_with_it(tmp_path: Path, backend: str) -> None:
    spec = {"a": ArraySpec((), "float32"), "b": ArraySpec((), "int32")}
    empty = tf.train.Checkpoint(storage=NumpyStorage(spec, 3, backend=backend)).save(str(tmp_path / "empty"))
    store = NumpyStorage(spec, 3, backend=backend)
    store.set(..., {"a": 1.0, "b": 1})
    selection = store.storage.select("a")
    tf.train.Checkpoint(storage=store).restore(empty).expect_partial()
    assert to_numpy(selection.get(...)).tolist() == [0.0, 0.0, 0.0]
    selection.set(1, 6.0)
    assert to_numpy(store.get(...)["a"]).tolist() == [0.0, 6.0, 0.0]
    assert to_numpy(store.get(...)["b"]).tolist() == [0, 0, 0]


def test_a_checkpoint_of_a_state_alone(tmp_path: Path) -> None:
    """Where the state is the root, beside what the checkpoint keeps of its own."""
    state = NumpyState()
    state.rows = np.arange(3)
    checkpoint = tf.train.Checkpoint(state)
    prefix = checkpoint.save(str(tmp_path / "checkpoint"))
    state.rows = np.zeros(3)
    checkpoint.restore(prefix).assert_consumed()
    assert state.rows.tolist() == [0, 1, 2]
    empty = NumpyState()
    tf.train.Checkpoint(empty).restore(checkpoint.save(str(tmp_path / "checkpoint")))
    assert empty.rows.tolist() == [0, 1, 2]


def test_a_restore_of_something_else_is_no_end_of_saving(tmp_path: Path) -> None:
    module = tf.Module()
    module.part = tf.Module()
    state = NumpyState()
    checkpoint = tf.train.Checkpoint(x=state)
    checkpoint.restore(tf.train.Checkpoint(x=module).save(str(tmp_path / "other")))
    state.rows = np.arange(3)
    assert contents(checkpoint.save(str(tmp_path / "own"))).keys() == {"x/rows/.ATTRIBUTES/py_state"}


def test_what_a_setter_takes_is_saved_once(tmp_path: Path) -> None:
    class Doubled(NumpyState):
        def __init__(self) -> None:
            self._x = np.zeros(2)

        @property
        def x(self) -> Any:
            return self._x

        @x.setter
        def x(self, value: Any) -> None:
            self._x = 2 * value

    state = Doubled()
    state.x = np.ones(2)
    prefix = saved(tmp_path, state=state)
    assert contents(prefix).keys() == {"state/_x/.ATTRIBUTES/py_state"}
    tf.train.Checkpoint(state=state).restore(prefix)
    assert state.x.tolist() == [2, 2]


def test_a_copy_of_a_state_is_saved_as_it_is(tmp_path: Path) -> None:
    state = NumpyState()
    state.rows = np.zeros(2)
    twin = copy.copy(state)
    assert twin.rows is state.rows
    twin.rows = np.ones(2)
    assert contents(saved(tmp_path, state=twin)) == {"state/rows/.ATTRIBUTES/py_state": npy(np.ones(2))}


class OwnDict(dict):  # type: ignore[type-arg]
    pass


class OwnTuple(tuple):  # type: ignore[type-arg]
    __slots__ = ()


def test_containers_of_classes_of_their_own() -> None:
    store = NumpyStorage(OwnDict(a=OwnTuple([STEP, OBS])), CAPACITY)
    store.set(3, {"a": (7, np.ones(3))})
    found = store.get(3)
    assert (type(found), type(found["a"])) == (OwnDict, OwnTuple)
    assert found["a"][0] == 7


def test_a_variable_is_an_array_of_one_as_an_index() -> None:
    """It has no ``__index__``, by which NumPy would take it for a number, and give a view."""
    store = NumpyStorage(PLAIN, CAPACITY)
    copies = [store.get(index)["obs"] for index in (tf.Variable(1), np.array(1))]
    view = store.get(tf.constant(1))["obs"]
    store.set(1, {"obs": np.ones(3), "step": 1})
    assert [found.tolist() for found in copies] == [[0, 0, 0]] * 2
    assert view.tolist() == [1, 1, 1]


def test_single_numbers_of_bfloat16() -> None:
    store = NumpyStorage({"x": ArraySpec((), "float32"), "y": ArraySpec((), "bfloat16")}, CAPACITY)
    store.set(0, {"x": tf.constant(1.5, tf.bfloat16), "y": tf.constant(2.5, tf.bfloat16)})
    assert (store.get(0)["x"], float(store.get(0)["y"])) == (1.5, 2.5)


def test_a_batch_that_only_says_what_array_it_is() -> None:
    class Lazy:
        def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
            return np.arange(6, dtype=np.float32).reshape(2, 3)

    store = NumpyStorage({"x": OBS}, CAPACITY)
    store.set([0, 1], {"x": Lazy()})
    assert store.get([0, 1])["x"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_record_with_names_in_other_letters(tmp_path: Path) -> None:
    store, twin = (NumpyStorage(ArraySpec((), [("\u540d", "f4")]), 3) for _ in range(2))
    store.set(1, np.array((1.5,), [("\u540d", "f4")]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of NumPy, that old versions cannot read this
        prefix = saved(tmp_path, store=store)
    tf.train.Checkpoint(store=twin).restore(prefix)
    assert twin.get(1)["\u540d"] == 1.5

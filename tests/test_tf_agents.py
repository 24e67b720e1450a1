"""Both classes held against those of TF-Agents, whose own replay buffers, metrics and agents run on them."""

from __future__ import annotations

import copy
import functools
import importlib.util
import tempfile
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

if importlib.util.find_spec("tf_agents") is None:
    pytest.skip("needs tf-agents", allow_module_level=True)

with warnings.catch_warnings():
    # TF-Agents 0.19 and TensorFlow Probability 0.23 compare versions with distutils.
    warnings.filterwarnings("ignore", "distutils Version classes are deprecated", DeprecationWarning)
    import tensorflow as tf
    from tf_agents.agents.dqn import dqn_agent
    from tf_agents.drivers import py_driver
    from tf_agents.environments import suite_gym
    from tf_agents.metrics import py_metrics
    from tf_agents.networks import q_network
    from tf_agents.policies import py_tf_eager_policy, random_py_policy
    from tf_agents.replay_buffers import py_hashed_replay_buffer, py_uniform_replay_buffer
    from tf_agents.specs import array_spec, tensor_spec
    from tf_agents.trajectories import time_step, trajectory
    from tf_agents.utils import common, nest_utils, numpy_storage

from hypothesis import given, settings
from hypothesis import strategies as st

import anystore
from anystore import NumpyState, NumpyStorage
from tests.items import assert_same

CAPACITY = 6
THEIRS = numpy_storage.NumpyStorage
THEIR_STATE = numpy_storage.NumpyState

Use = Callable[[], None]


class Point(NamedTuple):
    x: Any
    y: Any


class Pair(NamedTuple):
    first: Any
    second: Any


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Use:
    """What puts our classes in the place of theirs, for the replay buffers and metrics that are made from then on."""

    def use() -> None:
        classes = types.SimpleNamespace(NumpyStorage=NumpyStorage, NumpyState=NumpyState)
        monkeypatch.setattr(py_uniform_replay_buffer, "numpy_storage", classes)
        monkeypatch.setattr(py_metrics, "numpy_storage", classes)

    return use


def plain(nest: Any) -> Any:
    """A nest without the wrappers that TensorFlow puts around the containers of a module."""
    nest = getattr(nest, "__wrapped__", nest)
    if isinstance(nest, list):
        return [plain(child) for child in nest]
    if isinstance(nest, tuple):
        children = [plain(child) for child in nest]
        return type(nest)(*children) if hasattr(nest, "_fields") else tuple(children)
    if isinstance(nest, dict):
        return type(nest)((key, plain(child)) for key, child in nest.items())
    return nest


def copied(nest: Any) -> Any:
    return tf.nest.map_structure(np.copy, nest)


# Random specs, indices and values -----------------------------------------------------------------------------------

DTYPES = ["bool", "uint8", "int16", "int32", "int64", "float16", "float32", "float64"]
NAMES = st.sampled_from(["obs", "action", "reward", "z", "a", "m"])
SPECS = st.builds(
    array_spec.ArraySpec,
    st.sampled_from([(), (1,), (3,), (2, 3), (2, 1), (0, 2)]),
    st.sampled_from([np.dtype(name) for name in DTYPES]),
)
NESTS = st.recursive(
    SPECS,
    lambda children: st.one_of(
        st.dictionaries(NAMES, children, min_size=1, max_size=3),
        st.dictionaries(NAMES, children, min_size=1, max_size=3).map(lambda nest: OrderedDict(reversed(nest.items()))),
        st.lists(children, min_size=1, max_size=3),
        st.lists(children, min_size=1, max_size=3).map(tuple),
        st.builds(Point, children, children),
        st.builds(Point, children, st.just(())),
    ),
    max_leaves=5,
)
ROWS = st.integers(-CAPACITY, CAPACITY - 1)
ENDS = st.none() | st.integers(-CAPACITY - 2, CAPACITY + 2)
INDICES = st.one_of(
    ROWS,
    ROWS.map(np.int16),
    ROWS.map(np.array),
    st.builds(slice, ENDS, ENDS, st.sampled_from([None, 1, 2, -1, -2])),
    st.lists(ROWS, max_size=8),
    st.lists(st.lists(ROWS, min_size=2, max_size=2), min_size=1, max_size=3).map(np.array),
    st.lists(ROWS, max_size=4).map(lambda rows: np.array(rows, np.int8)),
    st.lists(st.booleans(), min_size=CAPACITY, max_size=CAPACITY).map(np.array),
    st.just(...),
)


def leading(index: Any) -> tuple[int, ...]:
    shape: tuple[int, ...] = np.zeros(CAPACITY)[index].shape
    return shape


@st.composite
def leaf_values(draw: Any, spec: Any, lead: tuple[int, ...]) -> Any:
    """Anything that NumPy stores for this spec in rows of this shape: of any dtype and with axes to broadcast."""
    if draw(st.integers(0, 3)) == 0 and 0 not in spec.shape:
        number = draw(st.sampled_from([0, 1, 7, True, 2.5, 100, np.int8(3), np.float64(1.5), np.bool_(True)]))
        return number
    shape = list(lead + spec.shape)
    if draw(st.booleans()):
        shape = [draw(st.sampled_from([length, 1])) if length != 0 else 0 for length in shape]
        shape = shape[draw(st.integers(0, len(lead))) :]
    seed = draw(st.integers(0, 2**16))
    dtype = draw(st.sampled_from([spec.dtype.name, *DTYPES]))
    return (np.random.default_rng(seed).integers(0, 127, shape) * 0.75).astype(dtype)


@st.composite
def spec_index_value(draw: Any) -> tuple[Any, Any, Any]:
    data_spec, index = draw(NESTS), draw(INDICES)
    lead = leading(index)
    return data_spec, index, tf.nest.map_structure(lambda spec: draw(leaf_values(spec, lead)), data_spec)


@st.composite
def spec_of_two(draw: Any) -> tuple[type, Any]:
    """A spec of two leaves or more in one container."""
    children = draw(st.lists(SPECS, min_size=2, max_size=4))
    kind = draw(st.sampled_from([dict, list, tuple, Point]))
    if kind is dict:
        return kind, dict(zip("abcd", children))
    return kind, Point(*children[:2]) if kind is Point else kind(children)


def fill(storage: Any, data_spec: Any) -> None:
    """Write something to every row."""
    rng = np.random.default_rng(1)
    storage.set(
        slice(None),
        tf.nest.map_structure(lambda spec: rng.integers(0, 2, (CAPACITY, *spec.shape)).astype(spec.dtype), data_spec),
    )


def made(storage: Any, data_spec: Any) -> Any:
    """A storage of a copy of the spec: theirs puts wrappers of TensorFlow into the very spec that it is given."""
    return storage(copy.deepcopy(data_spec), CAPACITY)


def both(data_spec: Any) -> tuple[Any, Any]:
    pair = made(THEIRS, data_spec), made(NumpyStorage, data_spec)
    for storage in pair:
        fill(storage, data_spec)
    return pair


def assert_alike(found: Any, expected: Any, data_spec: Any) -> None:
    """Two items are the same, down to dtypes and NumPy scalars, and the first is in containers of the spec.

    Theirs hands out wrappers of TensorFlow, in which an OrderedDict is lost.
    """
    leaves = tf.nest.flatten(expected)
    assert_same(found, tf.nest.pack_sequence_as(data_spec, leaves))
    for one, other in zip(tf.nest.flatten(found), leaves, strict=True):
        assert type(one) is type(other)


@given(spec_index_value())
@settings(max_examples=400, deadline=None)
def test_both_classes_store_and_read_the_same(case: tuple[Any, Any, Any]) -> None:
    data_spec, index, value = case
    theirs, mine = both(data_spec)
    with warnings.catch_warnings():
        # NumPy 1.26 on the way to refusing them: an integer out of range, and an array of one for a number.
        warnings.simplefilter("ignore", DeprecationWarning)
        theirs.set(index, value)
        mine.set(index, value)
    assert_alike(mine.get(slice(None)), theirs.get(slice(None)), data_spec)
    assert_alike(mine.get(index), theirs.get(index), data_spec)


@given(NESTS, INDICES)
@settings(max_examples=200, deadline=None)
def test_both_classes_read_the_same_views_and_copies(data_spec: Any, index: Any) -> None:
    shared = []
    for storage in both(data_spec):
        buffers, leaves = (tf.nest.flatten(storage.get(rows)) for rows in (slice(None), index))
        shared.append([np.shares_memory(leaf, buffer) for leaf, buffer in zip(leaves, buffers, strict=True)])
    assert shared[0] == shared[1]


@given(spec_index_value(), st.data())
@settings(max_examples=200, deadline=None)
def test_sequences_that_stand_for_each_other_are_stored_as_by_tf_agents(
    case: tuple[Any, Any, Any], data: st.DataObject
) -> None:
    data_spec, index, value = case

    def disguised(node: Any) -> Any:
        if isinstance(node, dict):
            return type(node)((key, disguised(child)) for key, child in node.items())
        if not isinstance(node, (list, tuple)):
            return [node] if data.draw(st.integers(0, 4)) == 0 else node
        children = [disguised(child) for child in node]
        kind = data.draw(st.sampled_from([list, tuple, Point] if len(children) == 2 else [list, tuple]))
        return Point(*children) if kind is Point else kind(children)

    value = disguised(value)
    theirs, mine = both(data_spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        theirs.set(index, value)
        mine.set(index, value)
    assert_alike(mine.get(...), theirs.get(...), data_spec)


@given(spec_of_two(), st.sampled_from(["missing", "extra", "other", "list for a leaf", "shape"]), INDICES)
@settings(max_examples=200, deadline=None)
def test_what_tf_agents_stores_in_part_or_in_the_wrong_leaf_is_refused(
    case: tuple[type, Any], change: str, index: Any
) -> None:
    kind, data_spec = case
    lead = leading(index)
    value = tf.nest.map_structure(lambda spec: np.ones(lead + spec.shape, spec.dtype), data_spec)
    items: list[tuple[Any, Any]] = list(value.items()) if kind is dict else list(enumerate(value))
    path = str(items[-1][0]) if kind is not Point else "y"
    if change == "missing":
        items = items[:-1]
    elif change == "extra":
        items.append(("e" if kind is dict else len(items), np.ones(())))
    elif change == "list for a leaf":
        items[-1] = items[-1][0], [1, 2]
    elif change == "shape":
        items[-1] = items[-1][0], np.ones((97, 89))
    if change == "other":
        kind = list if kind is dict else dict
    changed = dict(items) if kind is dict else [child for _, child in items]
    _, mine = both(data_spec)
    before = copied(mine.get(...))
    message = f"^{path}: " if change in ("list for a leaf", "shape") else "^the item: "
    with pytest.raises(ValueError, match=message):
        mine.set(index, changed)
    assert_same(mine.get(...), before)


def test_namedtuples_of_other_fields_are_refused() -> None:
    data_spec = Point(array_spec.ArraySpec((), np.int32), array_spec.ArraySpec((), np.int32))
    _, mine = both(data_spec)
    with pytest.raises(ValueError, match="the item: expected a Point, found a Pair"):
        mine.set(0, Pair(1, 2))


@pytest.mark.parametrize(
    "spec",
    [
        array_spec.ArraySpec((2,), np.float32, "obs"),
        array_spec.BoundedArraySpec((2,), np.float32, minimum=-1.0, maximum=1.0),
        anystore.ArraySpec((2,), "float32"),
    ],
)
def test_the_specs_of_both_are_taken(spec: Any) -> None:
    assert_same(NumpyStorage({"obs": spec}, CAPACITY).get([0]), {"obs": np.zeros((1, 2), np.float32)})
    assert anystore.Storage({"obs": spec}, CAPACITY).data_spec == {"obs": anystore.ArraySpec((2,), "float32")}


@pytest.mark.parametrize(
    "spec", [tensor_spec.BoundedTensorSpec((2,), tf.float32, 0.0, 1.0), tf.TensorSpec((2,)), np.float32, "obs", (2,)]
)
def test_what_is_no_array_spec_is_refused_by_both(spec: Any) -> None:
    for storage in THEIRS, NumpyStorage:
        with pytest.raises(ValueError, match="ArraySpec"):
            storage({"obs": spec}, CAPACITY)


# Checkpoints --------------------------------------------------------------------------------------------------------


def exchange(source: Any, target: Any, folder: str | Path) -> None:
    prefix = tf.train.Checkpoint(target=source).save(str(Path(folder) / "checkpoint"))
    tf.train.Checkpoint(target=target).restore(prefix).assert_consumed()


@given(NESTS)
@settings(max_examples=40, deadline=None)
def test_a_checkpoint_of_either_class_restores_into_the_other(data_spec: Any) -> None:
    for source, target in (THEIRS, NumpyStorage), (NumpyStorage, THEIRS):
        with tempfile.TemporaryDirectory() as folder:
            one, other = made(source, data_spec), made(target, data_spec)
            fill(one, data_spec)
            exchange(one, other, folder)
            expected, found = (tf.nest.flatten(storage.get(slice(None))) for storage in (one, other))
            assert_same(found, expected)


@pytest.mark.parametrize("is_used", [False, True])
@pytest.mark.parametrize(("source", "target"), [(THEIRS, NumpyStorage), (NumpyStorage, THEIRS)])
def test_an_unallocated_checkpoint_of_either_class_restores_into_the_other(
    source: Any, target: Any, is_used: bool, tmp_path: Path
) -> None:
    data_spec = {"a": {"b": array_spec.ArraySpec((2,), np.float32)}, "c": array_spec.ArraySpec((), np.int64)}
    one, other = made(source, data_spec), made(target, data_spec)
    if is_used:
        fill(other, data_spec)
    exchange(one, other, tmp_path)
    assert_same(plain(other.get(0)), {"a": {"b": np.zeros(2, np.float32)}, "c": np.int64(0)})


def test_a_checkpoint_that_tf_agents_allocated_in_part_restores(tmp_path: Path) -> None:
    data_spec = [array_spec.ArraySpec((), np.int64), array_spec.ArraySpec((2,), np.float32)]
    theirs, mine = THEIRS(data_spec, CAPACITY), NumpyStorage(data_spec, CAPACITY)
    theirs.set(2, [5])
    exchange(theirs, mine, tmp_path)
    assert_same(mine.get(2), [np.int64(5), np.zeros(2, np.float32)])


def test_both_classes_write_the_same_checkpoint(tmp_path: Path) -> None:
    data_spec = OrderedDict(
        z=array_spec.ArraySpec((2,), np.float32), a=Point(*[array_spec.ArraySpec((), np.bool_)] * 2)
    )
    contents = []
    for storage in both(data_spec):
        reader = tf.train.load_checkpoint(tf.train.Checkpoint(storage=storage).write(str(tmp_path / "checkpoint")))
        keys = [key for key in reader.get_variable_to_shape_map() if key.endswith("py_state")]
        contents.append({key: reader.get_tensor(key) for key in keys})
    assert contents[0] == contents[1]
    assert sorted(contents[0]) == [f"storage/_np_state/buffer{number}/.ATTRIBUTES/py_state" for number in range(3)]


@pytest.mark.parametrize(("source", "target"), [(THEIR_STATE, NumpyState), (NumpyState, THEIR_STATE)])
def test_a_state_of_either_class_restores_into_the_other(source: Any, target: Any, tmp_path: Path) -> None:
    one, empty, used = source(), target(), target()
    one.rows, one.count = np.arange(6).reshape(2, 3), np.int64(4)
    used.rows = np.zeros(1)
    for other in empty, used:
        exchange(one, other, tmp_path)
        np.testing.assert_array_equal(other.rows, one.rows)
        assert other.count == 4
        assert other.count.dtype == np.int64


# TF-Agents' replay buffers, as they are -----------------------------------------------------------------------------

FRAMES = trajectory.Trajectory(
    step_type=array_spec.ArraySpec((), np.int32),
    observation=array_spec.ArraySpec((2, 2, 3), np.uint8),
    action=array_spec.BoundedArraySpec((), np.int64, 0, 1),
    policy_info=(),
    next_step_type=array_spec.ArraySpec((), np.int32),
    reward=array_spec.ArraySpec((), np.float32),
    discount=array_spec.ArraySpec((), np.float32),
)
DICTS = FRAMES._replace(
    observation={"pixels": array_spec.ArraySpec((2, 2), np.float32), "aux": (array_spec.ArraySpec((3,), np.int32),)},
    policy_info={"logits": array_spec.ArraySpec((2,), np.float32)},
)
BUFFERS = {
    "uniform": functools.partial(py_uniform_replay_buffer.PyUniformReplayBuffer, DICTS),
    "hashed": functools.partial(py_hashed_replay_buffer.PyHashedReplayBuffer, FRAMES),
}


@pytest.fixture(params=BUFFERS)
def make(request: pytest.FixtureRequest) -> Callable[[], Any]:
    return functools.partial(BUFFERS[request.param], CAPACITY)


def item(data_spec: Any, stamp: int) -> Any:
    """A batch of one."""
    return tf.nest.map_structure(lambda spec: np.full((1, *spec.shape), stamp % 5, spec.dtype), plain(data_spec))


def add(buffer: Any, stamps: range) -> None:
    for stamp in stamps:
        buffer.add_batch(item(buffer.data_spec, stamp))


def observed(buffer: Any) -> list[Any]:
    """What the buffer gives in every way that it has."""
    np.random.seed(3)  # noqa: NPY002 - what the buffers draw from
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        drawn = [
            buffer.get_next(),
            buffer.get_next(sample_batch_size=4),
            buffer.get_next(num_steps=2),
            buffer.get_next(sample_batch_size=3, num_steps=2, time_stacked=False),
        ]
        # The frames of rows that were never written are not there to be gathered.
        if buffer.size == CAPACITY:
            drawn.append(buffer.gather_all())
    sets = buffer.as_dataset(), buffer.as_dataset(sample_batch_size=3), buffer.as_dataset(3, num_steps=2)
    drawn += [batch for dataset in sets for batch in dataset.take(3).as_numpy_iterator()]
    return [plain(nest) for nest in [*drawn, np.int64(buffer.size)]]


@pytest.mark.parametrize("count", [3, CAPACITY, 2 * CAPACITY + 1])
def test_the_replay_buffers_give_the_same_on_both_classes(make: Callable[[], Any], count: int, ours: Use) -> None:
    theirs = make()
    ours()
    mine = make()
    assert type(mine._storage) is NumpyStorage
    assert type(mine._np_state) is NumpyState
    for buffer in theirs, mine:
        add(buffer, range(count))
    assert mine.size == min(count, CAPACITY)
    assert_same(observed(mine), observed(theirs))
    for buffer in theirs, mine:
        buffer.clear()
        assert buffer.size == 0
        add(buffer, range(5, 9))
    assert_same(observed(mine), observed(theirs))


@pytest.mark.parametrize("is_theirs_first", [True, False])
def test_the_replay_buffers_exchange_their_checkpoints(
    make: Callable[[], Any], is_theirs_first: bool, ours: Use, tmp_path: Path
) -> None:
    theirs, fresh = make(), make()
    ours()
    one, other = (theirs, make()) if is_theirs_first else (make(), fresh)
    add(one, range(CAPACITY + 2))
    exchange(one, other, tmp_path)
    assert_same(observed(other), observed(one))
    # And both go on from there.
    for buffer in one, other:
        add(buffer, range(11, 14))
    assert_same(observed(other), observed(one))


def test_a_checkpoint_of_a_replay_buffer_survives_in_a_manager(
    ours: Use, make: Callable[[], Any], tmp_path: Path
) -> None:
    ours()
    buffer, other = make(), make()
    checkpointer = common.Checkpointer(str(tmp_path), max_to_keep=1, buffer=buffer)
    add(buffer, range(4))
    checkpointer.save(0)
    restored = common.Checkpointer(str(tmp_path), max_to_keep=1, buffer=other)
    assert restored.checkpoint_exists
    assert_same(observed(other), observed(buffer))


# A program of TF-Agents' own parts ----------------------------------------------------------------------------------


def deque_on_ours() -> type:
    """TF-Agents' NumpyDeque, with its base class replaced."""
    body = {
        name: value for name, value in vars(py_metrics.NumpyDeque).items() if name not in ("__dict__", "__weakref__")
    }
    return type("NumpyDeque", (NumpyState,), body)


def test_the_deque_of_the_metrics_works_on_our_state(tmp_path: Path) -> None:
    deques = py_metrics.NumpyDeque, deque_on_ours()
    for maxlen in 3, np.inf:
        one, other = (deque(maxlen, np.float64) for deque in deques)
        for values in [1.0, 2.0], range(20):
            for deque in one, other:
                deque.extend(values)
            assert one.mean() == other.mean()
            assert len(one) == len(other)
            assert one.last == other.last
        exchange(one, other, tmp_path)
        exchange(other, one, tmp_path)
        assert one.mean() == other.mean()


@pytest.fixture
def env() -> Any:
    return suite_gym.load("CartPole-v1")


def test_a_dqn_agent_learns_from_what_a_driver_collected(
    env: Any, ours: Use, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ours()
    monkeypatch.setattr(py_metrics, "NumpyDeque", deque_on_ours())
    tf.random.set_seed(1)
    np.random.seed(1)  # noqa: NPY002 - what the buffers draw from
    spec = tensor_spec.from_spec
    agent = dqn_agent.DqnAgent(
        spec(env.time_step_spec()),
        spec(env.action_spec()),
        q_network=q_network.QNetwork(spec(env.observation_spec()), spec(env.action_spec()), fc_layer_params=(16,)),
        optimizer=tf.keras.optimizers.legacy.Adam(1e-2),
        td_errors_loss_fn=common.element_wise_squared_loss,
    )
    agent.initialize()
    buffer = py_uniform_replay_buffer.PyUniformReplayBuffer(
        data_spec=tensor_spec.to_nest_array_spec(agent.collect_data_spec), capacity=150
    )
    metrics = [py_metrics.AverageReturnMetric(), py_metrics.NumberOfEpisodes(), py_metrics.EnvironmentSteps()]
    observers = [lambda step: buffer.add_batch(nest_utils.batch_nested_array(step)), *metrics]
    random = random_py_policy.RandomPyPolicy(env.time_step_spec(), env.action_spec())
    py_driver.PyDriver(env, random, observers, max_steps=120).run(env.reset())
    assert 120 <= buffer.size < 150
    weights = agent._q_network.trainable_variables
    before = [weight.numpy() for weight in weights]
    batches = iter(buffer.as_dataset(sample_batch_size=16, num_steps=2))
    losses = [float(agent.train(next(batches)).loss) for _ in range(10)]
    assert np.isfinite(losses).all()
    assert all((one != other.numpy()).any() for one, other in zip(before, weights, strict=True))
    greedy = py_tf_eager_policy.PyTFEagerPolicy(agent.collect_policy, use_tf_function=True)
    py_driver.PyDriver(env, greedy, observers, max_steps=60).run(env.reset())
    assert buffer.size == 150
    assert metrics[2].result() + metrics[1].result() >= 180
    assert 1 <= metrics[0].result() <= 500
    # The whole program is saved, and goes on elsewhere.
    other = py_uniform_replay_buffer.PyUniformReplayBuffer(buffer.data_spec, 150)
    average = py_metrics.AverageReturnMetric()
    prefix = tf.train.Checkpoint(buffer=buffer, average=metrics[0]).save(str(tmp_path / "checkpoint"))
    tf.train.Checkpoint(buffer=other, average=average).restore(prefix).assert_consumed()
    assert average.result() == metrics[0].result()
    assert_same(plain(other.gather_all()), plain(buffer.gather_all()))


def test_an_observer_may_store_steps_without_a_replay_buffer(env: Any) -> None:
    storage = NumpyStorage(env.time_step_spec(), 50)
    step = env.reset()
    for row in range(50):
        storage.set(row, step)
        step = env.step(np.int64(row % 2))
    steps = storage.get(slice(None))
    assert isinstance(steps, time_step.TimeStep)
    assert steps.observation.shape == (50, 4)
    assert np.unique(steps.observation, axis=0).shape == (50, 4)
    assert steps.is_first().any()

"""Samples as a tf.data.Dataset."""

from __future__ import annotations

import dataclasses
import gc
import threading
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import pytest

from anystore import ArraySpec
from anystore.convert import to_numpy
from anystore.replay import Prioritized, ReplayBuffer
from anystore.replay.feed import Batches, tf_dataset
from tests.items import SPEC as STAMPED
from tests.items import Pose, batch

tf = pytest.importorskip("tensorflow")

WAIT = 60
"""Seconds after which what should have happened long ago has failed."""
BACKENDS = ["numpy", "torch", "jax", "array_api_strict"]


@dataclasses.dataclass
class Camera:
    image: object
    angle: object


def filled(backend="numpy", **options):
    """A buffer whose items are those of the stamps 100 to 199."""
    pytest.importorskip(backend)
    buffer = ReplayBuffer(STAMPED, 100, backend=backend, seed=7, **options)
    buffer.extend(batch(np.arange(200)))
    return buffer


def assert_whole(element, size):
    """Each leaf tells the stamps that the rows tell."""
    stamps = element["rows"].numpy()
    expected = batch(stamps)
    items = element["items"]
    assert stamps.shape == (size,)
    assert type(items["obs"]["pose"]) is Pose
    np.testing.assert_array_equal(items["obs"]["image"], expected["obs"]["image"])
    np.testing.assert_array_equal(items["obs"]["pose"].position, expected["obs"]["pose"].position)
    np.testing.assert_array_equal(items["obs"]["pose"].valid, expected["obs"]["pose"].valid)
    np.testing.assert_array_equal(items["action"][0], expected["action"][0])
    assert items["action"][1][0].shape == (size, 0, 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_elements(backend):
    elements = list(tf_dataset(filled(backend), 8, count=5))
    assert len(elements) == 5
    for element in elements:
        assert sorted(element) == ["items", "rows"]
        assert_whole(element, 8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_known_of_them_beforehand(backend):
    dataset = tf_dataset(
        filled(backend, sampler=Prioritized(), terminated="obs/pose/valid"), 8, num_steps=3, at_end="pad"
    )
    spec, element = dataset.element_spec, next(iter(dataset))
    assert sorted(spec) == ["items", "mask", "rows", "weights"]
    assert spec["items"]["obs"]["image"] == tf.TensorSpec((8, 3, 3, 2), tf.uint8)
    assert spec["items"]["obs"]["pose"].valid == tf.TensorSpec((8, 3), tf.bool)
    assert spec["mask"] == tf.TensorSpec((8, 3), tf.bool)
    assert type(spec["items"]["action"]) is tuple  # which is a list in the buffer
    tf.nest.map_structure(lambda each, tensor: each.is_compatible_with(tensor) or pytest.fail(str(each)), spec, element)


def test_the_draws_are_those_of_batches():
    buffer, expected = filled(), filled()
    expected.sample(8)  # from which a data set knows shapes and dtypes
    dataset = tf_dataset(buffer, 8, prefetch=1, count=4)
    for element, sample in zip(dataset, Batches(expected, 8), strict=False):
        np.testing.assert_array_equal(element["rows"], sample.rows)


def test_each_loop_has_batches_of_its_own():
    dataset = tf_dataset(filled(), 8, count=3)
    assert len(list(dataset)) == len(list(dataset)) == 3


def test_through_the_pipeline_of_tensorflow():
    dataset = tf_dataset(filled(), 8).map(lambda element: element["items"]["action"][0]).prefetch(2).take(3)
    for stamps in dataset:
        assert ((stamps.numpy() >= 100) & (stamps.numpy() < 200)).all()


def test_each_loop_is_a_pass():
    dataset = tf_dataset(filled(), 32, passes=1)
    for _ in range(2):
        rows = [element["rows"].numpy() for element in dataset]
        assert [len(each) for each in rows] == [32, 32, 32, 4]
        assert sorted(np.concatenate(rows).tolist()) == list(range(100, 200))


def test_no_thread_is_left():
    buffer, threads = filled(), set()
    sample = buffer.sample

    def noted(*args, **options):
        threads.add(threading.current_thread())
        return sample(*args, **options)

    buffer.sample = noted
    for _ in tf_dataset(buffer, 8):
        break
    gc.collect()
    for thread in threads - {threading.current_thread()}:
        thread.join(WAIT)
        assert not thread.is_alive()
    assert len(threads) == 2


def test_an_exception_is_passed_on():
    buffer = filled()
    dataset = iter(tf_dataset(buffer, 8, prefetch=0))
    next(dataset)
    buffer.clear()
    with pytest.raises(tf.errors.InvalidArgumentError, match="the buffer is empty; add items before sampling"):
        list(dataset)


def test_an_empty_buffer():
    with pytest.raises(ValueError, match="the buffer is empty"):
        tf_dataset(ReplayBuffer(STAMPED, 100), 8)
    with pytest.raises(ValueError, match="^expected at least one batch, from which the shapes and dtypes are read"):
        tf_dataset(filled(), 8, passes=0)


@pytest.mark.parametrize("name", ["to", "copy"])
def test_refused(name):
    with pytest.raises(TypeError, match=f"copies into tensors of its own; {name}= has no place here"):
        tf_dataset(filled(), 8, **{name: None})


def test_nests_of_all_kinds():
    number = ArraySpec((), "int32")

    class Step(NamedTuple):
        cameras: list
        rest: object

    spec = Step([Camera(number, number), number], OrderedDict(z=number, a=(number,)))
    buffer = ReplayBuffer(spec, 10)
    one, two, three, four, five = (np.full(4, value, np.int32) for value in range(1, 6))
    buffer.extend(Step([Camera(one, two), three], OrderedDict(z=four, a=(five,))))
    (element,) = tf_dataset(buffer, 2, count=1)
    items = tf.nest.map_structure(lambda tensor: int(to_numpy(tensor)[0]), element["items"])
    assert items == Step(({"image": 1, "angle": 2}, 3), {"z": 4, "a": (5,)})
    assert type(items) is Step
